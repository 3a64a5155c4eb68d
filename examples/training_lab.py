"""One way of training LoRA, in a process of its own: steps on request, memory at the end.

Knows the ways that examples/bench_training.py compares and how this process's memory is counted.
Does not know tables, rounds or which way is the reference. Weights are random: neither time nor
memory depends on them.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from compression.int4 import WEIGHTS_FILE
from compression.int4_torch import held_bytes, load_slm
from edge_sdk.train.lora import Adapter, LoraSpec, start_factors
from edge_sdk.train.memory import Way, compute_again, needs_of, peak_mb
from edge_sdk.train.text_task import Sequences, token_log_probs
from edge_sdk.train.trainer import optimize

BLOCK = 32
SPEC = LoraSpec(rank=8, alpha=16.0, targets=("q_proj", "v_proj"))
LR = 1e-3

Step = Callable[[], float]

OURS: dict[str, tuple[torch.dtype, Way]] = {
    "ours, 16-bit": (torch.bfloat16, Way()),
    "ours, int4 on the fly": (torch.bfloat16, Way(packed=True)),
    "ours, int4, parts, twice": (torch.bfloat16, Way(packed=True, rows=1, again=True)),
}
PEFT = {"peft, 32-bit": torch.float32, "peft, 16-bit": torch.bfloat16}
NF4 = "bitsandbytes nf4, 16-bit"
INSTALL = {NF4: "pip install bitsandbytes"}


def smol_config() -> LlamaConfig:
    """The shape of a 135 M Llama (SmolLM2's): tied embeddings, 30 layers."""
    return LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def write_bundle(folder: Path, config: Any) -> Path:
    """What the trainer reads of a bundle, with random weights: int4, tied embedding int8.

    Scales have 16 bits, as ONNX Runtime's quantizer makes them of a 16-bit checkpoint: a block's
    largest weight over a power of two.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in LlamaForCausalLM(config).named_parameters()}
    rng, tensors, offset = np.random.default_rng(0), {}, 0
    with open(folder / "model.onnx.data", "wb") as file:

        def put(array: np.ndarray) -> list[int]:
            nonlocal offset
            file.write(array.tobytes())
            offset += array.nbytes
            return [offset - array.nbytes, array.nbytes]

        for name, shape in shapes.items():
            if len(shape) < 2:
                data = put(np.ones(shape, np.float32))
                tensors[name] = {
                    "kind": "dense", "dtype": "float32", "shape": [*shape], "data": data,
                }  # fmt: skip
                continue
            bits, (rows, columns) = 8 if "embed" in name else 4, shape
            # Both dtypes' layers then have outputs of about unit size.
            size = 1 / (columns**0.5 * 2 ** (bits - 1))
            drawn = rng.uniform(0.5 * size, size, (rows, columns // BLOCK))
            scales = torch.from_numpy(drawn).bfloat16().float().numpy()
            tensors[name] = {
                "kind": "blockwise", "bits": bits, "block": BLOCK, "shape": [rows, columns],
                "packed": put(rng.integers(0, 256, (rows, columns * bits // 8), dtype=np.uint8)),
                "scales": [*put(scales), "float32"], "zero_points": None,
            }  # fmt: skip
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = {"kind": "alias", "of": "model.embed_tokens.weight"}
    index = {"format": 1, "data": "model.onnx.data", "tensors": tensors}
    (folder / WEIGHTS_FILE).write_text(json.dumps(index))
    return folder


def missing() -> dict[str, str]:
    """The ways that cannot be tried here, and how to install what they need."""
    from importlib.util import find_spec

    return {} if find_spec("bitsandbytes") else dict(INSTALL)


def serve(way: str, folder: Path, rows: int, tokens: int, threads: int) -> None:
    """Answer each line "step" on standard input with one step's seconds, "end" with the memory."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    import peft  # noqa: F401 - what every way imports is no part of its peak

    if way == NF4:
        import bitsandbytes  # noqa: F401
    baseline = _status("VmRSS")
    step, facts = prepare(way, folder, rows, tokens)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        cpu, wall = time.process_time(), time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"wall": seconds[0], "cpu": seconds[1], "loss": loss}), flush=True)
    print(json.dumps(facts | {"peak_mb": _status("VmHWM") - baseline}), flush=True)


def prepare(way: str, folder: Path, rows: int, tokens: int) -> tuple[Step, dict[str, float]]:
    """A function that takes one step, and what is known of its memory (MiB)."""
    vocab = int(AutoConfig.from_pretrained(folder).vocab_size)
    ids = torch.randint(0, vocab, (rows, tokens), generator=torch.Generator().manual_seed(1))
    if way in OURS:
        return _ours(*OURS[way], folder, ids)
    dtype = PEFT.get(way, torch.bfloat16)
    model = load_slm(folder, dtype=dtype)
    weights = held_bytes(folder, packed=False, dtype=dtype)
    if way == NF4:
        weights = _to_nf4(model)
    return _peft(model, ids), {"weights_mb": weights / 2**20}


def _ours(
    dtype: torch.dtype, way: Way, folder: Path, ids: torch.Tensor
) -> tuple[Step, dict[str, float]]:
    rows, tokens = ids.shape
    adapter = Adapter(load_slm(folder, packed=way.packed, dtype=dtype), SPEC)
    adapter.load(start_factors(adapter.layout, 0))
    if way.again:
        compute_again(adapter.model)
    at_once = way.rows or rows

    def parts() -> Iterator[torch.Tensor]:
        for start in range(0, rows, at_once):
            part = ids[start : start + at_once].tolist()
            found, _ = token_log_probs(adapter.model, Sequences(part, [1] * len(part)))
            yield -found.mean() * (len(part) / rows)

    course = optimize(adapter, parts, steps=10_000, lr=LR)
    needs = needs_of(folder, SPEC, tokens=tokens, dtype=dtype)
    predicted = peak_mb(needs, way, rows=rows, answers=0)  # no token's logits are held
    held = held_bytes(folder, packed=way.packed, dtype=dtype)
    return course.__next__, {"weights_mb": held / 2**20, "predicted_mb": predicted}


def _peft(model: Any, ids: torch.Tensor) -> Step:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=SPEC.rank, lora_alpha=SPEC.alpha, target_modules=list(SPEC.targets))
    model = get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def _to_nf4(model: Any) -> int:
    """Replace the layers' linears by bitsandbytes' 4-bit ones; return the weights' bytes."""
    import bitsandbytes as bnb
    from torch import nn

    for path, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or "lm_head" in path:
            continue
        made = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
        )
        made.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, made.to("cpu"))
    total = 0
    for parameter in set(model.parameters()):
        total += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        total += 0 if state is None else state.absmax.nbytes
    return total


def _status(key: str) -> float:
    """MiB of this process's `key` in /proc/self/status; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {key}")


if __name__ == "__main__":
    # A peer may print while it loads; what the other process reads must be ours alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = answers
    serve(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6]))
