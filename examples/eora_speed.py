"""Size and latency of a branch in the runtime that devices use.

Knows bundles, adapters and onnxruntime-genai. Does not know what a branch is for: its values are
random, for speed does not depend on them.
"""

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compression.eora import as_factors
from examples.models import cache_folder, materialize

Row = dict[str, str]
SPEED_FIELDS = ("model", "rank", "bundle_kb", "branch_kb", "ms_per_token", "times_base")
SEED = 20261121


def speed(name: str, ranks: Sequence[int], *, tokens: int = 48, repeats: int = 7) -> list[Row]:
    """Milliseconds per generated token without and with a branch; two threads, best of repeats."""
    import onnxruntime_genai as og

    from exporters.adapter import write_adapter
    from exporters.bundle import read_manifest
    from exporters.slm import export_slm

    folder = materialize(name)
    bundle = cache_folder().parent / "bundles" / folder.name
    if not bundle.is_dir():
        export_slm(folder, bundle, family=name, release="base")
    slots = read_manifest(bundle).adapter_slots
    model = og.Model(str(bundle))
    adapters, rng, sizes = og.Adapters(model), np.random.default_rng(SEED), {0: 0}
    with tempfile.TemporaryDirectory() as scratch:
        for rank in ranks:
            pairs = {
                n: (rng.normal(0, 0.01, (rank, i)), rng.normal(0, 0.01, (o, rank)))
                for n, (o, i) in slots.items()
            }
            path = Path(scratch) / f"{rank}.onnx_adapter"
            write_adapter(as_factors(pairs), rank=rank, alpha=rank, slots=slots, path=path)
            adapters.load(str(path), str(rank))
            sizes[rank] = path.stat().st_size
        best = dict.fromkeys(sizes, math.inf)
        for _ in range(repeats):
            for rank in sizes:  # alternating, so that a busy spell meets all of them
                best[rank] = min(best[rank], _token_ms(og, model, adapters, rank, tokens))
    stored = sum(path.stat().st_size for path in bundle.iterdir())
    return [
        {
            "model": name,
            "rank": str(rank),
            "bundle_kb": f"{stored / 1000:.0f}",
            "branch_kb": f"{sizes[rank] / 1000:.0f}",
            "ms_per_token": f"{best[rank]:.3f}",
            "times_base": f"{best[rank] / best[0]:.2f}",
        }
        for rank in sizes
    ]


def _token_ms(og: Any, model: Any, adapters: Any, rank: int, tokens: int) -> float:
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=32 + tokens, min_length=32 + tokens, do_sample=False)
    generator = og.Generator(model, params)
    if rank:
        generator.set_active_adapter(adapters, str(rank))
    generator.append_tokens(np.arange(1, 32, dtype=np.int32))
    generator.generate_next_token()
    begun = time.perf_counter()
    for _ in range(tokens - 1):
        generator.generate_next_token()
    return 1000 * (time.perf_counter() - begun) / (tokens - 1)
