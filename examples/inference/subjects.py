"""The two models that are timed, and the files each runtime needs of them, made on first use.

Knows Hugging Face folders and each runtime's converter. Does not know how anything is timed.

`llm` is the example model of 12.5 M parameters. `135m` has the shape of SmolLM2-135M and random
weights, which cost the same time as trained ones; its tokenizer is made up of pairs of bytes.
"""

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from examples.models import materialize

MODELS = ("llm", "135m")
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
"""SmolLM2-135M's, but for its longer context.  Source: its config.json."""

_HERE = Path(__file__).resolve().parent


class SubjectError(RuntimeError):
    """A model could not be made or converted; the message ends with what the converter said."""


def weights(model: str, cache: Path) -> Path:
    """The Hugging Face folder of `model`, float32.  Raises: SubjectError for an unknown name."""
    if model == "llm":
        return materialize("llm")
    if model == "135m":
        return _made(cache / "135m-1", _random_weights)
    raise SubjectError(f"unknown model {model!r}; known: {', '.join(MODELS)}")


def files(runtime: str, model: str, cache: Path, python: Path, *, block: int | None = None) -> Path:
    """What `runtime` loads of `model`, converted by `python`'s environment on first use.

    `block`: how many weights share a scale in our own bundles; None: as exported by default.

    Raises:
        SubjectError: the converter failed.
    """
    source = weights(model, cache)
    out = cache / f"{source.name}-{runtime}-{_version(runtime)}"
    if runtime == "symbiont":
        return _made(
            out.with_name(f"{out.name}-{block or 'auto'}"),
            lambda path: _bundle(source, path, block, model == "llm"),
        )
    if runtime == "speculative":
        draft, whole = materialize("slm-a"), files("symbiont", model, cache, python, block=block)
        small = cache / f"{draft.name}-{whole.name}"
        return Path(f"{whole},{_made(small, lambda path: _bundle(draft, path, block, True))}")
    if runtime == "genai":
        return _made(out, lambda path: _plain_genai(source, path))
    if runtime == "llama.cpp":
        script = [str(_HERE / "to_gguf.py"), str(source)]
        return _made(out.with_suffix(".gguf"), lambda path: _run(python, *script, str(path)))
    if runtime == "optimum-onnx":
        return _made(out, lambda path: _run(python, "-c", _EXPORT, str(source), str(path)))
    return source


def size_mb(paths: str) -> float:
    """Bytes on disk in MiB of one or more comma-separated files or folders."""
    total = 0
    for path in map(Path, paths.split(",")):
        parts = path.rglob("*") if path.is_dir() else [path]
        total += sum(part.stat().st_size for part in parts if part.is_file())
    return total / 2**20


def bytes_per_token(bundle: Path) -> int:
    """Bytes of weights that one token of an int4 bundle reads: all matrices, head included."""
    tensors = json.loads((bundle / "weights.json").read_text())["tensors"]
    parts = [
        entry[part][1]
        for entry in tensors.values()
        for part in ("packed", "scales", "zero_points", "data")
        if entry.get(part)
    ]
    return sum(parts)


_EXPORT = (
    "import sys; from optimum.exporters.onnx import main_export; "
    "main_export(sys.argv[1], sys.argv[2], task='text-generation-with-past', do_validation=False)"
)


def _version(runtime: str) -> str:
    """A new converter makes new files."""
    if runtime in ("symbiont", "speculative"):
        parts = sorted((_HERE.parents[1] / "exporters").glob("*.py"))
        text = b"".join(part.read_bytes() for part in parts)
        return hashlib.sha256(text).hexdigest()[:12]
    return "1"


def _made(out: Path, make: Callable[[Path], None]) -> Path:
    if out.exists():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    print(f"making {out.name}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".making-") as scratch:
        draft = Path(scratch) / out.name
        make(draft)
        draft.rename(out)
    return out


def _bundle(source: Path, out: Path, block: int | None, trained: bool) -> None:
    from edge_sdk.errors import ExportError
    from exporters.parity import ParityLimits
    from exporters.slm import SlmOptions, export_slm

    # Random weights have no favourite token, and how they are rounded changes no time.
    limits = None if trained else ParityLimits(greedy_agreement=0.8)
    options = SlmOptions(block=block, compensate=trained)
    try:
        export_slm(source, out, family="bench", release="base", options=options, limits=limits)
    except ExportError as exc:
        raise SubjectError(str(exc)) from exc


def _plain_genai(source: Path, out: Path) -> None:
    """The builder's own graph and fusions with our quantization: int8 tied head, blocks of 32."""
    from exporters.quiet import quiet
    from exporters.slm import mend_shared_embedding_file

    where = (str(source), str(out), "int4", "cpu", str(out.parent / "cache"))
    pairs = (
        "shared_embeddings=true",
        "matmul_mixed_precision=last_matmul:int8",
        "block_size=32",
        "accuracy_level=4",
        "is_symmetric=true",
        "hf_token=false",
    )
    with quiet(io.StringIO()):
        from onnxruntime_genai.models import builder

        extra = builder.parse_extra_options(None, *where, list(pairs))
        builder.create_model(None, *where, **extra)
    mend_shared_embedding_file(out / "model.onnx")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, out / name)


def _random_weights(out: Path) -> None:
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    model.save_pretrained(out)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in letters for b in letters][: SHAPE["vocab_size"] - len(letters) - 1]
    words = ["<|end|>", *letters, *(a + b for a, b in pairs)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=words[0], eos_token=words[0], pad_token=words[0]
    )
    fast.save_pretrained(out)


def _run(python: Path, *arguments: str) -> None:
    done = subprocess.run([str(python), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SubjectError(f"{arguments[0]} failed: {done.stderr.strip()[-800:]}")
