"""Size and latency of a branch in the runtime that devices use.

Knows bundles, adapters and onnxruntime-genai. Does not know what a branch is for: its values are
random, for speed does not depend on them.
"""

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compression.eora import as_factors
from examples.models import materialize

Row = dict[str, str]
SPEED_FIELDS = ("model", "rank", "bundle_kb", "branch_kb", "ms_per_token", "times_base")
SEED = 20261121


def speed(name: str, ranks: Sequence[int], *, tokens: int = 48, repeats: int = 7) -> list[Row]:
    """Milliseconds of the quickest generated token without and with a branch, on two threads.

    The quickest of `tokens` * `repeats`, for on a busy machine a mean tells of the others.
    """
    import onnxruntime_genai as og

    from exporters.slm import export_slm

    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle"
        slots = export_slm(materialize(name), bundle, family=name, release="base").adapter_slots
        stored = sum((bundle / part).stat().st_size for part in ("model.onnx", "model.onnx.data"))
        model = og.Model(str(bundle))
        adapters, sizes = og.Adapters(model), {0: 0}
        for rank in ranks:
            path = Path(scratch) / f"{rank}.onnx_adapter"
            _write_branch(path, slots, rank)
            adapters.load(str(path), str(rank))
            sizes[rank] = path.stat().st_size
        best = dict.fromkeys(sizes, math.inf)
        for _ in range(repeats):
            for rank in sizes:  # alternating, so that a busy spell meets all of them
                best[rank] = min(best[rank], _token_ms(og, model, adapters, rank, tokens))
        del adapters, model  # before the mapped files go
    return [
        {
            "model": name,
            "rank": str(rank),
            "bundle_kb": f"{stored / 1000:.0f}",
            "branch_kb": f"{size / 1000:.0f}",
            "ms_per_token": f"{best[rank]:.3f}",
            "times_base": f"{best[rank] / best[0]:.2f}",
        }
        for rank, size in sizes.items()
    ]


def _write_branch(path: Path, slots: Mapping[str, tuple[int, int]], rank: int) -> None:
    from edge_sdk.adapter_file import write_adapter

    rng = np.random.default_rng(SEED)
    pairs = {
        name: (rng.normal(0, 0.01, (rank, width)), rng.normal(0, 0.01, (out, rank)))
        for name, (out, width) in slots.items()
    }
    write_adapter(as_factors(pairs), rank=rank, alpha=rank, slots=slots, path=path)


def _token_ms(og: Any, model: Any, adapters: Any, rank: int, tokens: int) -> float:
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=32 + tokens, min_length=32 + tokens, do_sample=False)
    generator = og.Generator(model, params)
    if rank:
        generator.set_active_adapter(adapters, str(rank))
    generator.append_tokens(np.arange(1, 32, dtype=np.int32))
    generator.generate_next_token()
    seconds = []
    for _ in range(tokens - 1):
        begun = time.perf_counter()
        generator.generate_next_token()
        seconds.append(time.perf_counter() - begun)
    return 1000 * min(seconds)
