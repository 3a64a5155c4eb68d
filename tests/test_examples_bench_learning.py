"""The learning benchmark: toy corpora end to end, resume, statistics, Rouge-L, honest ablations."""

import csv
import itertools
import json
import lzma
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as bpe
from transformers import LlamaConfig, LlamaForCausalLM

import coordinator.algorithms.crosslm as crosslm_module
from coordinator.llm import Written
from coordinator.synthetic import shuffled_labels
from coordinator.twin import Twin
from edge_sdk.errors import DataError
from edge_sdk.train.text_task import Sequences
from examples import bench_learning
from examples.data.corpus import CorpusError
from examples.learning import lab as lab_module
from examples.learning import work
from examples.learning.answers import rouge_l
from examples.learning.arms import cross
from examples.learning.compare import claims, scores, table
from examples.learning.deal import Sizes, deal, dirichlet
from examples.learning.lab import Knobs, Lab, Models
from examples.learning.plot import dot_plot
from examples.learning.programs import PROGRAMS, arms_of
from examples.learning.results import Results, ResultsError, Row
from examples.learning.statistics import deviation, holm, mean, paired, sign_flip, t_two_sided
from examples.learning.tasks import TASKS, verify

SIGNS = {"0": ("awful", "dull"), "1": ("lovely", "fresh")}
FILLERS = ("the", "film", "was", "a", "long", "old", "story", "about", "two", "people", "again")
SIZES = Sizes(device_rows=24, public=12, measured=16, alpha=0.7)
KNOBS = Knobs(
    batch=4, lr=1e-2, samples=8, tau=0.0, llm_steps=2, llm_batch=4, central_llm_steps=2, rank=2,
    answer_tokens=3,
)  # fmt: skip


def sentences(n, seed):
    """SST-2's form: at least eight words, one of which decides the label."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        label = str(rng.integers(2))
        words = [*rng.choice(FILLERS, size=9), str(rng.choice(SIGNS[label]))]
        rows.append({"text": " ".join(map(str, rng.permutation(words))), "label": int(label)})
    return rows


def instances(n):
    """S-NI's form: two tasks that repeat a word of the input."""
    rule = "Say the last word of the line you are given."
    return [
        {"task": task, "instruction": rule, "input": f"word {i}", "output": f"w{i}"}
        for i, task in enumerate([611, 1098] * (n // 2))
    ]


def write(folder, path, rows):
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(lzma.compress("\n".join(map(json.dumps, rows)).encode()))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    write(folder, TASKS["sst2"].train.path, sentences(300, 1))
    write(folder, TASKS["sst2"].test.path, sentences(60, 2))
    write(folder, TASKS["sni"].train.path, instances(220))
    return folder


def tiny(folder: Path, seed: int) -> Path:
    """A random Llama of two layers over a byte-level BPE of the toy text."""
    tokenizer = Tokenizer(bpe.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["text"] for row in sentences(200, 3)], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=32, max_position_embeddings=128,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("models")
    for name in ("slm", "llm"):
        (home / name).mkdir()
    return Models("slm-a", tiny(home / "slm", 1), tiny(home / "llm", 2))


@pytest.fixture(autouse=True)
def _plain_models(monkeypatch):
    """The toy small model is loaded as it is: the int4 export has tests of its own."""

    def load(folder, *, dtype):
        return LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    monkeypatch.setattr(lab_module, "load_slm", load)
    monkeypatch.setattr(lab_module, "quickest_dtype", lambda: torch.float32)


@pytest.fixture
def bench(data, models, monkeypatch, tmp_path):
    """The command line over toy models and corpora; call it with more arguments."""
    monkeypatch.setattr(bench_learning, "bundle_of", lambda _slm: models.bundle)
    monkeypatch.setattr(bench_learning, "materialize", lambda _name: models.llm)
    monkeypatch.setattr(bench_learning, "Sizes", lambda: SIZES)
    monkeypatch.setattr(
        bench_learning.work, "_task", lambda name, setup: replace(TASKS[name], steps=2)
    )
    out = tmp_path / "learning.csv"
    common = [
        "--data", str(data), "--unverified", "--tasks", "sst2,sni", "--seeds", "1",
        "--out", str(out), "--alpha", "0.7", "--jobs", "1",
    ]  # fmt: skip
    knobs = ["batch=4", "samples=8", "tau=0.0", "llm_steps=2", "llm_batch=4", "rank=2"]
    knobs += ["central_llm_steps=2", "answer_tokens=3"]
    for knob in knobs:
        common += ["--set", knob]

    def run(*more):
        return bench_learning.main([*common, *more]), out

    return run


def test_two_tasks_end_to_end(bench, capsys):
    # given a whole run
    code, out = bench()
    assert code == 0
    whole = out.read_text()
    said = capsys.readouterr().out
    rows = list(csv.DictReader(whole.splitlines()))

    # then the columns are those of the issue, every setting and ablation has rows, and open
    # answers say why the program has none
    assert whole.splitlines()[0] == "program,task,setting,ablation,seed,model,role,metric,value"
    for task in ("sst2", "sni"):
        for arm in arms_of(list(PROGRAMS)):
            unit = [task, arm.program, arm.setting, arm.ablation]
            found = [
                r for r in rows if [r["task"], r["program"], r["setting"], r["ablation"]] == unit
            ]
            assert {r["seed"] for r in found} == {"1"}
            assert {"slm-a", "llm"} == {r["model"] for r in found}
    devices = {r["role"] for r in rows if r["setting"] == "standalone"}
    assert devices == {"device-0", "device-1", "device-2", "device-3", "server"}
    ours = [r for r in rows if r["task"] == "sni" and r["setting"] == "ours"]
    assert {r["program"] for r in ours} == {"crosslm", "fedmkt"}
    assert all(r["value"].startswith(f"not applicable: {r['program']}") for r in ours)
    assert "ours better than" not in said
    assert "crosslm better than standalone, small model, sst2: does not hold" in said
    assert out.with_suffix(".svg").read_text().startswith("<svg")
    side = json.loads(out.with_suffix(".json").read_text())
    assert len(side["units"]) == 2 * len(arms_of(list(PROGRAMS)))
    assert side["configuration"]["weights_sha256"].keys() == {"slm-a", "llm"}


def test_a_killed_run_goes_on_to_the_same_file(bench, capsys, monkeypatch):
    # given a whole run of four units
    part = ("--tasks", "sst2", "--programs", "fedavg")
    code, out = bench(*part)
    assert code == 0
    whole = out.read_text()
    out.unlink()
    out.with_suffix(".json").unlink()

    # when another is cut in its third unit, between the writing of its two files
    writes = []

    def cut(path, text):
        writes.append(path)
        if len(writes) == 6:
            raise KeyboardInterrupt
        path.write_text(text)

    with monkeypatch.context() as patched:
        patched.setattr("examples.learning.results.replace_text", cut)
        with pytest.raises(KeyboardInterrupt):
            bench(*part)
    assert len(json.loads(out.with_suffix(".json").read_text())["units"]) == 2
    capsys.readouterr()

    # then the next run does only what is missing, and the file is the same
    assert bench(*part)[0] == 0
    said = capsys.readouterr().out
    assert "2/2" in said
    assert "/4" not in said
    assert out.read_text() == whole

    # and a third has nothing to do
    assert bench(*part)[0] == 0
    assert "1/" not in capsys.readouterr().out.split("model, per cent")[0]
    assert out.read_text() == whole

    # but another setting does not mix with it
    assert bench(*part, "--alpha", "0.3")[0] == 1
    assert "it differs in sizes" in capsys.readouterr().err
    assert out.read_text() == whole


def lab_of(data, models, seed=1, task="sst2", knobs=KNOBS):
    small = replace(TASKS[task], steps=2)
    sizes = SIZES if task == "sst2" else replace(SIZES, device_rows=20)
    dealt = deal(TASKS[task], data, sizes, seed=seed, verified=False)
    return Lab(small, dealt, models, knobs, seed)


def test_remembered_work_is_the_same_as_work_done_anew(data, models):
    shared = lab_of(data, models)
    arms = {arm.name: arm for arm in arms_of(list(PROGRAMS))}
    for name in ("standalone", "fedavg", "crosslm", "crosslm, labels-shuffled"):
        together = arms[name].measure(shared)
        if name != "fedavg":
            alone = arms[name].measure(lab_of(data, models))
            assert together == alone, name


def test_ablations_permute_and_nothing_else(data, models, monkeypatch):
    seen = {}

    def spy(name, **ablation):
        lab = lab_of(data, models, knobs=replace(KNOBS, rounds=1))
        honest_scores, honest_opinions = [], []
        picked, calibrate = crosslm_module.picked, Twin.calibrate

        def scored(probs, written, task):
            honest_scores.append(picked(probs, written, task))
            return honest_scores[-1]

        def calibrated(self, texts):
            honest_opinions.append(calibrate(self, texts))
            return honest_opinions[-1]

        def update(self, written, feedback, how, *, public, opinions, seed):
            seen[name] = (
                honest_scores[0],
                np.array(feedback),
                honest_opinions[0],
                opinions,
                written,
            )
            return {}

        with monkeypatch.context() as patched:
            patched.setattr(crosslm_module, "picked", scored)
            patched.setattr(Twin, "calibrate", calibrated)
            patched.setattr(lab_module.Llm, "update", update)
            cross(lab, **ablation)

    spy("ours")
    spy("feedback", permute_feedback=True)
    spy("scores", permute_scores=True)
    spy("labels", shuffle_labels=True)

    scored, given, _, opinions, written = seen["ours"]
    np.testing.assert_array_equal(scored, given)
    for name in ("feedback", "scores"):
        honest, feedback, _, _, texts = seen[name]
        assert not np.array_equal(feedback, honest), name
        np.testing.assert_array_equal(np.sort(feedback), np.sort(honest))
        assert texts == written
    rows = {tuple(row) for row in seen["feedback"][3]}
    assert rows == {tuple(row) for row in opinions}
    assert not np.array_equal(seen["feedback"][3], opinions)
    np.testing.assert_array_equal(seen["scores"][3], opinions)
    shuffled = seen["labels"][4]
    assert shuffled.texts == written.texts
    assert shuffled.labels != written.labels
    assert sorted(shuffled.labels) == sorted(written.labels)
    np.testing.assert_array_equal(seen["labels"][1], scored)


def test_shuffled_labels_keep_the_labels_and_the_texts():
    written = Written(list("abcdef"), list("xyxyxy"), Sequences([], []))
    dealt = shuffled_labels(written, np.random.default_rng(0))
    assert dealt.texts == written.texts
    assert sorted(dealt.labels) == sorted(written.labels)


def test_devices_of_public_only_send_nothing_of_their_own(data, models):
    lab = lab_of(data, models)
    fleet = lab.fleet(learns=False)
    start = lab.start
    assert fleet._train("device-0", start, None) is start


def test_dirichlet_deals_every_row_once_and_small_alpha_skews_more():
    groups = {str(y): list(range(y * 200, y * 200 + 200)) for y in range(4)}

    def skew(alpha):
        worst = []
        for seed in range(20):
            rng = np.random.default_rng(seed)
            held = dirichlet(groups, devices=4, each=60, alpha=alpha, rng=rng)
            flat = [row for rows in held for row in rows]
            assert len(flat) == len(set(flat)) == 240
            assert all(len(rows) == 60 for rows in held)
            worst += [max(np.bincount(np.array(rows) // 200, minlength=4)) / 60 for rows in held]
        return float(np.mean(worst))

    assert skew(0.1) > skew(1.0) > skew(100.0)
    assert skew(1000.0) < 0.36
    with pytest.raises(DataError, match="too few for 4 devices of 300"):
        dirichlet(groups, devices=4, each=300, alpha=1.0, rng=np.random.default_rng(0))


def test_every_row_is_dealt_even_when_a_label_runs_out():
    groups = {"rare": [0, 1], "common": list(range(2, 40))}
    held = dirichlet(groups, devices=4, each=10, alpha=0.1, rng=np.random.default_rng(1))
    assert sorted(row for rows in held for row in rows) == list(range(40))


def test_devices_public_and_measured_texts_do_not_meet(data):
    for held_back in (False, True):
        dealt = deal(TASKS["sst2"], data, SIZES, seed=3, held_back=held_back, verified=False)
        private = {text for rows in dealt.devices.values() for text, _ in rows}
        measured = {text for text, _ in dealt.measured}
        assert not private & set(dealt.public)
        assert not private & measured
        assert not set(dealt.public) & measured
        assert len(dealt.public) == SIZES.public
        assert len(dealt.measured) == SIZES.measured
        test = {" ".join(row["text"].split()) for row in sentences(60, 2)}
        assert (measured <= test) != held_back
    again = deal(TASKS["sst2"], data, SIZES, seed=3, held_back=True, verified=False)
    assert again == dealt
    other = deal(TASKS["sst2"], data, SIZES, seed=4, held_back=True, verified=False)
    assert other.devices != dealt.devices


def test_a_missing_and_an_altered_file_are_both_named(data, bench, capsys):
    with pytest.raises(CorpusError) as refusal:
        verify(data, ["sst2", "trec"])
    said = str(refusal.value)
    for path in (TASKS["sst2"].train.path, TASKS["sst2"].test.path):
        assert f"{path} is not the expected one" in said
    for path in (TASKS["trec"].train.path, TASKS["trec"].test.path):
        assert f"{path} is missing" in said

    code, out = bench("--tasks", "trec")
    assert code == 1
    assert "trec.train.jsonl.xz is missing" in capsys.readouterr().err
    assert not out.exists()


def test_own_files_are_refused_by_what_is_wrong_with_them(tmp_path):
    path = TASKS["sst2"].train.path
    write(tmp_path, TASKS["sst2"].test.path, sentences(9, 1))
    write(tmp_path, path, [{"text": " ".join(FILLERS), "label": 7}])
    with pytest.raises(DataError, match="holds the label '7'"):
        deal(TASKS["sst2"], tmp_path, SIZES, seed=1, verified=False)
    other = tmp_path / "other"
    write(other, TASKS["sst2"].test.path, [{"sentence": "no such column"}])
    with pytest.raises(CorpusError, match="lacks the column 'text'"):
        deal(TASKS["sst2"], other, SIZES, seed=1, verified=False)
    third = tmp_path / "third"
    (third / "classification").mkdir(parents=True)
    (third / TASKS["sst2"].test.path).write_bytes(b"not xz")
    with pytest.raises(CorpusError, match="is not xz of JSON lines"):
        deal(TASKS["sst2"], third, SIZES, seed=1, verified=False)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 10])
def test_students_t_agrees_with_its_density_summed_up(degrees):
    log_c = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    log_c -= 0.5 * math.log(degrees * math.pi)
    for t in (0.0, 0.4, 1.3, 2.776, 6.0):
        x = np.linspace(0, t, 200_001)
        density = np.exp(log_c - (degrees + 1) / 2 * np.log1p(x * x / degrees))
        assert t_two_sided(t, degrees) == pytest.approx(1 - 2 * np.trapezoid(density, x), abs=1e-9)
        assert t_two_sided(-t, degrees) == t_two_sided(t, degrees)
    assert t_two_sided(2.7764451, 4) == pytest.approx(0.05, abs=1e-6)  # any table of Student's t


def test_sign_flips_agree_with_brute_force():
    rng = np.random.default_rng(5)
    for n in (1, 2, 5, 7):
        d = rng.normal(0.3, 1, n)
        hits = [
            abs(sum(s * v for s, v in zip(signs, d, strict=True))) >= abs(d.sum()) - 1e-12
            for signs in itertools.product((-1, 1), repeat=n)
        ]
        assert sign_flip(d.tolist()) == pytest.approx(np.mean(hits))
    assert sign_flip([1.0] * 5) == 2 / 32


def test_paired_comparison_and_holm():
    test = paired([0.6, 0.7, 0.8], [0.5, 0.5, 0.5])
    assert test.mean == pytest.approx(0.2)
    assert test.deviation == pytest.approx(0.1)
    assert test.p_t == pytest.approx(t_two_sided(0.2 / (0.1 / math.sqrt(3)), 2))
    assert paired([0.5] * 5, [0.5] * 5).p_t == 1.0
    assert paired([0.5], [0.4]).p_t == 1.0
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert mean([1, 2, 6]) == 3
    assert deviation([1, 2, 6]) == pytest.approx(np.std([1, 2, 6], ddof=1))


def rows_of(setting, values, *, role="shared", ablation="-", program="-", task="trec"):
    return [
        Row((program, task, setting, ablation, seed), "slm-a", role, "accuracy", value)
        for seed, value in enumerate(values, start=1)
    ]


def test_a_claim_holds_only_with_its_test():
    rows = rows_of("ours", [0.6, 0.62, 0.61, 0.63, 0.6], program="crosslm")
    rows += rows_of("fedavg", [0.5, 0.53, 0.5, 0.52, 0.51], program="fedavg")
    for device, shift in (("device-0", -0.1), ("device-1", 0.1)):
        rows += rows_of(
            "standalone", [v + shift for v in (0.6, 0.61, 0.6, 0.64, 0.61)], role=device
        )
    found = scores(rows)
    arms = [("fedavg", ("fedavg", "fedavg", "-")), ("standalone", ("-", "standalone", "-"))]
    better, alike = claims(found, "crosslm", ["trec"], arms)
    assert better.holds
    assert "fedavg, small model, trec: holds (+10.0 points" in better.line()
    assert not alike.holds
    assert "does not hold" in alike.line()
    worse = claims(found, "crosslm", ["trec"], [("ours", ("crosslm", "ours", "-"))])
    assert not any(claim.holds for claim in worse)
    assert "61.2 ± 1.3" in table(found, ["trec"], [("ours", ("crosslm", "ours", "-")), *arms])


def test_rouge_l_of_known_pairs():
    assert rouge_l("police killed the gunman", "police killed the gunman") == 1.0
    # Lin 2004, section 3: LCS of 3 ("police the gunman") and of 2 ("the gunman"), four words each
    assert rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(0.75)
    assert rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(0.5)
    assert rouge_l("a b", "a x b y") == pytest.approx(2 * 2 / 6)
    assert rouge_l("", "word") == 0.0
    assert rouge_l("Word!", "word") == 1.0


def test_results_refuse_what_they_cannot_continue(tmp_path):
    results = Results(tmp_path / "a.csv", {"knobs": 1}, {})
    unit = ("-", "trec", "zero-shot", "-", 1)
    results.add(unit, [Row(unit, "llm", "server", "accuracy", 0.25)], 1.0)
    again = Results(tmp_path / "a.csv", {"knobs": 1}, {})
    again.load()
    assert again.rows == results.rows
    with pytest.raises(ResultsError, match="differs in knobs"):
        Results(tmp_path / "a.csv", {"knobs": 2}, {}).load()
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ResultsError, match="cannot be continued"):
        Results(tmp_path / "a.csv", {"knobs": 1}, {}).load()


def test_the_plot_holds_every_name_and_escapes_it():
    shown = dot_plot({"small": {"t<1": {"a&b": (0.5, 0.1)}}}, ["a&b"], "title")
    assert "a&amp;b" in shown
    assert "t&lt;1" in shown
    assert shown.count("<circle") == 2


def test_a_failed_cell_stops_the_run_with_its_reason(models, tmp_path):
    cell = work.Cell("sst2", 1, (("-", "sst2", "zero-shot", "-", 1),))
    setup = work.Setup(tmp_path, models, SIZES, KNOBS)
    with pytest.raises(work.WorkError, match=r"sst2\.dev\.jsonl\.xz is missing"):
        work.run([cell], setup, jobs=2, store=lambda finished: None)


def test_options_are_refused_by_name(capsys):
    for wrong in (["--tasks", "nope"], ["--programs", "x"], ["--set", "lr"], ["--seeds", "many"]):
        with pytest.raises(SystemExit):
            bench_learning.parse(wrong)
    assert "unknown task 'nope'" in capsys.readouterr().err
    assert bench_learning.parse(["--seeds", "3"]).seeds == [1, 2, 3]
    assert bench_learning.parse(["--seeds", "0,"]).seeds == [0]
    assert bench_learning.parse(["--quick"]).seeds == [1, 2]
