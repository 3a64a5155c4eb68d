"""What the short examples stand on: a bundle of an example model, and an adapter learned here.

Knows where bundles are kept and the steps of learning. Does not know what anybody uses them for.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from edge_sdk import Example
from edge_sdk.wire.messages import TextTask

RANK, ALPHA = 4, 8.0


def ready(name: str) -> Path:
    """Return the bundle folder of the example model `name`, or $BUNDLE if that is set.

    The first call exports the model into the cache, which takes some seconds and the export extra;
    later ones only look there.
    """
    if chosen := os.environ.get("BUNDLE"):
        return Path(chosen)
    from examples.models import materialize

    model = materialize(name)
    bundle = model.with_name(f"bundle-{model.name}")
    if bundle.is_dir():
        return bundle
    draft = Path(tempfile.mkdtemp(prefix=".bundle-", dir=bundle.parent))
    try:
        _export(model, draft / name, name)
        os.rename(draft / name, bundle)
    except OSError:
        if not bundle.is_dir():  # else another process was faster, with the same files
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return bundle


def _export(model: Path, out: Path, name: str) -> None:
    from exporters.slm import export_slm

    export_slm(model, out, family=name, release="example")


def learn(bundle: Path, task: TextTask, examples: Sequence[Example], path: Path) -> Path:
    """Train an adapter for the int4 weights in `bundle` on `examples`, and write it to `path`."""
    import torch

    from compression.int4_torch import load_slm
    from edge_sdk.adapter_file import write_adapter
    from edge_sdk.train import lora, text_task, trainer
    from exporters.bundle import read_manifest

    torch.manual_seed(0)
    torch.set_num_threads(1)
    spec = lora.LoraSpec(rank=RANK, alpha=ALPHA, targets=("q_proj", "v_proj"))
    adapter = lora.Adapter(load_slm(bundle, dtype=torch.float32), spec)
    reader = text_task.TaskReader.from_folder(task, bundle)
    pairs = [(example.text, example.label) for example in examples]
    found = trainer.train_adapter(adapter, reader, pairs, steps=60, batch=8, lr=0.01, seed=1)
    slots = read_manifest(bundle).adapter_slots
    write_adapter(found.factors, rank=RANK, alpha=ALPHA, slots=slots, path=path)
    return path
