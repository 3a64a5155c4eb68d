"""The gauge benchmark: each way makes the product it claims, and the whole run on a toy task."""

import csv
import math

import numpy as np
import pytest
import torch

from coordinator.aggregate import Contribution, aggregate
from examples import bench_gauge
from examples.codec_bench import kinds
from examples.codec_bench.fleet import CLIENTS, Settings
from examples.codec_bench.ways import (
    WAYS,
    Trained,
    balanced,
    balanced_turned_back,
    in_the_means_gauge,
    in_the_old_gauge,
)

SHAPES = {
    f"layer.{i}.{end}": shape
    for i in range(2)
    for end, shape in (("lora_A", (4, 192)), ("lora_B", (128, 4)))
}
REFACTORS = (in_the_old_gauge, in_the_means_gauge, balanced, balanced_turned_back)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Bilinear:
    """Each client wants its own B A; the held-out loss wants what they share."""

    name = "bilinear"
    settings = Settings(rank=4, adapted=2, tokens=1, steps=5, batch=1, lr=0.01, rows=1, held_out=1)
    shapes = SHAPES
    dtype = torch.float32

    def __init__(self):
        rng = np.random.default_rng(0)
        shared = rng.standard_normal((2, 128, 2)) @ rng.standard_normal((2, 2, 192))
        own = rng.standard_normal((CLIENTS, 2, 128, 1)) @ rng.standard_normal((CLIENTS, 2, 1, 192))
        self.wanted = torch.from_numpy((shared + own).astype(np.float32))
        self.shared = torch.from_numpy(shared.astype(np.float32))

    def initial(self, seed):
        return factors(seed, B=0.0)

    def rows_of(self, seed):
        return np.split(np.arange(CLIENTS), CLIENTS)

    def loss(self, leaves, rows):
        return self._off(leaves, self.wanted)

    def held_out_loss(self, leaves):
        return float(self._off(leaves, self.shared[None]))

    def _off(self, leaves, wanted):
        found = [leaves[f"layer.{i}.lora_B"] @ leaves[f"layer.{i}.lora_A"] for i in range(2)]
        return (torch.stack(found, dim=1) - wanted).square().mean(dim=(1, 2, 3))


def factors(seed, B=1.0):
    rng = np.random.default_rng(seed)
    return {
        name: ((B if name.endswith("B") else 0.1) * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def thin(seed, rank):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((30, rank)), rng.standard_normal((rank, 50))


@pytest.mark.parametrize("refactor", REFACTORS)
@pytest.mark.parametrize("rank", [2, 4, 9])
def test_every_refactoring_is_the_best_product_of_its_rank(refactor, rank):
    left, right = thin(1, rank)
    left, right = np.tile(left, 4), np.tile(right, (4, 1))  # as four clients of that rank
    B, A = thin(2, 4)

    B_new, A_new = refactor(left, right, A, B)

    U, S, Vt = np.linalg.svd(left @ right)
    assert A_new.shape == A.shape
    np.testing.assert_allclose(B_new @ A_new, (U[:, :4] * S[:4]) @ Vt[:4], atol=1e-9)


@pytest.mark.parametrize("refactor", REFACTORS)
def test_a_product_of_zero_leaves_directions_to_train(refactor):
    B, A = thin(2, 4)

    B_new, A_new = refactor(0 * B, A, A, 0 * B)

    assert not B_new.any()
    np.testing.assert_allclose(A_new.T @ A_new, A.T @ A, atol=1e-9)  # A, up to a rotation


def test_balanced_factors_weigh_the_same_and_can_be_turned_back():
    left, right = thin(1, 9)
    rng = np.random.default_rng(3)
    B, A = balanced(left, right, *reversed(thin(2, 4)))
    turn, _ = np.linalg.qr(rng.standard_normal((4, 4)))
    B, A = B @ turn, turn.T @ A

    B_new, A_new = balanced_turned_back(left, right, A, B)

    np.testing.assert_allclose(A @ A.T, B.T @ B, atol=1e-9)
    np.testing.assert_allclose(B_new, B, atol=1e-9)
    np.testing.assert_allclose(A_new, A, atol=1e-9)
    assert np.abs(balanced(left, right, A, B)[0] - B).max() > 0.1


def test_gauge_of_the_mean_is_the_coordinators_way():
    old, brought = factors(0), [factors(seed) for seed in range(1, 9)]

    change = bench_gauge._refactored(in_the_means_gauge, old, brought)

    sent = [Contribution(f"device-{i}", one, 100) for i, one in enumerate(brought)]
    for name, wanted in aggregate(old, sent).factors.items():
        np.testing.assert_allclose(old[name] + change[name], wanted, atol=1e-4)


def test_off_is_the_identity_of_averaging_factors_apart():
    old, brought = factors(0), [factors(seed) for seed in range(1, 9)]
    new = {name: np.mean([one[name] for one in brought], axis=0) for name in old}

    found = bench_gauge._off(new, brought, old)

    missed = meant = 0.0
    for i in range(2):
        A = np.stack([one[f"layer.{i}.lora_A"] for one in brought]).astype(np.float64)
        B = np.stack([one[f"layer.{i}.lora_B"] for one in brought]).astype(np.float64)
        change = (B @ A).mean(axis=0) - old[f"layer.{i}.lora_B"] @ old[f"layer.{i}.lora_A"]
        missed += np.sum(((B - B.mean(axis=0)) @ (A - A.mean(axis=0))).mean(axis=0) ** 2)
        meant += np.sum(change**2)
    assert found == pytest.approx(missed / meant, rel=1e-4)


def test_a_way_without_a_codec_or_change_trains_what_the_task_trains():
    task = Bilinear()

    trained = Trained(task, WAYS["factors"], 1, 5)
    frozen = Trained(task, WAYS["frozen A, lr x2"], 1, 7)

    assert trained.shapes == SHAPES
    assert trained.settings == task.settings
    assert sorted(frozen.fixed) + sorted(frozen.shapes) == sorted(SHAPES, key=lambda n: n[-1::-1])
    assert (frozen.settings.lr, frozen.settings.steps) == (0.02, 7)
    leaves = {n: torch.from_numpy(v)[None] for n, v in task.initial(1).items()}
    halves = {n: leaf for n, leaf in leaves.items() if n in frozen.shapes}
    assert frozen.held_out_loss(halves) == trained.held_out_loss(leaves) > 0


@pytest.mark.parametrize("way", WAYS)
def test_every_way_learns_and_all_pay_the_same_bytes(way):
    size = sum(math.prod(shape) for shape in SHAPES.values())

    whole = bench_gauge.measure(Bilinear(), way, "uncompressed", 0, seed=1, rounds=3, steps=5)
    coded = bench_gauge.measure(Bilinear(), way, "top-k", 30, seed=1, rounds=3, steps=5)

    sent = 4 * 2 * 128 * 4 if way.startswith("frozen") else 4 * size
    assert whole.bytes == sent + 16
    assert whole.cosine == pytest.approx(1.0)
    assert whole.drop > 0
    assert 27 <= coded.ratio <= 36
    assert 0 < coded.cosine < 1
    assert (whole.off < 1e-9) == way.startswith("frozen")


def test_the_whole_benchmark_and_its_continuation(tmp_path, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(kinds, "open_task", lambda *told: opened.append(told) or Bilinear())
    monkeypatch.setattr(bench_gauge, "CODECS", (("uncompressed", 0), ("symbiont", 30)))
    out = tmp_path / "results" / "gauge.csv"
    told = ["--rounds", "2", "--out", str(out), "--ways", "gauge", "frozen A", "--seeds"]

    assert bench_gauge.main([*told, "1"]) == 0
    first = out.read_text().splitlines()
    assert bench_gauge.main([*told, "1", "2"]) == 0

    assert len(opened) == 8
    kept = {line.rsplit(",", 2)[0] for line in out.read_text().splitlines()}
    assert {line.rsplit(",", 2)[0] for line in first} <= kept
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    for row in rows:
        if row["codec"] == "uncompressed":
            assert float(row["kept_own"]) == 1.0
        assert 0 < float(row["kept_best"]) <= 1.05
    said = capsys.readouterr().out
    assert "mean of up to 2 seeds" in said
    assert "| gauge | symbiont | " in said
    assert "nan" not in said


def test_missing_files_are_named(tmp_path, capsys):
    kinds.open_task.cache_clear()

    refused = bench_gauge.main(["--data", str(tmp_path), "--out", str(tmp_path / "gauge.csv")])

    assert refused == 1
    assert "agnews.train_part.jsonl.xz is missing" in capsys.readouterr().err
