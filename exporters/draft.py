"""Makes a bundle speculative: a graph that verifies quickly, a draft model, and genai's settings.

Knows bundle folders and the names of slots in their graphs. Does not know how models were exported
(slm.py) or how a device guesses (edge_sdk/speculation.py).

Beside what the target's bundle holds, the new one has

- verify.onnx: the target's graph with every row's logits and without slots for adapters, over the
  same data file. An empty slot costs two products at each layer, on each verified row.
- draft.onnx and draft.onnx.data: the draft model's quickest graph that gives every row's logits.
- genai_draft.json and genai_ngram.json: what to overlay on genai_config.json (`Config.overlay`) for
  onnxruntime-genai's own draft and n-gram modes. Without them the folder loads as before.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import onnx

from edge_sdk.errors import ExportError
from edge_sdk.wire.manifest import MANIFEST_FILE, ReleaseManifest, encode_manifest
from exporters.bundle import file_entries, read_manifest

WHOLE_FILE, VERIFY_FILE, DRAFT_FILE = "model.onnx", "verify.onnx", "draft.onnx"
DRAFT_SETTINGS, NGRAM_SETTINGS = "genai_draft.json", "genai_ngram.json"
DRAFT_TOKENS = 4
"""What genai guesses at once; ours chooses by its own measurements."""
NGRAM = 3
"""genai looks up the last NGRAM - 1 tokens."""


def add_draft(target: Path, draft: Path | None, out: Path, *, release: str = "") -> ReleaseManifest:
    """Write the bundle `target`, made speculative, to the new folder `out`; return its claims.

    `draft` is a bundle with the same tokenizer.json, or None for guesses from the text itself only.
    `release` is the new release's name, the target's if empty.

    Raises:
        ExportError: not bundles, another tokenizer or a shorter context, or `out` is taken.
    """
    manifest = read_manifest(target)
    if out.exists():
        raise ExportError(f"{out} exists; choose another folder or remove it")
    if draft is not None:
        _check_pair(manifest, read_manifest(draft), draft)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch) / "bundle"
        shutil.copytree(target, folder)
        _save(without_slots(_graph(target / WHOLE_FILE)), folder / VERIFY_FILE)
        ngram = {"ngram_size": NGRAM, "max_draft_tokens": DRAFT_TOKENS}
        _settings(folder / NGRAM_SETTINGS, {}, ngram)
        if draft is not None:
            _add_model(draft, folder)
        named = msgspec.structs.replace(
            manifest, release=release or manifest.release, files=file_entries(folder)
        )
        (folder / MANIFEST_FILE).write_bytes(encode_manifest(named))
        folder.rename(out)
    return named


def without_slots(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return `model` without its LoRA inputs; what it computes with empty ones is the same.

    Source: the names are those of lora_inputs.py.
    """
    graph, producers = model.graph, {}
    for node in graph.node:
        producers.update(dict.fromkeys(node.output, node))
    sums = [node for node in graph.node if node.name.endswith("/lora_add")]
    for node in sums:
        plain = producers[node.input[0]]
        plain.output[list(plain.output).index(node.input[0])] = node.output[0]
    slots = {v.name for v in graph.input if v.name.endswith((".lora_A", ".lora_B"))}
    dead = {node.output[0] for node in sums}
    kept: list[onnx.NodeProto] = []
    gone = set(slots)
    for node in graph.node:
        if node.name.endswith("/lora_add"):
            continue
        if any(name in gone for name in node.input) and not dead & set(node.output):
            gone.update(node.output)
            continue
        kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    for values in (graph.input, graph.initializer):
        rest = [value for value in values if value.name not in slots]
        del values[:]
        values.extend(rest)
    return model


def _add_model(draft: Path, folder: Path) -> None:
    graph = without_slots(_graph(draft / WHOLE_FILE))
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"{DRAFT_FILE}.data"
    _save(graph, folder / DRAFT_FILE)
    shutil.copyfile(draft / f"{WHOLE_FILE}.data", folder / f"{DRAFT_FILE}.data")
    settings = json.loads((draft / "genai_config.json").read_text(encoding="utf-8"))
    decoder = {**settings["model"]["decoder"], "filename": DRAFT_FILE}
    _settings(folder / DRAFT_SETTINGS, {"draft": decoder}, {"max_draft_tokens": DRAFT_TOKENS})


def _settings(path: Path, model: dict[str, Any], speculative: dict[str, int]) -> None:
    overlay = {
        "model": {"decoder": {"filename": VERIFY_FILE}, **model},
        "speculative": speculative,
    }
    path.write_text(json.dumps(overlay, indent=1), encoding="utf-8")


def _check_pair(target: ReleaseManifest, draft: ReleaseManifest, folder: Path) -> None:
    if draft.tokenizer_sha256 != target.tokenizer_sha256:
        raise ExportError(
            f"{folder} has another tokenizer than the target ({draft.tokenizer_sha256[:12]}, not "
            f"{target.tokenizer_sha256[:12]}); a draft model needs the very same tokenizer.json"
        )
    if draft.context < target.context:
        raise ExportError(
            f"the draft model's context is {draft.context} tokens, the target's {target.context}"
        )


def _graph(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(str(path), load_external_data=False)
    except (OSError, ValueError) as exc:
        raise ExportError(f"{path} cannot be read: {exc}; export the model again") from exc


def _save(graph: onnx.ModelProto, path: Path) -> None:
    onnx.save(graph, str(path))
