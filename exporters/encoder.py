"""Turns a trained encoder into a bundle: a fused int8 graph with LoRA inputs that equals torch.

Knows which Hugging Face folders hold encoders and what their bundle folder holds. Does not know
decoders, adapters' contents or signatures.

The folder loads unchanged in transformers' tokenizer and config loaders, optimum and
transformers.js (dtype q8): config.json, the tokenizer's files, onnx/model_quantized.onnx with its
weights inside, weights.json (compression.int4), golden.json and symbiont.json. A classifier's
graph gives logits, any other encoder's last_hidden_state; both give sentence_embedding.

Layers whose 8-bit inputs lose too much are multiplied in 32 bits, the worst first, until the graph
agrees with torch; their weights stay int8.
"""

import hashlib
import json
import logging
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import ExportError
from edge_sdk.wire.manifest import MANIFEST_FILE, ReleaseManifest, encode_manifest
from edge_sdk.wire.messages import TextTask
from exporters import encoder_parity
from exporters.bundle import check_names, file_entries
from exporters.encoder_graph import GRAPH_FILE, finish, input_names, save, trace
from exporters.encoder_parity import EncoderLimits, Feed
from exporters.parity import DEFAULT_TEXT
from exporters.quiet import quiet
from exporters.slm import RANK_MAX, TOKENIZER_FILES

__all__ = ["GRAPH_FILE", "EncoderLimits", "export_encoder"]

logger = logging.getLogger(__name__)

CLASSIFIER = "ForSequenceClassification"
_PLAIN = ("Model", "ForMaskedLM", "ForPreTraining")
_NEW_TOKENIZER, _OLD_TOKENIZER = '"TokenizersBackend"', '"PreTrainedTokenizerFast"'
"""What transformers 5 writes and 4 does not know (optimum-onnx 0.1 needs 4), and what both read."""
_UNBOUNDED = 10**9  # tokenizers without a limit of their own say 10**30
EXACT_STEP = 0.05
"""Share of the linear layers that each attempt moves to 32 bits."""


@dataclass
class _Encoder:
    """What is being exported: the model as it was trained, and what its graph takes."""

    net: Any
    names: list[str]
    classifies: bool
    context: int
    parameters: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)

    @property
    def labels(self) -> list[str]:
        found = self.net.config.id2label
        return [str(found[i]) for i in range(self.net.config.num_labels)]


def export_encoder(
    model_dir: Path,
    out: Path,
    *,
    family: str,
    release: str,
    task: TextTask | None = None,
    lineage: Mapping[str, str] | None = None,
    text_for_parity: Sequence[str] = (),
    examples: Sequence[tuple[str, str]] = (),
    limits: EncoderLimits | None = None,
) -> ReleaseManifest:
    """Export the encoder in the Hugging Face folder `model_dir` to `out` and return its claims.

    `out` must be absent or empty; it appears only when everything has succeeded. `examples` are
    texts with their labels, on which accuracy is compared with that of the model in 16 bits.

    Raises:
        ExportError: no such model, no encoder, `out` is taken, an example's label is not the
            model's, or the graph disagrees with torch; the message names the worst layer.
    """
    check_names(family, release)
    model_dir, out, limits = Path(model_dir), Path(out), limits or EncoderLimits()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} exists and is not an empty folder; choose another or remove it")
    encoder = _load(model_dir)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch) / "bundle"
        folder.mkdir()
        _copy_texts(model_dir, folder, encoder)
        texts = list(text_for_parity) or [text for text, _ in examples] or list(DEFAULT_TEXT)
        feeds = encoder_parity.tokenize(folder, texts, context=encoder.context)
        rows = [text for text, _ in examples]
        tried = encoder_parity.tokenize(folder, rows, context=encoder.context) if rows else []
        wanted = _columns(encoder, [label for _, label in examples])
        before = _accuracy(_in_16_bits(encoder, tried), wanted) if tried else 0.0
        slots, figures = _build(folder, encoder, feeds, limits)
        if tried:
            figures |= _metric(folder, tried, wanted, before, limits)
        encoder_parity.write_golden(folder, feeds)
        manifest = ReleaseManifest(
            family=family,
            release=release,
            kind="encoder",
            base_model=str(encoder.net.config.name_or_path or model_dir.name),
            architecture=type(encoder.net).__name__,
            context=encoder.context,
            tokenizer_sha256=hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
            files=file_entries(folder),
            adapter_slots=slots,
            rank_max=RANK_MAX,
            parity={name: round(value, encoder_parity.ROUNDED) for name, value in figures.items()},
            lineage=dict(lineage or {}),
            task=task,
        )
        (folder / MANIFEST_FILE).write_bytes(encode_manifest(manifest))
        if out.exists():
            out.rmdir()
        folder.rename(out)
    logger.info("exported encoder %s %s: %s", family, release, manifest.parity)
    return manifest


def _load(model_dir: Path) -> _Encoder:
    if not (model_dir / "config.json").is_file() or not (model_dir / "tokenizer.json").is_file():
        raise ExportError(
            f"{model_dir} is not a model folder with config.json and tokenizer.json; give the "
            "folder that save_pretrained wrote for model and tokenizer"
        )
    import transformers

    config = transformers.AutoConfig.from_pretrained(model_dir, local_files_only=True)
    name = (config.architectures or ["none"])[0]
    classifies = name.endswith(CLASSIFIER)
    if not classifies and not (name.endswith(_PLAIN) and not config.is_decoder):
        raise ExportError(
            f"{model_dir} holds a {name}, which is no encoder; supported: classifiers "
            "(BertForSequenceClassification and its like) and plain encoders (BertModel)"
        )
    kind = transformers.AutoModelForSequenceClassification if classifies else transformers.AutoModel
    try:
        with quiet():
            net = kind.from_pretrained(model_dir, local_files_only=True).eval()
            tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError, KeyError) as exc:
        raise ExportError(f"{model_dir} cannot be loaded as an encoder: {exc}") from exc
    context = int(getattr(config, "max_position_embeddings", 0) or _UNBOUNDED)
    if tokenizer.model_max_length < _UNBOUNDED:  # RoBERTa keeps two positions for itself
        context = min(context, int(tokenizer.model_max_length))
    names = input_names(net, tokenizer)
    parameters = {name: value.detach().float().numpy() for name, value in net.named_parameters()}
    return _Encoder(net, names, classifies, context, parameters)


def _copy_texts(model_dir: Path, folder: Path, encoder: _Encoder) -> None:
    for name in TOKENIZER_FILES:
        if (model_dir / name).is_file():
            shutil.copyfile(model_dir / name, folder / name)
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    # The bundle holds no language-model head that could be tied to the table.
    config |= {"architectures": [type(encoder.net).__name__], "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    path = folder / "tokenizer_config.json"
    named = path.read_text(encoding="utf-8") if path.is_file() else ""
    if _NEW_TOKENIZER in named:
        path.write_text(named.replace(_NEW_TOKENIZER, _OLD_TOKENIZER), encoding="utf-8")


def _build(
    folder: Path, encoder: _Encoder, feeds: Sequence[Feed], limits: EncoderLimits
) -> tuple[dict[str, tuple[int, int]], dict[str, float]]:
    """Write the graph and its index with as few layers in 32 bits as parity asks for."""
    import torch

    from compression.int4_torch import load_slm

    traced = trace(
        encoder.net, encoder.names, classifies=encoder.classifies, context=encoder.context
    )
    exact: list[str] = []
    model: Any = None
    expected: Any = None
    while True:
        graph, slots = finish(traced, exact)
        save(folder, graph, encoder.parameters)
        if model is None:
            model = load_slm(folder, dtype=torch.float32)
            expected = encoder_parity.torch_answers(model, encoder.names, feeds)
        found = encoder_parity.graph_answers(folder, feeds)
        figures = encoder_parity.compare(found, expected, classifies=encoder.classifies)
        if encoder_parity.within(figures, limits):
            break
        errors = encoder_parity.layer_errors(folder, model, encoder.names, feeds[0])
        rest = [name for name in errors if name not in exact]
        step = math.ceil(EXACT_STEP * len(slots))
        if len(exact) + step > limits.exact_share * len(slots) or not rest:
            raise ExportError(_disagreement(figures, limits, errors, len(exact), len(feeds)))
        exact += rest[:step]
    figures |= {"texts": float(len(feeds)), "exact_layers": float(len(exact))}
    return slots, figures


def _disagreement(
    figures: Mapping[str, float],
    limits: EncoderLimits,
    errors: Mapping[str, float],
    exact: int,
    texts: int,
) -> str:
    worst = next(iter(errors), "none")
    shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    return (
        f"the exported encoder disagrees with torch on the same int8 weights over {texts} texts: "
        f"{shown} (limits: error {limits.logit_error}, agreement {limits.agreement:.0%}), with "
        f"{exact} layers in 32 bits; the worst layer is {worst} (adds {errors.get(worst, 0):.4f}); "
        "give more text for parity, or allow more layers in 32 bits (exact_share)"
    )


def _columns(encoder: _Encoder, labels: Sequence[str]) -> npt.NDArray[np.int64]:
    strange = sorted(set(labels) - set(encoder.labels)) if labels else []
    if strange:
        raise ExportError(
            f"the example label {strange[0]!r} is not one of the model's: "
            f"{', '.join(encoder.labels)}"
        )
    return np.asarray([encoder.labels.index(label) for label in labels], np.int64)


def _in_16_bits(encoder: _Encoder, feeds: Sequence[Feed]) -> npt.NDArray[np.float32]:
    import copy

    import torch

    net = copy.deepcopy(encoder.net).to(torch.bfloat16)
    return encoder_parity.torch_answers(net, encoder.names, feeds)


def _accuracy(logits: npt.NDArray[np.float32], wanted: npt.NDArray[np.int64]) -> float:
    return float((logits.argmax(-1) == wanted).mean())


def _metric(
    folder: Path,
    feeds: Sequence[Feed],
    wanted: npt.NDArray[np.int64],
    before: float,
    limits: EncoderLimits,
) -> dict[str, float]:
    after = _accuracy(encoder_parity.graph_answers(folder, feeds), wanted)
    if 100 * (before - after) > limits.metric_points:
        raise ExportError(
            f"int8 takes accuracy from {before:.1%} in 16 bits to {after:.1%} on {len(feeds)} "
            f"examples (limit {limits.metric_points} points); train longer, or give more examples"
        )
    return {"accuracy_16_bit": before, "accuracy": after, "examples": float(len(feeds))}
