"""A causal language model of transformers that verifies drafts.

Knows torch and the cache of transformers. Does not know devices, messages or limits (verifier.py).
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from edge_sdk.algorithms.rows import F32, Rows


class TorchTarget:
    """The model in the Hugging Face folder `folder`, in 32 bits on a CPU, in bfloat16 elsewhere.

    Raises:
        OSError: the folder holds no model or no tokenizer.json.
    """

    def __init__(self, folder: Path, *, device: str = "cpu") -> None:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True
        )
        self._model = model.to(device).eval()
        ends = model.config.eos_token_id
        with (folder / "tokenizer.json").open("rb") as file:
            self.tokenizer = hashlib.file_digest(file, "sha256").digest()
        self.vocabulary = int(model.config.vocab_size)
        self.context = int(model.config.max_position_embeddings)
        self.ends = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])

    def rows(self) -> Rows:
        """Return a new text that nothing was read into."""
        return _TorchRows(self._model)


class _TorchRows:
    def __init__(self, model: Any) -> None:
        self._model, self._cache = model, DynamicCache(config=model.config)
        self.length = 0

    def read(self, ids: Sequence[int]) -> F32:
        with torch.inference_mode():
            batch = torch.tensor([list(ids)], device=self._model.device)  # (1, T)
            out = self._model(input_ids=batch, past_key_values=self._cache, use_cache=True)
        self.length += len(ids)
        logits: F32 = out.logits[0].float().cpu().numpy().astype(np.float32, copy=False)
        return logits  # (T, vocab)

    def rewind(self, length: int) -> None:
        if length < self.length:
            self._cache.crop(length - self.length)  # how many to remove, negative
            self.length = length
