"""Tiny random encoders with two kinds of tokenizer, and bundles of them made once per test run."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from edge_sdk.wire.messages import TextTask
from exporters.encoder import export_encoder
from tests.exporters_tiny import save_tiny_tokenizer

WORD_PIECES = Path(__file__).parent.parent / "examples" / "models" / "slm-c"
LABELS = ("open", "list", "name")
TASK = TextTask(
    name="kind",
    prompt="Request: {text}\nKind:",
    generation_prompt="A request ({label}):",
    labels=LABELS,
    words=(" open", " list", " name"),
)
TEXTS = (
    "a boat",
    "the harbour was quiet when the first boat came in",
    "Which river flows north?",
    "x",
    "name three cities",
    "open the door and count the crates on the quay, then write the number on a slate",
)


def save_bert(folder: Path, *, kind: str = "ForSequenceClassification", **changes: Any) -> Path:
    """A seeded BERT with a tokenizer of bytes and no special tokens."""
    import transformers

    settings: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 64,
        "num_labels": 4,
    }
    torch.manual_seed(7)
    config = transformers.BertConfig(**{**settings, **changes})
    _save(getattr(transformers, f"Bert{kind}")(config), folder)
    return save_tiny_tokenizer(folder)


def save_modernbert(
    folder: Path, *, kind: str = "ForSequenceClassification", **changes: Any
) -> Path:
    """A seeded ModernBERT with local and global attention, word pieces and the labels of TASK."""
    import transformers

    settings: dict[str, Any] = {
        "vocab_size": 8192,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 96,
        "max_position_embeddings": 48,
        "global_attn_every_n_layers": 3,
        "local_attention": 8,
        "classifier_pooling": "mean",
        "pad_token_id": 0,
        "cls_token_id": 2,
        "sep_token_id": 3,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "id2label": dict(enumerate(LABELS)),
        "label2id": {label: i for i, label in enumerate(LABELS)},
    }
    torch.manual_seed(7)
    config = transformers.ModernBertConfig(**{**settings, **changes})
    _save(getattr(transformers, f"ModernBert{kind}")(config), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(WORD_PIECES / name, folder / name)
    return folder


def _save(model: Any, folder: Path) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            # Larger than a fresh model's, so that answers differ clearly; norms stay near one.
            size = 0.1 if "norm" in name.lower() else 0.4 if "classifier" in name else 0.08
            value.add_(torch.randn_like(value) * size)
    model.save_pretrained(folder)


def bundle(folder: Path, family: str = "modernbert") -> Path:
    """A copy in `folder` of the bundle tiny/r1 of that family."""
    return Path(shutil.copytree(exported(family), folder / family))


@functools.cache
def exported(family: str) -> Path:
    """The bundle tiny/r1 of "bert" (4 plain labels) or "modernbert" (TASK's); not to be changed."""
    folder = Path(tempfile.mkdtemp(prefix="symbiont-encoder-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    save = {"bert": save_bert, "modernbert": save_modernbert}[family]
    task = TASK if family == "modernbert" else None
    export_encoder(
        save(folder / "hf"),
        folder / "r1",
        family="tiny",
        release="r1",
        task=task,
        text_for_parity=TEXTS,
    )
    return folder / "r1"


def source(family: str) -> Path:
    """The Hugging Face folder that `exported` was made from."""
    return exported(family).parent / "hf"
