"""Codes of a shared linear encoder add up under masks; noise comes before encoding."""

import numpy as np
import pytest

from compression.basis import learn
from compression.blocks import Layout
from compression.codec import Compressor
from compression.errors import CodecError
from compression.feedback import FeedbackState
from compression.linear import LinearCodes
from compression.private import clipped_and_noised

SHAPES = {"m.q.lora_A": (4, 96), "m.q.lora_B": (80, 4), "m.v.lora_A": (4, 96)}
LAYOUT = Layout(tuple(SHAPES), tuple(SHAPES.values()))


def update(seed: int) -> dict[str, np.ndarray]:
    """Updates that live mostly in few directions, as those of one run do."""
    rng, shared = np.random.default_rng(seed), np.random.default_rng(99)
    found = {}
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        directions = shared.standard_normal((6, size))
        value = rng.standard_normal(6) @ directions + 0.05 * rng.standard_normal(size)
        found[name] = (1e-3 * value.reshape(shape)).astype(np.float32)
    return found


def codes(*, width: int = 64, step: float = 1e-5, bits: int = 20, devices: int = 5) -> LinearCodes:
    basis = learn([update(i) for i in range(8)], LAYOUT, width=width)
    return LinearCodes(LAYOUT, basis, step, bits, devices)


def total_of(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.sum([part[name] for part in parts], axis=0) for name in SHAPES}


def test_a_masked_sum_decodes_to_the_sum_of_updates() -> None:
    shared, updates = codes(), [update(20 + k) for k in range(5)]
    rng = np.random.default_rng(0)
    sent = [shared.encode(one, FeedbackState()) for one in updates]
    masks = [rng.integers(0, 2**20, shared.size, dtype=np.uint32) for _ in range(4)]
    masks.append(shared.reduced(-np.sum(masks, axis=0, dtype=np.int64)))  # they cancel
    masked = [shared.reduced(c.astype(np.int64) + m) for c, m in zip(sent, masks, strict=True)]

    found = shared.decode_sum(shared.reduced(np.sum(masked, axis=0, dtype=np.int64)))

    wanted = total_of(updates)
    for name in SHAPES:
        assert np.abs(found[name] - wanted[name]).max() < 5 * 5e-5  # five roundings, 8 wide


def test_the_sum_of_decoded_codes_is_the_decoded_sum() -> None:
    shared = codes(width=16, step=1e-3)
    sent = [shared.encode(update(30 + k), FeedbackState()) for k in range(5)]

    apart = total_of([shared.decode_sum(one) for one in sent])
    whole = shared.decode_sum(shared.reduced(np.sum(sent, axis=0, dtype=np.int64)))

    for name in SHAPES:
        assert np.allclose(apart[name], whole[name], atol=1e-6)


def test_a_masked_code_says_nothing_by_itself() -> None:
    """Two quite different updates under a uniform mask: the same distribution."""
    shared, rng = codes(bits=4, devices=1, step=5e-4), np.random.default_rng(1)
    counts = []
    for seed in (40, 41):
        code = shared.encode(update(seed), FeedbackState()).astype(np.int64)
        masked = [shared.reduced(code + rng.integers(0, 16, shared.size)) for _ in range(200)]
        counts.append(np.bincount(np.concatenate(masked), minlength=16) / (200 * shared.size))
    assert np.abs(np.array(counts) - 1 / 16).max() < 0.001


def test_clipping_keeps_the_sum_from_wrapping_and_feedback_brings_it_later() -> None:
    shared, state = codes(bits=6, devices=5, step=2e-4), FeedbackState()
    wanted = update(50)
    received = {name: np.zeros(shape) for name, shape in SHAPES.items()}

    for _ in range(60):
        code = shared.encode(wanted, state)
        signed = code.astype(np.int64)
        signed = np.where(signed >= 32, signed - 64, signed)
        assert np.abs(signed).max() <= shared.limit == 6
        for name, value in shared.decode_sum(code).items():
            received[name] += value

    owed = state.tensors(LAYOUT)
    for name in SHAPES:
        assert np.allclose(received[name] + owed[name], 60 * wanted[name], atol=1e-5)


@pytest.mark.parametrize("bits", [2, 7, 12, 32])
def test_packing_takes_the_bits_it_says(bits: int) -> None:
    shared = codes(bits=bits, devices=1)
    values = np.random.default_rng(2).integers(0, 2**bits, shared.size, dtype=np.uint64)

    data = shared.pack(values.astype(np.uint32))

    assert len(data) == shared.bytes_sent == -(-shared.size * bits // 8)
    assert (shared.unpack(data) == values).all()


def test_what_cannot_be_summed_is_refused() -> None:
    with pytest.raises(CodecError, match="8 bits leaves no integer for each of 200"):
        codes(bits=8, devices=200)
    with pytest.raises(CodecError, match="step 0"):
        codes(step=0.0)
    shared = codes()
    with pytest.raises(CodecError, match="no sum of codes"):
        shared.decode_sum(np.zeros(3, np.uint32))
    with pytest.raises(CodecError, match="no sum of codes"):
        shared.decode_sum(np.full(shared.size, 2**20, np.uint32))
    with pytest.raises(CodecError, match="3 bytes"):
        shared.unpack(b"abc")
    bad = update(1)
    bad["m.q.lora_A"][0, 0] = np.nan
    with pytest.raises(CodecError, match="not finite"):
        shared.encode(bad, FeedbackState())


def test_noise_comes_before_the_code_and_the_clip_before_the_noise() -> None:
    rng = np.random.default_rng(3)
    large = {name: 100 * value for name, value in update(60).items()}

    clipped = clipped_and_noised(large, clip=0.5, noise_multiplier=0.0, rng=rng)
    small = clipped_and_noised(update(61), clip=1e6, noise_multiplier=0.0, rng=rng)

    norm = np.sqrt(sum(float(np.square(v).sum()) for v in clipped.values()))
    assert norm == pytest.approx(0.5, rel=1e-5)
    assert all(np.array_equal(small[name], value) for name, value in update(61).items())

    zero = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    noised = clipped_and_noised(zero, clip=0.5, noise_multiplier=2.0, rng=rng)
    values = np.concatenate([v.reshape(-1) for v in noised.values()])
    assert values.std() == pytest.approx(1.0, rel=0.08)

    # Decoding is a function of the noised values alone: post-processing.
    codec = Compressor.deadzone(LAYOUT)
    assert codec.encode(noised).data == codec.encode(dict(noised)).data


def test_a_clip_or_noise_that_makes_no_sense_is_refused() -> None:
    rng = np.random.default_rng(4)
    with pytest.raises(CodecError, match="clip 0"):
        clipped_and_noised(update(1), clip=0.0, noise_multiplier=1.0, rng=rng)
    with pytest.raises(CodecError, match="multiplier -1"):
        clipped_and_noised(update(1), clip=1.0, noise_multiplier=-1.0, rng=rng)
