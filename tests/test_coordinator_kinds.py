"""Which models may serve which program, said before anything is exported or asked."""

import json
from pathlib import Path

import msgspec
import pytest
from service_world import settings

from coordinator.config import CoordinatorConfig
from coordinator.kinds import DECODER, ENCODER, check_kinds, kind_of, model_folder, targets_of
from edge_sdk.errors import ConfigError
from edge_sdk.wire.config_rules import parse_toml
from edge_sdk.wire.manifest import ReleaseManifest
from edge_sdk.wire.messages import TextTask

TASK = TextTask(
    name="kind",
    prompt="Request: {text}\nKind:",
    generation_prompt="A request ({label}):",
    labels=("open", "list", "name"),
    words=(" open", " list", " name"),
)
CLASSIFIER = "ModernBertForSequenceClassification"
LAYERS = ("model.layers.0.attn.Wqkv", "model.layers.0.mlp.Wi", "classifier")


def folder_of(path: Path, architecture: str, **changes: object) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": [architecture], **changes}))
    return path


def config(folder: Path, program: str, *, more: str = "") -> CoordinatorConfig:
    text = settings(
        folder, f'name = "{program}"', families=["slm-a", "slm-c"], task=TASK, more=more
    )
    return parse_toml(text, CoordinatorConfig, "test")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder_of(tmp_path / "slm-a", "LlamaForCausalLM")
    folder_of(tmp_path / "slm-c", "ModernBertForMaskedLM")
    folder_of(tmp_path / "llm", "LlamaForCausalLM")
    return tmp_path


def manifest(kind: str, slots: tuple[str, ...]) -> ReleaseManifest:
    return ReleaseManifest(
        family="f",
        release="base",
        kind=kind,  # type: ignore[arg-type]
        base_model="none",
        architecture="none",
        context=8,
        tokenizer_sha256="0" * 64,
        files={},
        adapter_slots=dict.fromkeys(slots, (4, 4)),
    )


def test_a_decoder_and_an_encoder_run_together_where_texts_and_labels_suffice(models: Path) -> None:
    for program in ("fedavg", "crosslm"):
        check_kinds(config(models, program))

    assert kind_of(models / "slm-a") is DECODER
    assert kind_of(models / "slm-c") is ENCODER


def test_an_encoder_cannot_take_part_where_logits_are_asked(models: Path) -> None:
    with pytest.raises(ConfigError, match=r"family 'slm-c' is an encoder.*fedmkt") as found:
        check_kinds(config(models, "fedmkt"))

    assert "set program.name to 'crosslm' or 'fedavg', or leave the family out" in str(found.value)


def test_a_classifier_of_other_labels_is_refused(models: Path) -> None:
    folder = models / "other"
    folder_of(folder, CLASSIFIER, id2label={"0": "open", "1": "list", "2": "shut"})
    found = config(models, "crosslm")
    family = msgspec.structs.replace(found.families[1], path=str(folder))

    with pytest.raises(ConfigError, match="'slm-c' has no label 'name' of task kind"):
        check_kinds(msgspec.structs.replace(found, families=(family,)))


@pytest.mark.parametrize(
    "labels", [{"0": "name", "1": "open", "2": "list"}, {str(i): f"LABEL_{i}" for i in range(3)}]
)
def test_a_classifier_of_the_tasks_labels_or_of_plain_numbers_serves(
    models: Path, labels: dict[str, str]
) -> None:
    folder = folder_of(models / "other", CLASSIFIER, id2label=labels)
    found = config(models, "crosslm")
    family = msgspec.structs.replace(found.families[1], path=str(folder))

    check_kinds(msgspec.structs.replace(found, families=(family,)))

    assert model_folder(models, family, TASK, seed=0) == folder


def test_an_encoder_cannot_be_the_llm(models: Path) -> None:
    found = config(models, "crosslm")
    llm = msgspec.structs.replace(found.llm, path=str(models / "slm-c"))

    with pytest.raises(ConfigError, match="cannot write"):
        check_kinds(msgspec.structs.replace(found, llm=llm))


def test_an_encoders_layers_are_all_adapted_unless_some_are_named(models: Path) -> None:
    found = config(models, "crosslm")
    decoder, encoder = found.families
    base = manifest("encoder", LAYERS)

    assert targets_of(found, encoder, base) == ("Wi", "Wqkv", "classifier")
    named = msgspec.structs.replace(encoder, targets=("classifier",))
    assert targets_of(found, named, base) == ("classifier",)
    assert targets_of(found, decoder, manifest("decoder", ("model.l.0.q_proj",))) == ("q_proj",)


def test_layers_that_a_family_lacks_are_refused_with_those_it_has(models: Path) -> None:
    found = config(models, "crosslm")
    encoder = msgspec.structs.replace(found.families[1], targets=("q_proj",))

    with pytest.raises(ConfigError, match=r"'slm-c' has none of the layers q_proj.*Wi, Wqkv, cl"):
        targets_of(found, encoder, manifest("encoder", LAYERS))
