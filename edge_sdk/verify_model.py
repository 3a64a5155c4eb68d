"""The graph of a speculative bundle that verifies: every row's logits, no slots for adapters.

Knows its file's name. Does not know who guesses.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_sdk.errors import RuntimeFailure
from edge_sdk.genai_model import GenaiModel

VERIFY_FILE = "verify.onnx"


class VerifyModel(GenaiModel):
    """The model of VERIFY_FILE in memory, beside the session's own graph."""

    def __init__(self, folder: Path, *, session_options: Mapping[str, object]) -> None:
        """Load it from the speculative bundle in `folder`.

        Raises:
            RuntimeFailure: it cannot be loaded.
        """
        super().__init__(folder, {}, session_options=session_options)

    def _load(self, wanted: int) -> tuple[int, Any, Any]:
        try:
            model = self._open(VERIFY_FILE)
        except RuntimeFailure as exc:
            raise RuntimeFailure(f"{VERIFY_FILE}: {exc}; export the bundle again") from exc
        return max(wanted, 2), model, self._og.Adapters(model)  # 2: every row, as it is
