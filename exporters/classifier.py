"""Gives an encoder that has only read text a classifier for a task's labels.

Knows transformers' folders and which weights are new in them. Does not know ONNX or training: the
new layer is random, and it is the devices' adapters that teach it.
"""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from edge_sdk.errors import ExportError

CLASSIFIER = "ForSequenceClassification"
_READERS = ("ForMaskedLM", "ForPreTraining", "BertModel")
_UNNAMED = {"0": "LABEL_0", "1": "LABEL_1"}  # transformers leaves these out of a config.json


def _architecture(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""  # whoever opens the folder says what is wrong with it
    names = config.get("architectures") if isinstance(config, dict) else None
    return str(names[0]) if isinstance(names, list) and names else ""


def is_encoder(folder: Path) -> bool:
    """Whether the Hugging Face folder holds an encoder, by its own config.json."""
    return _architecture(folder).endswith((CLASSIFIER, *_READERS))


def has_classifier(folder: Path) -> bool:
    """Whether the Hugging Face folder holds a model with a classifier, by its own config.json."""
    return _architecture(folder).endswith(CLASSIFIER)


def labels_of(folder: Path) -> set[str]:
    """The labels that the folder's config.json names; transformers' two where it names none."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return set((config.get("id2label") or _UNNAMED).values())


def add_classifier(model_dir: Path, out: Path, *, labels: Sequence[str], seed: int) -> Path:
    """Write to `out` the encoder in `model_dir` with a new classifier of `labels`; return `out`.

    The new layer's weights follow from `seed`. `out` must be absent; it appears only when whole.

    Raises:
        ExportError: the folder cannot be loaded, or transformers has no classifier for its kind.
    """
    import torch
    import transformers

    from exporters.quiet import quiet
    from exporters.slm import TOKENIZER_FILES

    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = transformers.AutoModelForSequenceClassification.from_pretrained(
                model_dir,
                local_files_only=True,
                num_labels=len(labels),
                id2label=dict(enumerate(labels)),
                label2id={label: i for i, label in enumerate(labels)},
            )
    except (OSError, ValueError, KeyError) as exc:
        raise ExportError(f"{model_dir} cannot be given a classifier: {exc}") from exc
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        made = Path(scratch) / "model"
        model.save_pretrained(made)
        for name in TOKENIZER_FILES:
            if (model_dir / name).is_file():
                shutil.copyfile(model_dir / name, made / name)
        made.rename(out)
    return out
