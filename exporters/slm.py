"""Turns a trained decoder SLM into a bundle: an int4 graph with LoRA inputs that agrees with torch.

Knows onnxruntime-genai's model builder and what a bundle folder holds. Does not know signing,
adapters' contents or who trained the model.

The folder loads unchanged in onnxruntime-genai, onnxruntime and transformers' tokenizer and
config loaders: model.onnx with one data file, quicker graphs over the same data (answer.onnx,
answer_adapted.onnx with adapters, and for small models prompt.onnx), genai_config.json,
config.json, the tokenizer's files, weights.json (compression.int4), golden.json and symbiont.json.
"""

import hashlib
import io
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from edge_sdk.errors import ExportError
from edge_sdk.wire.manifest import MANIFEST_FILE, ReleaseManifest, encode_manifest
from edge_sdk.wire.messages import TextTask
from exporters.bundle import check_names, file_entries
from exporters.calibration import round_weights
from exporters.golden import write_golden
from exporters.last_row import keep_last_row
from exporters.lora_inputs import add_lora_inputs
from exporters.parity import (
    ADAPTED_FILE,
    ANSWER_FILE,
    MODEL_FILE,
    ParityLimits,
    check_parity,
)
from exporters.prompt_graph import write_prompt_graph
from exporters.quiet import quiet
from exporters.task_parity import check_task
from exporters.weights_index import layer_linears, write_index

logger = logging.getLogger(__name__)

RANK_MAX = 64
"""Largest adapter rank a release promises to take; the graph itself has no limit."""

ARCHITECTURES = {
    "LlamaForCausalLM": "Llama and SmolLM2",
    "MistralForCausalLM": "Mistral",
    "Qwen2ForCausalLM": "Qwen2 and Qwen2.5",
    "Qwen3ForCausalLM": "Qwen3",
    "SmolLM3ForCausalLM": "SmolLM3",
    "PhiForCausalLM": "Phi-1.5 and Phi-2",
    "GemmaForCausalLM": "Gemma",
    "Gemma2ForCausalLM": "Gemma 2",
}
"""Decoder architectures whose linear layers the builder keeps apart, each tried by a test."""

WIDE_BLOCK, NARROW_BLOCK, WIDE = 64, 32, 256
"""Larger blocks decode faster; they also share one scale among more of the 8-bit activations, and a
model 192 wide then chose another greedy token on 8 % of one text's steps (DECISIONS 89)."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True, slots=True)
class SlmOptions:
    """How the graph is quantized and run.

    `block`: weights that share one scale. None: WIDE_BLOCK, or NARROW_BLOCK for a model narrower
    than WIDE and for one that does not pass its checks with WIDE_BLOCK. `embedding_bits`: 8 or 4
    for the tied embedding and head; small models lose most there, and 8 bits cost them little.
    `accuracy_level`: 4 multiplies with 8-bit activations (fast), 1 with 32-bit ones (exact).
    `threads`: intra-op threads written into genai_config.json; a device may override them when it
    loads the model. `compensate`: round weights for the least change of outputs on text that the
    model itself writes; False: each to the nearest value, which is quicker.
    """

    block: int | None = None
    embedding_bits: int = 8
    accuracy_level: int = 4
    threads: int = 2
    compensate: bool = True


def export_slm(
    model_dir: Path,
    out: Path,
    *,
    family: str,
    release: str,
    task: TextTask | None = None,
    lineage: Mapping[str, str] | None = None,
    text_for_parity: Sequence[str] = (),
    labelled: Sequence[tuple[str, str]] = (),
    options: SlmOptions | None = None,
    limits: ParityLimits | None = None,
) -> ReleaseManifest:
    """Export the Hugging Face folder `model_dir` to the bundle folder `out` and return its claims.

    `out` must be absent or empty; it appears only when everything has succeeded. `text_for_parity`
    is real text on which torch and ONNX Runtime are compared (none: a built-in paragraph).
    `labelled` are (text, label) pairs of `task` on which int4 may lose one point of accuracy
    against the model in 16 bits (none: not measured).

    Raises:
        ExportError: no such model, an unsupported architecture, `out` is taken, the graph
            disagrees with torch, or int4 costs the task too much.
    """
    model_dir, out, options = Path(model_dir), Path(out), options or SlmOptions()
    check_names(family, release)
    config = _read_config(model_dir)
    if labelled and task is None:
        raise ExportError(f"{len(labelled)} labelled texts came without their task; give task=")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} exists and is not an empty folder; choose another or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        blocks = (options.block,) if options.block else _blocks(config)
        for block in blocks:
            folder = Path(scratch) / f"bundle-{block}"
            slots = _make(model_dir, folder, replace(options, block=block))
            try:
                parity = check_parity(folder, text_for_parity, limits=limits).figures()
                if task is not None and labelled:
                    parity |= check_task(model_dir, folder, task, labelled).figures()
                break
            except ExportError as exc:
                if block == blocks[-1]:
                    raise
                logger.info("blocks of %d are too large for this model: %s", block, exc)
        write_golden(folder)
        manifest = ReleaseManifest(
            family=family,
            release=release,
            kind="decoder",
            base_model=str(config.get("_name_or_path") or model_dir.name),
            architecture=config["architectures"][0],
            context=int(config.get("max_position_embeddings", 0)),
            tokenizer_sha256=hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
            files=file_entries(folder),
            adapter_slots=slots,
            rank_max=RANK_MAX,
            parity=parity,
            lineage=dict(lineage or {}),
            task=task,
        )
        (folder / MANIFEST_FILE).write_bytes(encode_manifest(manifest))
        if out.exists():
            out.rmdir()
        folder.rename(out)
    logger.info("exported %s %s: %d slots, %s", family, release, len(slots), parity)
    return manifest


def _blocks(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The sizes to try, the quickest first."""
    narrow = int(config.get("hidden_size", WIDE)) < WIDE
    return (NARROW_BLOCK,) if narrow else (WIDE_BLOCK, NARROW_BLOCK)


def _make(model_dir: Path, folder: Path, options: SlmOptions) -> dict[str, tuple[int, int]]:
    _build(model_dir, folder, options)
    slots = _finish_graph(model_dir, folder, options)
    _copy_texts(model_dir, folder, options.threads)
    return slots


def _read_config(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise ExportError(
            f"{model_dir} is not a model folder: it has no config.json; give the folder that "
            "save_pretrained wrote"
        ) from exc
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as exc:
        raise ExportError(f"{path} cannot be read: {exc}") from exc
    names = config.get("architectures") if isinstance(config, dict) else None
    if not names or names[0] not in ARCHITECTURES:
        supported = ", ".join(f"{k} ({v})" for k, v in ARCHITECTURES.items())
        found = names[0] if names else "none"
        raise ExportError(
            f"{path} names the architecture {found}, which cannot be exported; supported: "
            f"{supported}"
        )
    if not (model_dir / "tokenizer.json").is_file():
        raise ExportError(f"{model_dir} has no tokenizer.json; save the tokenizer beside the model")
    if not any(model_dir.glob("*.safetensors")):
        raise ExportError(f"{model_dir} has no .safetensors file; save the model as safetensors")
    return dict(config)


def _build(model_dir: Path, folder: Path, options: SlmOptions) -> None:
    settings = {
        "fuse_qkv": True,  # fewer, larger products; an adapter still has a slot per projection
        "fuse_mlp_gate_up": True,
        "windowed_kv_cache": False,  # every layer keeps its whole context, as torch does
        "shared_embeddings": _is_tied(model_dir),
        "matmul_mixed_precision": f"last_matmul:int{options.embedding_bits}",
        "block_size": options.block,
        "is_symmetric": True,
        "accuracy_level": options.accuracy_level,
        "hf_token": False,
    }
    cache = str(folder.parent / "cache")
    where = (str(model_dir), str(folder), "int4", "cpu", cache)
    said = io.StringIO()
    try:
        with quiet(said):
            from onnxruntime_genai.models import builder

            pairs = [f"{key}={value}" for key, value in settings.items()]
            extra = builder.parse_extra_options(None, *where, pairs)
            builder.create_model(None, *where, **extra)
    except (NotImplementedError, ValueError, KeyError, AttributeError, TypeError) as exc:
        logger.debug("the builder said: %s", said.getvalue())
        raise ExportError(f"onnxruntime-genai's builder cannot export {model_dir}: {exc}") from exc


def _finish_graph(model_dir: Path, folder: Path, options: SlmOptions) -> dict[str, tuple[int, int]]:
    graph = onnx.load(str(folder / MODEL_FILE), load_external_data=False)
    _mend_shared_embedding(graph)
    parameters, hf_linears = _torch_names(model_dir)
    linears = layer_linears(graph, hf_linears)
    if options.compensate:
        round_weights(folder, graph, linears, model_dir)
    write_prompt_graph(_write_answer_graph(graph, folder / ANSWER_FILE), folder)
    slots = add_lora_inputs(graph, linears)
    _write_answer_graph(graph, folder / ADAPTED_FILE)
    write_index(
        folder, graph, linears, parameters, _Checkpoint(model_dir).read, tied=_is_tied(model_dir)
    )
    onnx.save(graph, str(folder / MODEL_FILE))
    return slots


def _write_answer_graph(graph: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    cut = onnx.ModelProto()
    cut.CopyFrom(graph)
    keep_last_row(cut)
    onnx.save(cut, str(path))
    return cut


def _mend_shared_embedding(graph: onnx.ModelProto) -> None:
    # Builder 0.18 with the default quantizer and an 8-bit head lets the embedding look up the
    # head's weights under the names of another quantizer ("_Q8G32", "_scale"): point it back.
    stored = {tensor.name for tensor in graph.graph.initializer}
    head = next((n for n in graph.graph.node if n.name.startswith("/lm_head/MatMul")), None)
    if head is None or head.op_type != "MatMulNBits":
        return
    for node in graph.graph.node:
        if not node.name.startswith("/model/embed_tokens/"):
            continue
        for i, name in enumerate(node.input):
            if name.startswith("lm_head.MatMul.weight") and name not in stored:
                node.input[i] = head.input[2 if "scale" in name else 1]


def mend_shared_embedding_file(path: Path) -> None:
    """Repair what the builder's own graph file needs before ONNX Runtime can load it."""
    graph = onnx.load(str(path), load_external_data=False)
    _mend_shared_embedding(graph)
    onnx.save(graph, str(path))


def _torch_names(
    model_dir: Path,
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, int]]]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    parameters = {name: tuple(value.shape) for name, value in model.named_parameters()}
    head = model.get_output_embeddings()
    linears = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    return parameters, linears


class _Checkpoint:
    def __init__(self, model_dir: Path) -> None:
        from safetensors import safe_open

        self._files = [
            safe_open(p, framework="pt") for p in sorted(model_dir.glob("*.safetensors"))
        ]
        self._where = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    def read(self, name: str) -> npt.NDArray[np.float32]:
        if name not in self._where:
            raise ExportError(f"the model folder's safetensors files lack the weight {name}")
        value: npt.NDArray[np.float32] = self._where[name].get_tensor(name).float().numpy()
        return value


def _copy_texts(model_dir: Path, folder: Path, threads: int) -> None:
    # transformers' own files, not the builder's rewritten ones, so that every loader sees
    # what the model was trained with.
    for name in ("config.json", *TOKENIZER_FILES):
        if (model_dir / name).is_file():
            shutil.copyfile(model_dir / name, folder / name)
    path = folder / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")


def _is_tied(model_dir: Path) -> bool:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    return bool(getattr(config, "tie_word_embeddings", False))
