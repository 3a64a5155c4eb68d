"""Turns a trained BERT-like classifier into an ONNX bundle, 32-bit and int8, equal to torch.

Knows optimum's tasks and dummy inputs, torch's exporter and onnxruntime's dynamic quantizer. Does
not know decoders, adapters or signatures.

The folder has the names that transformers.js and optimum expect: config.json, the tokenizer's
files, onnx/model.onnx and onnx/model_quantized.onnx (int8 weights, 8-bit activations whose range
is found per run), beside symbiont.json.
"""

import hashlib
import inspect
import logging
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from edge_sdk.errors import ExportError
from edge_sdk.wire.manifest import MANIFEST_FILE, ReleaseManifest, encode_manifest
from edge_sdk.wire.messages import TextTask
from exporters.bundle import check_names, file_entries
from exporters.parity import DEFAULT_TEXT, MAX_TOKENS, relative
from exporters.quiet import quiet
from exporters.slm import TOKENIZER_FILES

logger = logging.getLogger(__name__)

TASK = "text-classification"
FLOAT_FILE, INT8_FILE = "onnx/model.onnx", "onnx/model_quantized.onnx"

FLOAT_ERROR_MAX = 0.001
"""Relative logit error of the 32-bit graph; 5e-8 to 1e-6 is usual, more means a wrong graph."""

INT8_ERROR_MAX = 0.10
"""Relative logit error of the int8 graph, whose weights and activations are both rounded."""

AGREEMENT_MIN = 0.95
"""Share of texts on which int8 and torch name the same class."""

Feed = dict[str, npt.NDArray[np.int64]]


def export_encoder(
    model_dir: Path,
    out: Path,
    *,
    family: str,
    release: str,
    task: TextTask | None = None,
    lineage: Mapping[str, str] | None = None,
    text_for_parity: Sequence[str] = (),
) -> ReleaseManifest:
    """Export the classifier in the Hugging Face folder `model_dir` to `out` and return its claims.

    `out` must be absent or empty; it appears only when everything has succeeded.

    Raises:
        ExportError: no such model, no text classifier, or a graph disagrees with torch.
    """
    check_names(family, release)
    model_dir, out = Path(model_dir), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} exists and is not an empty folder; choose another or remove it")
    model, tokenizer = _load(model_dir)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch) / "bundle"
        (folder / "onnx").mkdir(parents=True)
        _export_float(model, tokenizer, folder / FLOAT_FILE)
        _quantize(folder / FLOAT_FILE, folder / INT8_FILE)
        parity = _check(folder, model, tokenizer, list(text_for_parity or DEFAULT_TEXT))
        for name in ("config.json", *TOKENIZER_FILES):
            if (model_dir / name).is_file():
                shutil.copyfile(model_dir / name, folder / name)
        manifest = ReleaseManifest(
            family=family,
            release=release,
            kind="encoder",
            base_model=str(model.config.name_or_path or model_dir.name),
            architecture=type(model).__name__,
            context=int(getattr(model.config, "max_position_embeddings", 0)),
            tokenizer_sha256=hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
            files=file_entries(folder),
            parity=parity,
            lineage=dict(lineage or {}),
            task=task,
        )
        (folder / MANIFEST_FILE).write_bytes(encode_manifest(manifest))
        if out.exists():
            out.rmdir()
        folder.rename(out)
    logger.info("exported encoder %s %s: %s", family, release, parity)
    return manifest


def _load(model_dir: Path) -> tuple[Any, Any]:
    if not (model_dir / "config.json").is_file() or not (model_dir / "tokenizer.json").is_file():
        raise ExportError(
            f"{model_dir} is not a model folder with config.json and tokenizer.json; give the "
            "folder that save_pretrained wrote for model and tokenizer"
        )
    from optimum.exporters.tasks import TasksManager
    from transformers import AutoConfig, AutoTokenizer

    names = AutoConfig.from_pretrained(model_dir, local_files_only=True).architectures or ["none"]
    if not names[0].endswith("ForSequenceClassification"):
        raise ExportError(
            f"{model_dir} holds a {names[0]}, which is no text classifier; supported: "
            "BertForSequenceClassification and its like (DistilBERT, RoBERTa, ELECTRA, MPNet)"
        )
    try:
        model = TasksManager.get_model_from_task(
            TASK, str(model_dir), library_name="transformers", local_files_only=True
        )
    except (OSError, ValueError, KeyError) as exc:
        raise ExportError(f"{model_dir} cannot be loaded as a text classifier: {exc}") from exc
    return model.eval(), AutoTokenizer.from_pretrained(model_dir, local_files_only=True)


def _export_float(model: Any, tokenizer: Any, path: Path) -> None:
    import torch
    from optimum.utils import DummyTextInputGenerator, NormalizedTextConfig

    # Some 30 encoder types keep the names that this normalized configuration reads.
    normal = NormalizedTextConfig(model.config)
    dummies = DummyTextInputGenerator(TASK, normal, batch_size=2, sequence_length=16)
    takes = inspect.signature(model.forward).parameters
    names = [name for name in tokenizer.model_input_names if name in takes]
    inputs = {name: dummies.generate(name) for name in names}
    axes = {
        0: torch.export.Dim("batch_size", min=1, max=1024),
        1: torch.export.Dim("sequence_length", min=2, max=model.config.max_position_embeddings),
    }
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                kwargs=inputs,
                dynamo=True,
                dynamic_shapes=dict.fromkeys(names, axes),
                input_names=names,
                output_names=["logits"],
                verbose=False,
            )
        assert program is not None
        graph = program.model_proto
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as exc:
        reason = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
        raise ExportError(f"torch cannot export {type(model).__name__}: {reason}") from exc
    # The exporter notes stack traces beside every node: half of a small file, and the paths of
    # the machine that exported.
    graph.ClearField("metadata_props")
    graph.graph.ClearField("metadata_props")
    for item in (*graph.graph.node, *graph.graph.value_info, *graph.graph.initializer):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    onnx.save(graph, str(path))


def _quantize(source: Path, target: Path) -> None:
    graph = onnx.load(str(source))
    # The exporter's shapes name intermediate values that the quantizer renames; stale ones make
    # onnxruntime refuse the graph.
    graph.graph.ClearField("value_info")
    with quiet():
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(graph, str(target), weight_type=QuantType.QInt8, per_channel=True)


def _check(folder: Path, model: Any, tokenizer: Any, texts: list[str]) -> dict[str, float]:
    import torch

    longest = min(MAX_TOKENS, model.config.max_position_embeddings)
    batch = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="np")
    takes = inspect.signature(model.forward).parameters
    feed: Feed = {name: value.astype(np.int64) for name, value in batch.items() if name in takes}
    with torch.inference_mode():
        tensors = {name: torch.from_numpy(value) for name, value in feed.items()}
        expected = model(**tensors).logits.float().numpy()  # (texts, classes)
    plain, small = (_run(folder / name, feed) for name in (FLOAT_FILE, INT8_FILE))
    figures = {
        "logit_error": relative(plain, expected),
        "int8_logit_error": relative(small, expected),
        "int8_agreement": float((small.argmax(-1) == expected.argmax(-1)).mean()),
        "texts": float(len(texts)),
    }
    limits = {"logit_error": FLOAT_ERROR_MAX, "int8_logit_error": INT8_ERROR_MAX}
    for name, limit in limits.items():
        if not figures[name] <= limit:
            raise ExportError(
                f"the exported encoder disagrees with torch: {name} {figures[name]:.4f} is over "
                f"{limit}; report this model"
            )
    if figures["int8_agreement"] < AGREEMENT_MIN:
        raise ExportError(
            f"int8 names torch's class on only {figures['int8_agreement']:.1%} of {len(texts)} "
            f"texts (limit {AGREEMENT_MIN:.0%}); train longer or publish onnx/model.onnx"
        )
    return {name: round(value, 8) for name, value in figures.items()}


def _run(path: Path, feed: Feed) -> npt.NDArray[np.float32]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options)
    wanted = {value.name for value in session.get_inputs()}
    logits: npt.NDArray[np.float32] = session.run(
        ["logits"], {name: value for name, value in feed.items() if name in wanted}
    )[0]
    return logits
