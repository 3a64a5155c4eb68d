"""A model reading a text that can be taken back: what it expects after each token of a pass.

Knows onnxruntime-genai's generator as an object that somebody hands over. Does not know bundles,
text or how generators are made; imports neither genai nor torch.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import RuntimeFailure

F32 = npt.NDArray[np.float32]


class Rows(Protocol):
    """One text in one model, with its key-value cache."""

    @property
    def length(self) -> int:
        """Tokens read so far."""

    def read(self, ids: Sequence[int]) -> F32:
        """Read `ids`, (T,), after what was read; return the logits after each, (T, vocab).

        Rows that were opened for the last token only may return its row alone, (1, vocab).
        """

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""


class GenaiRows:
    """Rows over a generator of onnxruntime-genai that has read nothing.

    `generate_next_token` is never called: genai 0.18 reads tokens at the wrong place after it.
    """

    def __init__(self, generator: Any, *, every_row: bool = True) -> None:
        self._generator, self._every_row = generator, every_row
        self.length = 0

    def read(self, ids: Sequence[int]) -> F32:
        """See `Rows`.

        Raises:
            RuntimeFailure: genai refuses, or the graph gives logits of the last token only.
        """
        try:
            self._generator.append_tokens(np.asarray([ids], np.int32))
            found: F32 = np.asarray(self._generator.get_output("logits"), np.float32)[0]
        except RuntimeError as exc:
            raise RuntimeFailure(f"the model could not read {len(ids)} tokens: {exc}") from exc
        self.length += len(ids)
        if self._every_row and len(found) != len(ids):
            raise RuntimeFailure(
                f"the graph gives logits for {len(found)} of {len(ids)} tokens; speculative "
                "decoding needs them all: export the model without pruned logits"
            )
        return found

    def rewind(self, length: int) -> None:
        if length < self.length:
            self._generator.rewind_to(length)
            self.length = length
