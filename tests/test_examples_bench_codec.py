"""The codec benchmark: models like transformers, clients apart, bytes charged, resume, report."""

import csv
import dataclasses
import json
import lzma
import math

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from examples import bench_codec
from examples.codec_bench import kinds, tables
from examples.codec_bench.fleet import BETAS, CLIENTS, Fleet, Settings
from examples.codec_bench.methods import METHODS, RATIOS
from examples.codec_bench.models import Decoder, Encoder
from examples.codec_bench.plot import lines_plot
from examples.codec_bench.results import COLUMNS, Results, ResultsError
from examples.codec_bench.runs import MethodError, kept, measure
from examples.codec_bench.sessions import TAG_BYTES, Learned, Plan, Whole
from examples.learning.tasks import TASKS

SHAPES = {
    "model.layers.0.q.lora_A": (8, 192),
    "model.layers.0.q.lora_B": (512, 8),
    "model.layers.1.q.lora_A": (8, 512),
    "model.layers.1.q.lora_B": (192, 8),
    "classifier.weight": (6, 192),
}
SIZE = sum(math.prod(shape) for shape in SHAPES.values())


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Bowl:
    """A task whose loss is a quadratic bowl, a little different for each client."""

    name = "bowl"
    settings = Settings(rank=8, adapted=1, tokens=1, steps=3, batch=2, lr=0.01, rows=4, held_out=1)
    shapes = SHAPES
    dtype = torch.float32

    def __init__(self):
        rng = np.random.default_rng(0)
        shared = rng.standard_normal(SIZE)
        own = rng.standard_normal((CLIENTS * 4, SIZE))
        self.middles = torch.from_numpy((shared + 0.1 * own).astype(np.float32))
        self.middle = torch.from_numpy(shared.astype(np.float32))
        self.asked = []

    def initial(self, seed):
        return {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}

    def rows_of(self, seed):
        return np.split(np.arange(CLIENTS * 4), CLIENTS)

    def loss(self, leaves, rows):
        self.asked.append(rows)
        flat = torch.cat([leaf.flatten(1) for leaf in leaves.values()], dim=1)  # (K, N)
        wanted = self.middles[torch.from_numpy(rows)].mean(dim=1)
        return (flat - wanted).square().mean(dim=1)

    def held_out_loss(self, leaves):
        flat = torch.cat([leaf.flatten(1) for leaf in leaves.values()], dim=1)
        return float((flat - self.middle).square().mean())


def noise(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {n: (scale * rng.standard_normal(s)).astype(np.float32) for n, s in SHAPES.items()}


def plan_of(ratio, rounds=40):
    return Plan(SHAPES, ratio, rounds, CLIENTS, 0)


def saved(model, folder):
    """The model's folder, and leaves of two clients with rank-4 factors for its last layer."""
    model.eval().save_pretrained(folder)
    return folder


def factors(frozen, clients):
    g = torch.Generator().manual_seed(1)
    return {
        name: 0.3 * torch.randn(clients, *shape, generator=g)
        for name, shape in frozen.adapter_shapes(4).items()
    }


def merged(model, leaves, client):
    """`model` with one client's B A added to its weights."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            A = leaves.get(name.replace(".weight", ".lora_A"))
            if A is not None:
                weight += 2.0 * leaves[name.replace(".weight", ".lora_B")][client] @ A[client]
    return model


def test_decoder_is_transformers_qwen3_for_each_client(tmp_path):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    theirs = Qwen3ForCausalLM(config)
    for name, weight in theirs.named_parameters():
        if name.endswith("norm.weight"):  # ones would hide a norm that is forgotten
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    folder = saved(theirs, tmp_path)
    ours = Decoder(folder, adapted=2, dtype=torch.float32)
    leaves = factors(ours, clients=2)
    B = leaves["model.layers.2.mlp.up_proj.lora_B"].requires_grad_()
    ids, targets = torch.randint(0, 50, (2, 4, 7))

    found = ours.token_losses(ours.below(ids), targets, leaves).view(4, 7)
    found.sum().backward()

    leaves = {name: leaf.detach() for name, leaf in leaves.items()}
    for client in range(2):
        rows = slice(2 * client, 2 * client + 2)
        model = merged(Qwen3ForCausalLM.from_pretrained(folder), leaves, client)
        logits = model(ids[rows]).logits
        wanted = functional.cross_entropy(logits.transpose(1, 2), targets[rows], reduction="none")
        torch.testing.assert_close(found.detach()[rows], wanted.detach(), atol=1e-4, rtol=1e-3)
        wanted.sum().backward()
        weight = model.get_parameter("model.layers.2.mlp.up_proj.weight").grad
        A = leaves["model.layers.2.mlp.up_proj.lora_A"][client]
        # y = (W + 2 B A) x, so the gradient of B is that of W times 2 A'.
        torch.testing.assert_close(B.grad[client], 2 * weight @ A.T, atol=1e-3, rtol=1e-3)


def test_encoder_is_transformers_modernbert_for_each_client(tmp_path):
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=2, global_attn_every_n_layers=1, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    theirs = ModernBertForMaskedLM(config)
    for name, weight in theirs.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    folder = saved(theirs, tmp_path)
    ours = Encoder(folder, adapted=2, dtype=torch.float32)
    leaves = factors(ours, clients=2)
    ids = torch.randint(3, 50, (4, 7))
    mask = torch.arange(7) < torch.tensor([[7], [4], [5], [7]])

    found = ours.states(ours.below(ids, mask), mask, leaves)

    for client in range(2):
        rows = slice(2 * client, 2 * client + 2)
        model = merged(ModernBertForMaskedLM.from_pretrained(folder), leaves, client).model
        wanted = model(ids[rows], attention_mask=mask[rows].long()).last_hidden_state
        kept_ = mask[rows]
        torch.testing.assert_close(found[rows][kept_], wanted[kept_], atol=1e-4, rtol=1e-3)


def test_clients_train_apart_by_adamw():
    task = Bowl()
    fleet = Fleet(task, 3)

    brought = fleet.local_updates(0)

    for client in (0, 5):
        weights = torch.zeros(SIZE, requires_grad=True)
        optimizer = torch.optim.AdamW([weights], lr=0.01, betas=BETAS, weight_decay=0.0)
        for rows in task.asked[:3]:
            optimizer.zero_grad()
            wanted = task.middles[torch.from_numpy(rows[client])].mean(dim=0)
            (weights - wanted).square().mean().backward()
            optimizer.step()
        alone = weights.detach().numpy()
        together = np.concatenate([t.reshape(-1) for t in brought[client].values()])
        np.testing.assert_allclose(together, alone, atol=1e-6)


def test_batches_follow_from_seed_round_and_client_alone():
    task = Bowl()
    first, second, other = Fleet(task, 3), Fleet(task, 3), Fleet(task, 4)
    second.apply(noise(0))  # as another method would have left it

    for fleet in (first, second, other):
        fleet.local_updates(7)

    one, same, different = np.split(np.stack(task.asked), 3)
    assert np.array_equal(one, same)
    assert not np.array_equal(one, different)


def test_uncompressed_is_exact_and_charged_its_tag():
    found = measure(Bowl(), "uncompressed", 0, seed=1, rounds=2)

    assert found.code_bytes == found.bytes == 4 * SIZE + TAG_BYTES
    assert found.cosine == pytest.approx(1.0)
    assert found.nmse == 0.0
    assert found.losses[-1][1] < found.losses[0][1]
    assert kept(found, found.losses) == 1.0


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].ratios == RATIOS])
def test_a_method_with_a_knob_meets_its_budget(method):
    for ratio in (10, 100):
        session, sizes = METHODS[method].make(plan_of(ratio)), []
        for round_ in range(3):
            for client in range(2):
                update = noise(10 * round_ + client, 0.01)
                decoded, data = session.encode(client, round_, update)
                sizes.append(len(data) + TAG_BYTES + session.codec_bytes / 40)
                assert any(tensor.any() for tensor in decoded.values())
            session.end_round(decoded)

        found = 4 * SIZE / np.mean(sizes)
        # QSGD has whole levels only.
        assert 0.9 * ratio <= found <= (3.0 if method == "qsgd" else 1.2) * ratio, (method, found)


@pytest.mark.parametrize(
    ("method", "low", "high"),
    [("int8", 3.5, 4), ("int4", 6, 7.2), ("nf4", 6, 7.2), ("sign", 25, 32), ("powersgd 1", 4, 30)],
)
def test_a_method_without_a_knob_has_its_own_ratio(method, low, high):
    found = measure(Bowl(), method, 0, seed=1, rounds=2)

    assert low <= found.ratio <= high
    assert 0 < found.cosine <= 1


def test_feedback_says_later_what_a_code_left_out():
    session = METHODS["top-k"].make(plan_of(30))
    said, brought = np.zeros(SIZE), np.zeros(SIZE)
    for round_ in range(60):
        update = noise(1, 0.1)
        decoded, _ = session.encode(0, round_, update)
        said += np.concatenate([decoded[n].reshape(-1) for n in SHAPES])
        brought += np.concatenate([update[n].reshape(-1) for n in SHAPES])

    cosine = said @ brought / np.linalg.norm(said) / np.linalg.norm(brought)
    assert cosine > 0.9


def test_a_learned_codecs_file_is_charged_to_every_device():
    session = Learned(plan_of(30))
    session.encode(0, 0, noise(1))
    assert session.codec_bytes == 0

    session.end_round(noise(1))

    assert session.codec_bytes == len(session.codec.to_bytes()) > 0
    assert session.target() == plan_of(30).allowance - session.codec_bytes // 40


def test_the_published_autoencoder_is_charged_its_rounds_and_its_network():
    found = measure(Bowl(), "cg-fedllm", 0, seed=1, rounds=5)

    assert found.codec_bytes > 10**5
    assert found.code_bytes > 0.75 * 4 * SIZE  # four rounds of five whole
    assert found.ratio < 1


def test_bytes_that_say_something_else_are_found(monkeypatch):
    class Liar(Whole):
        def encode(self, client, round_, update):
            return update, super().encode(client, round_, update)[1][:-4] + b"\0\0\0\0"

    monkeypatch.setitem(METHODS, "liar", dataclasses.replace(METHODS["uncompressed"], make=Liar))

    with pytest.raises(MethodError, match="client 0, round 0"):
        measure(Bowl(), "liar", 0, seed=1, rounds=1)


def row(ratio, progress):
    numbers = (ratio, 10.0, progress, 0.5, 0.5, 1.0, 1.0)
    facts = {"losses": [[0, 4.0], [2, 3.0]], "code_bytes": 10, "codec_bytes": 0, "size": 9}
    return numbers, {**facts, "core_s": 1.0}


def test_rows_of_other_settings_are_thrown_away(tmp_path):
    versions = {"top-k": 1, "symbiont": 1}
    path = tmp_path / "codec.csv"

    def open_():
        results = Results(path, lambda unit: str(versions[unit[2]]), {"date": "today"})
        results.load()
        return results

    first = open_()
    first.add(("lm", 1, "top-k", 100), *row(99.0, 0.5))
    first.add(("lm", 1, "symbiont", 100), *row(98.0, 0.75))
    again = open_()
    versions["symbiont"] = 2
    changed = open_()

    assert {u: r.numbers for u, r in again.rows.items()} == {
        u: r.numbers for u, r in first.rows.items()
    }
    assert again.rows["lm", 1, "top-k", 100].value("progress_kept") == 0.5
    assert list(changed.rows) == [("lm", 1, "top-k", 100)]
    assert changed.thrown == 1
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    assert tuple(lines[0]) == COLUMNS
    path.write_text(path.read_text() + "lm,1,x,1,1,1,1,1,1,1\n")
    with pytest.raises(ResultsError, match="cannot be continued"):
        open_()


def test_ours_is_read_off_at_the_peers_bytes():
    points = [(10.0, 1.0), (100.0, 0.9), (1000.0, 0.5)]

    assert tables.at(points, math.sqrt(10 * 100)) == pytest.approx(0.95)
    assert tables.at(points, 4.0) == 1.0
    assert tables.at(points, 1005.0) == 0.5  # budgets are met to within two per cent
    assert tables.at(points, 2000.0) is None


def write(folder, file, rows):
    path = folder / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress("\n".join(map(json.dumps, rows)).encode()))


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    news = [
        {"label": i % 4, "text": " ".join(f"{'wxyz'[i % 4]}{n}" for n in rng.integers(0, 9, 30))}
        for i in range(160)
    ]
    labels = list(TASKS["trec"].labels)
    questions = [{"label": labels[i % 6], "text": f"what is word {i % 6} ?"} for i in range(120)]
    for name, rows in (("agnews", news), ("trec", questions)):
        write(tmp_path, TASKS[name].train, rows)
        write(tmp_path, TASKS[name].test, rows[:60])
    return tmp_path


@pytest.mark.slow
def test_the_whole_benchmark_on_toy_texts(data, tmp_path, monkeypatch, capsys):
    for name in ("lm", "encoder"):
        kind, settings = kinds.KINDS[name]
        small = dataclasses.replace(settings, rows=8, held_out=4, steps=4, tokens=16, lr=3e-3)
        monkeypatch.setitem(kinds.KINDS, name, (kind, small))
    kinds.open_task.cache_clear()
    out = tmp_path / "out" / "codec.csv"
    told = [
        "--data", str(data), "--unverified", "--out", str(out), "--works", "lm,encoder",
        "--methods", "top-k,symbiont", "--ratios", "30", "--seeds", "1", "--rounds", "3",
        "--jobs", "1",
    ]  # fmt: skip

    assert bench_codec.main(told) == 0
    first = out.read_bytes()
    said = capsys.readouterr().out
    assert bench_codec.main([*told, "--report"]) == 0

    assert out.read_bytes() == first
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(r["work"], r["method"]) for r in rows} == {
        (w, m) for w in ("lm", "encoder") for m in ("uncompressed", "top-k", "symbiont")
    }
    assert all(float(r["progress_kept"]) == 1.0 for r in rows if r["method"] == "uncompressed")
    assert "| symbiont |" in said
    assert "6/6" in said
    assert "symbiont</text>" in out.with_suffix(".svg").read_text()
    side = json.loads(out.with_suffix(".json").read_text())
    for r, entry in zip(rows, side["rows"], strict=True):
        if r["method"] == "uncompressed":
            assert entry["losses"][-1][1] < entry["losses"][0][1]


def test_missing_files_are_named(tmp_path, capsys):
    told = ["--data", str(tmp_path / "none"), "--out", str(tmp_path / "x.csv"), "--works", "lm"]

    assert bench_codec.main([*told, "--methods", "top-k", "--jobs", "1"]) == 1

    assert "agnews.train_part.jsonl.xz is missing" in capsys.readouterr().err


def test_the_plot_has_every_method():
    drawn = lines_plot({"lm": {"top-k": [(10, 0.5), (99, 0.2)]}}, ["top-k"], "t")

    assert drawn.startswith("<svg")
    assert "top-k" in drawn
