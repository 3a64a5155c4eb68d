"""The methods ours is compared with do what their papers say, at the bytes they are charged for."""

import numpy as np
import pytest
import torch

from compression.baselines.method import Baseline, pack_mask, unpack_mask
from compression.baselines.power_sgd import PowerSgd
from compression.baselines.quantized import FourBit, Int8, Qsgd, Sign, normal_float_levels
from compression.baselines.resnet3 import PublishedAutoencoder
from compression.baselines.sparse import CountSketch, RandomProjection, TopK, hadamard

SHAPES = ((64, 96), (10,), (40, 64))
SIZE = 64 * 96 + 10 + 40 * 64
METHODS: list[Baseline] = [
    Int8(),
    FourBit("nf4"),
    FourBit("int4"),
    Qsgd(1),
    Qsgd(4),
    Sign(),
    TopK(0.01),
    RandomProjection(0.05),
    PowerSgd(SHAPES, 2),
]


def heavy_tailed(seed: int, size: int = SIZE) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_t(4, size).astype(np.float32) * np.float32(1e-3)


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.square(found - wanted).sum() / np.square(wanted).sum())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_error_feedback_delivers_a_constant_update_in_the_end(method: Baseline) -> None:
    """Whatever a method leaves out of one round, feedback brings in later ones."""
    wanted, rng = heavy_tailed(1), np.random.default_rng(2)
    owed, sent = np.zeros(SIZE, np.float32), np.zeros(SIZE, np.float64)

    for _ in range(120):
        total = owed + wanted if method.feedback else wanted
        found = method.decode(method.encode(total, rng), SIZE)
        owed, sent = total - found, sent + found

    assert relative((sent / 120).astype(np.float32), wanted) < 0.35


@pytest.mark.parametrize(
    ("method", "bits"),
    [
        (Int8(), 8 + 32 / 4096),
        (FourBit("nf4"), 4 + 32 / 64),
        (Sign(), 1 + 32 / 4096),
        (RandomProjection(0.05), 0.05 * 16),
        (CountSketch(0.05), 0.05 * 16),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
def test_a_method_takes_the_bits_it_promises(method: Baseline, bits: float) -> None:
    data = method.encode(heavy_tailed(3, 65_536), np.random.default_rng(0))

    assert 8 * len(data) / 65_536 == pytest.approx(bits, rel=0.01)


def test_finer_codes_err_less() -> None:
    values, rng = heavy_tailed(4), np.random.default_rng(0)

    def error(method: Baseline) -> float:
        return relative(method.decode(method.encode(values, rng), SIZE), values)

    assert error(Int8()) < 0.001 < error(FourBit("nf4")) < error(FourBit("int4")) < 0.1
    assert error(TopK(0.1)) < error(TopK(0.01)) < 1
    assert error(Qsgd(64)) < error(Qsgd(8))


def test_nf4_has_the_published_levels() -> None:
    levels = normal_float_levels()

    assert levels[[0, 7, 15]].tolist() == [-1.0, 0.0, 1.0]
    assert levels[[1, 8, 14]] == pytest.approx([-0.69619, 0.07958, 0.72296], abs=2e-4)
    assert (np.diff(levels) > 0).all()


def test_top_k_keeps_the_largest_and_only_those() -> None:
    values = heavy_tailed(5)
    found = TopK(0.01).decode(TopK(0.01).encode(values, np.random.default_rng(0)), SIZE)

    kept = np.flatnonzero(found)
    assert len(kept) == round(0.01 * SIZE)
    assert np.abs(values[kept]).min() >= np.abs(np.delete(values, kept)).max()
    assert np.allclose(found[kept], values[kept], rtol=1e-3)


def test_a_mask_costs_its_entropy() -> None:
    mask = np.random.default_rng(6).random(100_000) < 0.01

    data = pack_mask(mask)

    share = mask.mean()
    entropy = -share * np.log2(share) - (1 - share) * np.log2(1 - share)
    assert 8 * len(data) == pytest.approx(entropy * mask.size + 64, rel=0.01)
    back, rest = unpack_mask(data + b"more", mask.size)
    assert (back == mask).all()
    assert rest == b"more"
    for whole in (np.ones(5, bool), np.zeros(5, bool)):
        assert (unpack_mask(pack_mask(whole), 5)[0] == whole).all()


def test_qsgd_is_unbiased() -> None:
    values, rng = heavy_tailed(7, 512), np.random.default_rng(8)
    method = Qsgd(2)

    mean = np.mean([method.decode(method.encode(values, rng), 512) for _ in range(3000)], axis=0)

    assert relative(mean.astype(np.float32), values) < 0.01


def test_the_rotation_is_orthonormal_and_the_projection_halves_energy() -> None:
    x = np.random.default_rng(9).standard_normal(256).astype(np.float32)
    assert np.allclose(hadamard(hadamard(x)), x, atol=1e-5)
    assert np.linalg.norm(hadamard(x)) == pytest.approx(np.linalg.norm(x), rel=1e-5)

    values, rng = heavy_tailed(10, 4096), np.random.default_rng(0)
    method = RandomProjection(0.5)
    found = method.decode(method.encode(values, rng), 4096)
    assert np.square(found).sum() / np.square(values).sum() == pytest.approx(0.5, abs=0.05)


def test_a_sketch_finds_heavy_values_and_its_error_never_exceeds_the_update() -> None:
    values = heavy_tailed(11, 20_000) * np.float32(0.05)
    values[[17, 4711]] = [1.0, -2.0]
    method, rng = CountSketch(0.05), np.random.default_rng(0)

    found = method.decode(method.encode(values, rng), 20_000)

    assert {17, 4711} <= set(np.argsort(-np.abs(found))[:4])  # others share their cells
    assert found[4711] / found[17] == pytest.approx(-2.0, rel=0.1)
    for seed in range(5):
        flat = heavy_tailed(seed)
        assert relative(method.decode(method.encode(flat, rng), SIZE), flat) < 1


def test_power_sgd_is_exact_on_matrices_of_its_rank_and_learns_directions() -> None:
    rng = np.random.default_rng(12)
    low = rng.standard_normal((64, 2)) @ rng.standard_normal((2, 96))
    method = PowerSgd(((64, 96),), 2)
    values = low.astype(np.float32).reshape(-1)

    for _ in range(3):
        found = method.decode(method.encode(values, rng), values.size)

    assert relative(found, values) < 1e-5
    assert len(method.encode(values, rng)) == 2 * 2 * (64 + 96)
    with pytest.raises(ValueError, match="rank 0"):
        PowerSgd(SHAPES, 0)


def test_the_published_autoencoder_sends_a_sixty_fourth_and_has_no_client_signal() -> None:
    """Its fault, measured: after training, the decode hardly points along the update."""
    torch.set_num_threads(1)
    size = 64 * 256 * 4
    method = PublishedAutoencoder(seed=0)
    arrays = [heavy_tailed(20 + i, size) for i in range(4)]

    losses = method.train(arrays, steps=30, batch=2)

    data = method.encode(arrays[0], np.random.default_rng(0))
    found = method.decode(data, size)
    assert len(data) == 4 + 2 * size // 64
    assert found.shape == (size,)
    assert np.isfinite(found).all()
    assert losses[-1] < losses[0]
    cosine = found @ arrays[0] / np.linalg.norm(found) / np.linalg.norm(arrays[0])
    assert abs(float(cosine)) < 0.1
    assert method.bytes_of_network > 4 * 200_000
