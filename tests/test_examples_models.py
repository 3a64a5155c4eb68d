"""The example models load and beat chance; pretraining resumes exactly and refuses other data."""

import hashlib
import json
import lzma
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from examples import models
from examples.data.corpus import VERBALISERS, Corpus, CorpusError, File, Row, Stream, stories
from examples.models.recipes import RECIPES, Recipe
from examples.models.run import Run, open_run
from examples.pretrain import export, train

SENTENCE = "Request: What is the largest city in the United States?\nAnswer: New York City\n"
TINY = {
    "llama": Recipe("tiny", "llama", 32, 1, 1, 32, 320, 64, steps=8, lr=1e-3, length=16),
    "modernbert": Recipe(
        *("tiny", "modernbert", 32, 1, 1, 32, 200, 64),
        steps=8,
        lr=1e-3,
        muon_lr=0.02,
        length=16,
        attention="eager",
    ),
}
TINY["continued"] = replace(
    TINY["llama"], name="tiny", start=replace(TINY["llama"], name="tiny-first"), muon_lr=0.02
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As in examples/pretrain.py: the bits depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def tiny_corpus(tmp_path: Path) -> Corpus:
    """Two files of sixty short texts each, in tmp_path."""
    files = []
    for name in ("red", "blue"):
        rows = [{"text": f"the {name} boat number {n} sails to harbour {n % 7}"} for n in range(60)]
        packed = lzma.compress("\n".join(json.dumps(row) for row in rows).encode())
        (tmp_path / f"{name}.jsonl.xz").write_bytes(packed)
        digest = hashlib.sha256(packed).hexdigest()
        files.append(File(f"{name}.jsonl.xz", digest, f"the {name} texts", "CC0"))
    streams = tuple(Stream(file.path[:-9], file.path, 0.5, stories) for file in files)
    return Corpus(tuple(files), streams)


def load(folder: Path, name: str) -> torch.nn.Module:
    auto = AutoModelForMaskedLM if RECIPES[name].masked else AutoModelForCausalLM
    model: torch.nn.Module = auto.from_pretrained(folder)
    return model.eval()


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def advance(run: Run, until: int | None = None) -> None:
    train(run, until=until, save_every=3, report=lambda step, loss: None)


@pytest.mark.parametrize("name", models.known())
def test_stored_model_beats_chance(name: str, cache: Path) -> None:
    folder = models.materialize(name, cache)
    model, tokenizer = load(folder, name), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(SENTENCE, return_tensors="pt").input_ids  # (1, T)

    if RECIPES[name].masked:
        # Hide one word at a time, as in pretraining.
        places = range(1, ids.shape[1] - 1)
        given = ids.repeat(len(places), 1)
        given[range(len(places)), places] = tokenizer.mask_token_id
        labels = torch.full_like(given, -100)
        labels[range(len(places)), places] = ids[0, 1:-1]
    else:
        given, labels = ids, ids
    with torch.no_grad():
        loss = float(model(input_ids=given, labels=labels).loss)

    assert loss < 0.75 * math.log(len(tokenizer))


@pytest.mark.parametrize("name", models.known())
def test_tokenizer_round_trips_and_tells_labels_apart(name: str, cache: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models.materialize(name, cache))
    lower = RECIPES[name].masked
    text = "a short request" if lower else "Request: naïve\tcafé 日本 {x}\n\nKind: open"

    ids = tokenizer(text, add_special_tokens=False).input_ids
    first = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in VERBALISERS]

    assert tokenizer.decode(ids) == text
    assert len(set(first)) == len(VERBALISERS)
    assert tokenizer.pad_token_id is not None


def test_materialize_reuses_its_folder(cache: Path) -> None:
    first = models.materialize("slm-a", cache)
    written = (first / "model.safetensors").stat().st_mtime_ns

    again = models.materialize("slm-a", cache)

    assert again == first
    assert (again / "model.safetensors").stat().st_mtime_ns == written
    assert not list(cache.glob(".*")), "a draft folder was left behind"


def test_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYMBIONT_CACHE", str(tmp_path / "elsewhere"))

    assert models.materialize("slm-a").parent == tmp_path / "elsewhere"


def test_unknown_model_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(models.ModelError, match=r"'slm-z'; known: .*slm-a"):
        models.materialize("slm-z", tmp_path)


def test_damaged_weights_are_named_with_their_sum(tmp_path: Path) -> None:
    stored = tmp_path / "models" / "slm-a"
    shutil.copytree(Path(models.__file__).parent / "slm-a", stored)
    damaged = bytearray((stored / models.WEIGHTS).read_bytes())
    damaged[1000] ^= 1
    (stored / models.WEIGHTS).write_bytes(damaged)

    with pytest.raises(models.ModelError, match=hashlib.sha256(damaged).hexdigest()):
        models.materialize("slm-a", tmp_path / "cache", models=stored.parent)


def test_stored_rows_are_within_half_a_code(tmp_path: Path) -> None:
    weight = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    weight[3] = 0.0

    models.pack({"layer": weight, "norm": torch.ones(5)}, tmp_path / "packed")
    found = models.unpack((tmp_path / "packed").read_bytes())

    step = weight.abs().amax(dim=1, keepdim=True) / 63
    assert ((found["layer"] - weight).abs() <= step * 0.54).all()  # float16 scales cost the rest
    assert torch.equal(found["norm"], torch.ones(5))


@pytest.mark.parametrize("kind", sorted(TINY))
def test_interrupted_pretraining_resumes_bit_for_bit(
    kind: str, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    recipe = TINY[kind]
    for folder in ("whole", "parts"):
        for earlier in recipe.chain[:-1]:
            advance(open_run(earlier, tiny_corpus, tmp_path, tmp_path / folder))
    whole = open_run(recipe, tiny_corpus, tmp_path, tmp_path / "whole")
    advance(whole)

    advance(open_run(recipe, tiny_corpus, tmp_path, tmp_path / "parts"), until=5)
    resumed = open_run(recipe, tiny_corpus, tmp_path, tmp_path / "parts")
    assert resumed.step == 5
    advance(resumed)

    assert all(torch.equal(weights(whole)[name], value) for name, value in weights(resumed).items())


def test_continuing_run_begins_with_the_finished_weights(
    tiny_corpus: Corpus, tmp_path: Path
) -> None:
    recipe = TINY["continued"]
    assert recipe.start is not None
    first = open_run(recipe.start, tiny_corpus, tmp_path, tmp_path / "work")
    advance(first, until=7)
    with pytest.raises(CorpusError, match=r"step 7 of 8; finish tiny-first before tiny"):
        open_run(recipe, tiny_corpus, tmp_path, tmp_path / "work")

    advance(first)
    second = open_run(recipe, tiny_corpus, tmp_path, tmp_path / "work")

    assert all(torch.equal(weights(first)[name], value) for name, value in weights(second).items())
    assert second.losses == first.losses
    advance(second)
    assert [step for step, _ in second.losses] == [7, 8, 16]


def test_run_may_be_shortened_before_it_decays(tiny_corpus: Corpus, tmp_path: Path) -> None:
    short = replace(TINY["llama"], steps=4)
    direct = open_run(short, tiny_corpus, tmp_path, tmp_path / "direct")
    advance(direct)

    advance(open_run(TINY["llama"], tiny_corpus, tmp_path, tmp_path / "cut"), until=3)
    cut = open_run(short, tiny_corpus, tmp_path, tmp_path / "cut")
    advance(cut)

    assert all(torch.equal(weights(direct)[name], value) for name, value in weights(cut).items())


def test_run_may_not_be_changed_once_it_decays(tiny_corpus: Corpus, tmp_path: Path) -> None:
    advance(open_run(TINY["llama"], tiny_corpus, tmp_path, tmp_path / "work"), until=7)

    with pytest.raises(CorpusError, match="--steps 8"):
        open_run(replace(TINY["llama"], steps=9), tiny_corpus, tmp_path, tmp_path / "work")


def test_altered_corpus_file_is_refused_by_name(tiny_corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "blue.jsonl.xz").write_bytes(b"something else")

    with pytest.raises(CorpusError, match=rf"blue\.jsonl\.xz.*{tiny_corpus.files[1].sha256}"):
        open_run(TINY["llama"], tiny_corpus, tmp_path, tmp_path / "work")


def test_missing_corpus_file_is_named(tiny_corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "red.jsonl.xz").unlink()

    with pytest.raises(CorpusError, match=r"red\.jsonl\.xz is missing .* the red texts"):
        open_run(TINY["llama"], tiny_corpus, tmp_path, tmp_path / "work")


@pytest.mark.parametrize("family", ["llama", "modernbert"])
def test_exported_model_materializes_as_measured(
    family: str, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    run = open_run(TINY[family], tiny_corpus, tmp_path, tmp_path / "work")
    advance(run)

    export(run, tmp_path / "models" / "tiny")
    folder = models.materialize("tiny", tmp_path / "cache", models=tmp_path / "models")
    auto = AutoModelForMaskedLM if family == "modernbert" else AutoModelForCausalLM
    loaded = auto.from_pretrained(folder).state_dict()

    assert all(torch.equal(loaded[name], value) for name, value in weights(run).items())
    assert "| red | 50% | the red texts | CC0 |" in (tmp_path / "models/tiny/README.md").read_text()


def test_private_dolly_clients_are_left_out() -> None:
    from examples.data.corpus import dolly_full, dolly_short

    def row(client: int, text: str) -> Row:
        return {"client10": client, "instruction": text, "context": "", "response": "yes"}

    rows = [row(0, "Name a bird"), row(4, "Name a fish"), row(5, "name a  BIRD"), row(-1, "Sing")]

    assert [text for _, text in dolly_short(rows)] == ["Request: Name a fish\n"]
    assert [text for _, text in dolly_full(rows)] == ["Request: Name a fish\nAnswer: yes\n"]


def test_demo_slices_share_no_text() -> None:
    folder = Path(models.__file__).parent.parent / "data"
    texts = [
        " ".join(json.loads(line)["text"].lower().split())
        for path in sorted(folder.glob("dolly_*.jsonl.xz"))
        for line in lzma.decompress(path.read_bytes()).decode().splitlines()
    ]

    assert len(texts) > 7000
    assert len(texts) == len(set(texts))
