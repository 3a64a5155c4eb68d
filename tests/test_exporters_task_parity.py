"""exporters: a bundle that lost a labelled task against 16 bits is not published."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from edge_sdk.errors import ExportError
from edge_sdk.wire.messages import TextTask
from exporters.slm import SlmOptions, export_slm
from exporters.task_parity import check_task
from tests.exporters_tiny import save_tiny

TASK = TextTask("vowels", "T: {text}\nA:", "A {label}:", ("yes", "no"), (" y", " n"))
LONG = TextTask("ends", "T: {text}\nA:", "A {label}:", ("up", "down"), (" up", " us"))
TEXTS = ("the harbour", "a slate", "three crates", "fog", "lights to the north", "no village")
OPTIONS = SlmOptions(accuracy_level=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("task") / "hf")


@pytest.fixture(scope="module")
def bundle(source: Path) -> Path:
    out = source.parent / "out"
    export_slm(source, out, family="t", release="r", task=TASK, options=OPTIONS)
    return out


def _labels(source: Path, task: TextTask) -> list[tuple[str, str]]:
    """TEXTS with the labels that the model itself gives them in 16 bits."""
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    pairs = []
    for text in TEXTS:
        scores = []
        for word in task.words:
            prompt = tokenizer(task.prompt.replace("{text}", text))["input_ids"]
            tail = tokenizer(word, add_special_tokens=False)["input_ids"]
            with torch.inference_mode():
                logs = model(torch.tensor([prompt + tail])).logits[0].float().log_softmax(-1)
            scores.append(sum(float(logs[len(prompt) + i - 1, t]) for i, t in enumerate(tail)))
        pairs.append((text, task.labels[scores.index(max(scores))]))
    return pairs


@pytest.mark.parametrize("task", [TASK, LONG], ids=lambda task: task.name)
def test_16_bits_agree_with_labels_of_its_own(source: Path, bundle: Path, task: TextTask) -> None:
    found = check_task(source, bundle, task, _labels(source, task), points=100)

    assert found.accuracy_16bit == 1.0
    assert 0.0 <= found.accuracy <= 1.0


def test_a_lost_task_stops_and_names_the_damaged_layer(source: Path, tmp_path: Path) -> None:
    """int4 of another model: the labels no longer fit, and the layer that differs is named."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        head = model.get_submodule("model.layers.1.mlp.down_proj")
        head.weight.copy_(torch.randn_like(head.weight))
    other = tmp_path / "hf"
    model.save_pretrained(other)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(other)
    export_slm(other, tmp_path / "out", family="t", release="r", options=OPTIONS)

    with pytest.raises(ExportError, match=r"worst layer is model\.layers\.1\.mlp\.down_proj"):
        check_task(source, tmp_path / "out", TASK, _labels(source, TASK), points=0)


def test_the_manifest_has_both_accuracies(source: Path, bundle: Path, tmp_path: Path) -> None:
    pairs = [(t, y) for t, y in _labels(source, TASK) if _right(source, bundle, t, y)]

    manifest = export_slm(
        source,
        tmp_path / "out",
        family="t",
        release="r",
        task=TASK,
        labelled=pairs,
        options=OPTIONS,
    )

    assert pairs
    assert manifest.parity["task_accuracy"] == manifest.parity["task_accuracy_16bit"] == 1.0
    written = json.loads((tmp_path / "out" / "symbiont.json").read_text())
    assert written["parity"]["task_accuracy"] == 1.0


def _right(source: Path, bundle: Path, text: str, label: str) -> bool:
    return check_task(source, bundle, TASK, [(text, label)], points=100).accuracy == 1.0


def test_labels_need_their_task_and_must_be_of_it(source: Path, bundle: Path) -> None:
    with pytest.raises(ExportError, match="without their task"):
        export_slm(source, bundle / "x", family="t", release="r", labelled=[("a", "yes")])
    with pytest.raises(ExportError, match=r"'perhaps' is no label of task vowels"):
        check_task(source, bundle, TASK, [("a", "perhaps")])
    with pytest.raises(ExportError, match="without labelled text"):
        check_task(source, bundle, TASK, [])
