"""The moving basis: what follows from past changes, alike on every machine, and what it saves."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from compression import exact
from compression.blocks import F32, Layout
from compression.codec import Compressor, FeedbackState
from compression.errors import CodecError
from compression.header import MAGIC, Method
from compression.moving import WINDOW, MovingBasis

SHAPES = {
    "0.q.lora_A.weight": (8, 96),
    "0.q.lora_B.weight": (64, 8),
    "1.q.lora_A.weight": (8, 96),
    "1.q.lora_B.weight": (64, 8),
    "head.weight": (5, 40),
    "head.bias": (5,),
    "dense.weight": (72, 72),
}
LAYOUT = Layout(tuple(SHAPES), tuple(SHAPES.values()))


class Planted:
    """Changes through few directions of each tensor's sides, the same ones all the time."""

    def __init__(self, seed: int, directions: int = 3) -> None:
        rng = np.random.default_rng(seed)
        self._sides = {
            name: [rng.normal(size=(directions, n)) / np.sqrt(n) for n in shape]
            for name, shape in SHAPES.items()
            if len(shape) == 2
        }

    def draw(self, rng: np.random.Generator, noise: float = 0.02) -> dict[str, F32]:
        found = {}
        for name, shape in SHAPES.items():
            value = noise * rng.normal(size=shape)
            if name in self._sides:
                left, right = self._sides[name]
                value += left.T @ rng.normal(size=(len(left), len(right))) @ right
            found[name] = (1e-2 * value).astype(np.float32)
        return found


def moving(changes: Sequence[dict[str, F32]]) -> Compressor:
    """The codec that follows from changes as they are."""
    whole = Compressor.identity(LAYOUT)
    return Compressor.moving([whole.encode(change).data for change in changes], layout=LAYOUT)


def _changes(seed: int, count: int = WINDOW) -> list[dict[str, F32]]:
    planted, rng = Planted(seed), np.random.default_rng([seed, 1])
    return [planted.draw(rng) for _ in range(count)]


@pytest.mark.parametrize("size", [1, 2, 7, 48])
def test_symmetric_eigen_solves_what_it_is_given(size: int) -> None:
    a = np.random.default_rng(size).normal(size=(3, size, size))
    a = a @ a.transpose(0, 2, 1)
    values, vectors = exact.symmetric_eigen(a)
    assert np.allclose(values, np.linalg.eigvalsh(a)[:, ::-1], atol=1e-6 * values.max())
    assert np.allclose(vectors.transpose(0, 2, 1) @ vectors, np.eye(size), atol=1e-12)
    assert np.allclose(a @ vectors, vectors * values[:, None], atol=1e-3 * values.max())


def test_integers_keep_ratios() -> None:
    values = np.random.default_rng(0).normal(size=(20, 30)) * 1e-7
    whole, scale = exact.integers(values)
    assert np.abs(whole).max() <= 2**exact.ROW_BITS
    assert np.array_equal(whole, np.rint(whole))
    assert np.allclose(np.ldexp(whole, scale), values, atol=np.ldexp(0.5, scale))
    assert not exact.integers(np.zeros(3))[0].any()


@pytest.mark.parametrize("count", [1, 2, WINDOW])
def test_the_transform_is_orthonormal(count: int) -> None:
    basis = MovingBasis(LAYOUT, tuple(_changes(3, count)))
    rng = np.random.default_rng(4)
    x, y = (LAYOUT.pack(Planted(9).draw(rng, noise=1.0)) for _ in range(2))
    z = basis.encode(x)
    assert np.allclose(basis.decode(z), x, atol=1e-5 * np.abs(x).max())
    assert np.vdot(z, basis.encode(y)) == pytest.approx(
        np.vdot(x, y), abs=1e-5 * float(np.vdot(x, x))
    )
    assert np.allclose(
        np.tensordot(basis.trend, basis.trend, [[1, 2], [1, 2]]),
        np.eye(len(basis.trend)),
        atol=1e-6,
    )


def test_sparse_and_empty_history_gives_an_orthonormal_transform() -> None:
    """Single values make coordinate axes of the eigenvectors, in an order of their own."""
    change = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    change["0.q.lora_A.weight"][[0, 1, 2], [1, 0, 2]] = (3.0, 2.0, -1.0)
    change["dense.weight"][[5, 0], [0, 5]] = (1.0, 1.0)
    basis = MovingBasis(LAYOUT, (change,))
    x = LAYOUT.pack(Planted(9).draw(np.random.default_rng(4), noise=1.0))
    z = basis.encode(x)
    assert np.allclose(basis.decode(z), x, atol=1e-5 * np.abs(x).max())
    assert np.vdot(z, z) == pytest.approx(float(np.vdot(x, x)), rel=1e-5)
    first = np.square(basis.encode(LAYOUT.pack(change))).reshape(-1)[basis.classes[0]]
    assert first.sum() > 0.9 * 16.0  # of nine, four, one, one and one


def test_every_latent_is_in_one_class() -> None:
    basis = MovingBasis(LAYOUT, tuple(_changes(3)))
    together = np.sort(np.concatenate(basis.classes))
    filled = LAYOUT.pack({name: np.ones(shape, np.float32) for name, shape in SHAPES.items()})
    assert np.array_equal(together, np.flatnonzero(filled))


def test_first_classes_hold_what_past_and_present_share() -> None:
    planted = Planted(5)
    rng = np.random.default_rng(6)
    basis = MovingBasis(LAYOUT, tuple(planted.draw(rng) for _ in range(WINDOW)))
    energy = np.square(basis.encode(LAYOUT.pack(planted.draw(rng)))).reshape(-1)
    first = np.concatenate(basis.classes[:4])  # an eighth of the latents
    assert len(first) <= LAYOUT.values / 8
    assert energy[first].sum() > 0.9 * energy.sum()
    foreign = np.square(basis.encode(LAYOUT.pack(Planted(99).draw(rng)))).reshape(-1)
    assert foreign[first].sum() < 0.6 * foreign.sum()  # the same test can fail


def test_more_is_said_in_equal_bytes() -> None:
    planted, rng = Planted(5), np.random.default_rng(6)
    ours_codec = moving([planted.draw(rng) for _ in range(WINDOW)])
    plain = Compressor.deadzone(LAYOUT)
    update = planted.draw(rng)
    ours = ours_codec.encode(update, bytes_target=250)
    theirs = plain.encode(update, bytes_target=250)
    assert ours.method == "moving"
    assert len(ours.data) <= 250
    assert 1 - ours.cosine**2 < 0.5 * (1 - theirs.cosine**2)


def test_a_step_along_the_trend_costs_a_header() -> None:
    changes = _changes(7)
    update = {name: np.float32(0.8) * value for name, value in changes[-1].items()}
    encoded = moving(changes).encode(update, bytes_target=100)
    assert encoded.cosine > 0.999
    for name, value in encoded.decoded.items():
        assert np.allclose(value, update[name], atol=2e-2 * np.abs(update[name]).max())


def test_an_update_without_history_is_no_worse_than_plain() -> None:
    rng = np.random.default_rng(8)
    noise = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    for target in (150, 400, 2000):
        ours = moving(_changes(7)).encode(noise, bytes_target=target)
        plain = Compressor.deadzone(LAYOUT).encode(noise, bytes_target=target)
        assert ours.cosine >= plain.cosine * 0.997
        assert len(ours.data) <= target


def test_codes_are_read_by_the_same_history_only() -> None:
    changes = _changes(11, WINDOW + 2)
    here, there = moving(changes), moving(changes[2:])
    assert here.codec_id == there.codec_id  # older ones do not count
    encoded = here.encode(changes[0], bytes_target=400)
    decoded = there.decode(encoded.data)
    assert all(np.array_equal(decoded[k], v) for k, v in encoded.decoded.items())
    behind = moving(changes[:-1])
    assert behind.codec_id != here.codec_id
    with pytest.raises(CodecError, match="another codec"):
        behind.decode(encoded.data)


def test_error_feedback_telescopes_while_the_basis_moves() -> None:
    planted, rng = Planted(12), np.random.default_rng(13)
    state, codec = FeedbackState(), Compressor.deadzone(LAYOUT)
    meant = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    said = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    changes: list[dict[str, F32]] = []
    methods = set()
    for _ in range(WINDOW + 3):
        update = planted.draw(rng)
        encoded = codec.encode(update, state, bytes_target=300)
        methods.add(encoded.method)
        for name in SHAPES:
            meant[name] += update[name]
            said[name] += encoded.decoded[name]
        changes = [*changes, encoded.decoded][-WINDOW:]
        codec = moving(changes)
    assert methods == {"dead-zone", "moving"}
    owed = state.tensors(LAYOUT)
    for name in SHAPES:
        assert np.allclose(said[name] + owed[name], meant[name], atol=1e-9)


def test_what_cannot_be_followed_is_refused() -> None:
    nothing = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    with pytest.raises(CodecError, match="1 to 6 changes, not 0"):
        moving([])
    with pytest.raises(CodecError, match="not zero"):
        moving([nothing, nothing])
    with pytest.raises(CodecError, match="1 to 6 changes, not 7"):
        MovingBasis(LAYOUT, tuple(_changes(1, 7)))
    with pytest.raises(CodecError, match="encoder to export"):
        moving(_changes(1)).encoder_onnx()
    with pytest.raises(CodecError, match="differ"):
        MovingBasis(LAYOUT, ({"x": np.ones(3, np.float32)},)).trend  # noqa: B018


def test_its_file_is_the_changes_and_a_holder_follows_by_itself() -> None:
    plain = Compressor.deadzone(LAYOUT)
    coded = [plain.encode(change, bytes_target=600).data for change in _changes(16, WINDOW + 3)]
    newest = Compressor.moving(coded, layout=LAYOUT)
    assert len(newest.to_bytes()) < 700 * WINDOW + 2000
    read = Compressor.from_bytes(newest.to_bytes())
    assert read.codec_id == newest.codec_id
    assert (read.format, plain.format) == (2, 1)
    holder = plain
    for codes in coded:
        holder = holder.followed([codes])
    assert holder.codec_id == newest.codec_id
    behind = Compressor.moving(coded[:-3], layout=LAYOUT)
    assert behind.followed(coded[-3:]).codec_id == newest.codec_id
    with pytest.raises(CodecError):
        behind.followed([coded[0][:-4]])
    nothing = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    empty = plain.encode(nothing).data
    assert plain.followed([empty]) is plain
    assert newest.followed([empty]).codec_id == newest.codec_id
    assert plain.followed([empty, *coded]).codec_id == newest.codec_id
    learned = Compressor.fit(_changes(16, 2))
    with pytest.raises(CodecError, match="another codec"):
        plain.followed([learned.encode(_changes(17, 1)[0]).data])


@pytest.mark.parametrize("damage", ["cut", "longer", "flipped"])
def test_damaged_codes_are_refused(damage: str) -> None:
    codec = moving(_changes(14))
    data = codec.encode(_changes(15)[0], bytes_target=400).data
    assert data[:4] == MAGIC
    assert data[4] == Method.MOVING
    bad = {
        "cut": data[:-4],
        "longer": data + b"\0" * 4,
        "flipped": data[:60] + bytes([data[60] ^ 1]) + data[61:],
    }[damage]
    with pytest.raises(CodecError):
        codec.decode(bad)


_ELSEWHERE = """
import sys, json, hashlib
import numpy as np
sys.path.insert(0, sys.argv[1])
sys.path.insert(0, sys.argv[2])
from test_compression_moving import _changes, moving
codec = moving(_changes(21))
basis = codec.basis
print(json.dumps({
    "id": codec.codec_id,
    "classes": hashlib.sha256(np.concatenate(basis.classes).tobytes()).hexdigest(),
    "data": codec.encode(_changes(22)[0], bytes_target=400).data.hex(),
}))
"""


def test_another_kind_of_processor_derives_the_same_basis(tmp_path: Path) -> None:
    """OpenBLAS and numpy told to use other instructions, which sum in another order."""
    root = Path(__file__).parents[1]
    told = {
        "here": {},
        "old": {
            "OPENBLAS_CORETYPE": "Prescott",
            "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512_SKX",
        },
    }
    found = {}
    for name, extra in told.items():
        command = [sys.executable, "-c", _ELSEWHERE, str(root), str(root / "tests")]
        env = {**os.environ, **extra, "OMP_NUM_THREADS": "1"}
        out = subprocess.run(
            command, env=env, capture_output=True, text=True, cwd=tmp_path, check=True
        )
        found[name] = json.loads(out.stdout)
    assert found["here"]["id"] == found["old"]["id"]
    assert found["here"]["classes"] == found["old"]["classes"]
    codec = moving(_changes(21))
    for one in found.values():
        decoded = codec.decode(bytes.fromhex(one["data"]))
        ours = codec.encode(_changes(22)[0], bytes_target=400).decoded
        for name, value in ours.items():
            assert np.allclose(decoded[name], value, atol=1e-4 * np.abs(value).max())
