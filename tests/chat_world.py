"""One tiny random bundle with room for long answers, and an adapter for it, for tests of use."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edge_sdk.adapter_file import write_adapter
from exporters.slm import SlmOptions, export_slm
from tests.edge_world import TASK
from tests.exporters_tiny import save_tiny

CONTEXT = 4096
"""Tokens, a byte each. Random weights never end an answer, so a full one takes over a second."""


class World(NamedTuple):
    """A bundle folder of family "tiny", release "long", and an adapter file for it."""

    bundle: Path
    adapter: Path


@functools.cache
def world() -> World:
    """The bundle and the adapter, made once per test run."""
    folder = Path(tempfile.mkdtemp(prefix="symbiont-chat-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    save_tiny(folder / "hf", max_position_embeddings=CONTEXT)
    manifest = export_slm(
        folder / "hf",
        folder / "long",
        family="tiny",
        release="long",
        task=TASK,
        options=SlmOptions(accuracy_level=1),
    )
    rng = np.random.default_rng(0)
    factors = {}
    for name, (out_features, in_features) in manifest.adapter_slots.items():
        if name.endswith("q_proj"):
            factors[name + ".lora_A"] = rng.normal(size=(2, in_features)).astype(np.float32)
            factors[name + ".lora_B"] = rng.normal(size=(out_features, 2)).astype(np.float32)
    path = folder / "adapter.onnx_adapter"
    write_adapter(factors, rank=2, alpha=4.0, slots=manifest.adapter_slots, path=path)
    return World(folder / "long", path)


@functools.cache
def encoder() -> Path:
    """The bundle of a tiny random encoder without a classifier, made once per test run."""
    import torch
    from transformers import BertConfig, BertModel

    from exporters.encoder import export_encoder
    from tests.exporters_tiny import save_tiny_tokenizer

    folder = Path(tempfile.mkdtemp(prefix="symbiont-encoder-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder / "hf")
    save_tiny_tokenizer(folder / "hf")
    export_encoder(folder / "hf", folder / "enc", family="reader", release="e1")
    return folder / "enc"
