"""The way down: bit-equal ends, error feedback, joining a chain late, what is refused, bytes."""

import numpy as np
import pytest

from compression import downlink, formats
from compression.codec import Compressor
from compression.downlink import Chain, Link, applied, digest_of, reached, rounded
from compression.errors import CodecError

NAMES = [f"layers.{i}.q_proj.lora_{half}" for i in range(3) for half in "AB"]


def shape(name: str) -> tuple[int, int]:
    return (8, 96) if name.endswith("A") else (96, 8)


def first() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    zero = {name: np.zeros(shape(name), np.float32) for name in NAMES}
    drawn = {n: rng.uniform(-0.1, 0.1, shape(n)).astype(np.float32) for n in NAMES if "_A" in n}
    return rounded(zero | drawn)


def moved(tensors: dict[str, np.ndarray], seed: int, size: float = 0.01) -> dict[str, np.ndarray]:
    """What a round's training makes of an adapter: part drift in one direction, part noise."""
    rng, drift = np.random.default_rng(seed), np.random.default_rng(99)
    return {
        n: (v + size * (drift.normal(size=v.shape) + rng.normal(size=v.shape))).astype(np.float32)
        for n, v in sorted(tensors.items())
    }


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return set(one) == set(other) and all(np.array_equal(v, other[k]) for k, v in one.items())


def run(chain: Chain, rounds: int) -> list[dict[str, np.ndarray]]:
    """The versions that were opened, oldest first."""
    versions = [chain.tensors]
    for step in range(rounds):
        chain.adopt(moved(chain.tensors, step))
        chain.open()
        versions.append(chain.tensors)
    return versions


def test_whoever_holds_the_last_version_arrives_at_the_next_bit_for_bit() -> None:
    chain = Chain(first())
    held = {digest_of(first()): first()}

    for step in range(6):
        chain.adopt(moved(chain.tensors, step))
        chain.open()
        (link,) = chain.since(next(iter(held))) or ()
        got = reached(chain.digest, [link], held)

        assert got is not None
        assert same(got, chain.tensors)
        assert link.size <= chain.whole_bytes * 2 / downlink.RATIO + 64
        held = {chain.digest: got}


def test_what_is_said_and_what_is_owed_add_up_to_what_was_meant() -> None:
    chain, meant = Chain(first(), ratio=100.0), {n: np.zeros(shape(n)) for n in NAMES}

    for step in range(20):
        target = moved(chain.tensors, step)
        for name in NAMES:
            meant[name] += target[name].astype(np.float64) - chain.tensors[name]
        chain.adopt(target)
        chain.open()

    for name in NAMES:
        said = chain.tensors[name].astype(np.float64) - first()[name]
        assert np.abs(said + chain.owed[name] - meant[name]).max() < 1e-6
    flat = [np.concatenate([part[n].ravel() for n in NAMES]) for part in (chain.owed, meant)]
    assert np.linalg.norm(flat[0]) < 0.5 * np.linalg.norm(flat[1])  # late, not lost


def test_trying_again_before_opening_loses_nothing_and_sends_one_difference() -> None:
    chain = Chain(first(), ratio=100.0)
    once = chain.adopt(moved(first(), 0))
    chain.adopt(moved(once, 1))
    chain.open()

    links = chain.since(digest_of(first()))

    assert links is not None
    assert len(links) == 1
    for name in NAMES:
        meant = moved(first(), 0)[name] + (moved(once, 1)[name] - once[name])
        assert np.abs(chain.tensors[name] + chain.owed[name] - meant).max() < 1e-6


def test_a_round_that_changes_nothing_sends_nothing() -> None:
    chain = Chain(first())

    assert same(chain.adopt(first()), first())
    chain.open()

    assert chain.since(digest_of(first())) == ()


def test_a_device_joins_wherever_it_stopped_and_a_whole_copy_wins_when_it_is_less() -> None:
    chain = Chain(first(), ratio=20.0)
    versions = run(chain, 14)
    by_digest = [digest_of(version) for version in versions]

    for missed in range(1, 9):
        links = chain.since(by_digest[-1 - missed])
        assert links is not None
        assert len(links) == missed
        for held in versions[-1 - missed :]:  # also from the middle of what was sent
            got = reached(chain.digest, links, {digest_of(held): held})
            assert got is not None
            assert same(got, chain.tensors)
    assert chain.since(by_digest[0]) is None
    assert chain.since(bytes(32)) is None
    kept = chain.since(by_digest[-9]) or ()
    assert sum(link.size for link in kept) < chain.whole_bytes


def test_what_is_not_opened_yet_can_be_said_ahead() -> None:
    chain = Chain(first())
    held = {digest_of(first()): first()}
    assert chain.ahead(digest_of(first())) == ()

    for step in range(3):
        chain.adopt(moved(chain.tensors, step))
        for base in held:
            links = chain.ahead(base) or ()
            assert len(links) == 1 + len(chain.since(base) or ())
            found = downlink.reached(chain.digest, links, {base: held[base]})
            assert found is not None
            assert same(found, chain.tensors)
        codes = links[-1].codes
        held |= {chain.digest: chain.tensors}
        assert chain.open() == codes
        assert chain.ahead(chain.digest) == ()

    assert chain.ahead(bytes(32)) is None
    heavy = Chain(first(), ratio=2.5)
    weights = []
    for step in range(4):
        heavy.adopt(moved(heavy.tensors, step))
        weights.append(heavy.ahead(digest_of(first())) is not None)
        heavy.open()
    assert weights == [True, True, False, False]


def test_a_difference_for_another_base_is_not_applied() -> None:
    chain = Chain(first())
    run(chain, 2)
    links = chain.since(digest_of(first()))
    assert links is not None
    other = rounded(moved(first(), 77))

    assert reached(chain.digest, links, {digest_of(other): other}) is None
    assert reached(chain.digest, links, {}) is None
    lying = [Link(digest_of(other), links[0].codes), *links[1:]]
    with pytest.raises(CodecError, match="another adapter than its digest says"):
        reached(chain.digest, lying, {digest_of(other): other})
    for bad in (b"", links[0].codes[:-5], links[0].codes + b"x", bytes(100)):
        with pytest.raises(CodecError):
            applied(first(), bad)


def test_a_chain_goes_on_after_a_restart_as_if_there_had_been_none() -> None:
    whole, chain = Chain(first(), ratio=50.0), Chain(first(), ratio=50.0)
    run(whole, 5)

    for step in range(5):
        chain.adopt(moved(chain.tensors, step))
        chain = Chain.from_bytes(chain.to_bytes())  # between trying and opening
        chain.open()
        chain = Chain.from_bytes(chain.to_bytes())

    assert chain.to_bytes() == whole.to_bytes()
    assert chain.since(digest_of(first())) == whole.since(digest_of(first()))


def test_what_float16_cannot_hold_is_refused_and_changes_nothing() -> None:
    chain = Chain(first())
    before = chain.to_bytes()

    for value in (np.nan, np.inf, 1e6):
        target = first()
        target[NAMES[0]][0, 0] = value
        with pytest.raises(CodecError):
            chain.adopt(target)
    with pytest.raises(CodecError, match="differ"):
        chain.adopt({NAMES[0]: first()[NAMES[0]]})
    with pytest.raises(CodecError, match="not exact in float16"):
        Chain({NAMES[0]: np.full((8, 96), 0.1, np.float32)})
    with pytest.raises(CodecError, match="ratio"):
        Chain(first(), ratio=1.0)

    assert chain.to_bytes() == before


def test_damaged_states_are_refused() -> None:
    data = Chain(first()).to_bytes()

    for bad in (
        b"",
        data[:50],
        data[:-3],
        Compressor.identity(downlink.Layout.of(first())).to_bytes(),
    ):
        with pytest.raises(CodecError):
            Chain.from_bytes(bad)


def test_a_digest_names_names_shapes_and_values() -> None:
    tensors = first()
    turned = {name: value.reshape(value.shape[::-1]) for name, value in tensors.items()}
    renamed = {name + "x": value for name, value in tensors.items()}
    changed = {name: value.copy() for name, value in tensors.items()}
    changed[NAMES[0]][0, 0] += 1.0

    digests = {digest_of(t) for t in (tensors, turned, renamed, changed)}

    assert len(digests) == 4
    assert digest_of(dict(reversed(tensors.items()))) == digest_of(tensors)


def test_formats_are_words_and_unknown_words_are_skipped() -> None:
    assert formats.codec_formats(formats.words()) == set(formats.CODEC_FORMATS)
    assert formats.reads_deltas(formats.words())
    assert formats.codec_formats(()) == {1}
    assert formats.makes_releases(formats.words())
    assert not formats.reads_deltas(("codec.1",))
    assert not formats.makes_releases(("codec.2", "delta.1", "release.9"))
    assert formats.codec_formats(("codec.2", "codec.7", "codec.x", "tea")) == {2, 7}
