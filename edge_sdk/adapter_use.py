"""The part of a session that chooses its adapter.

Knows the names on a model's shelf. Does not know what adapters are (adapters.py).
"""

import logging
from pathlib import Path

from edge_sdk.errors import RuntimeFailure
from edge_sdk.genai_model import GenaiModel

logger = logging.getLogger(__name__)


class AdapterUse:
    """Loads adapters of one model and remembers which of them answers."""

    def __init__(self, model: GenaiModel) -> None:
        self._model = model
        self._adapter = ""  # the name, on the shelf, of the one in use
        self._adapter_path: Path | None = None

    @property
    def adapter(self) -> Path | None:
        """The file of the adapter in use, None for the plain model."""
        return self._adapter_path

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the loaded adapters."""
        with self._model.shelf() as shelf:
            return shelf.names

    def load_adapter(self, name: str, path: Path | str) -> None:
        """Load the `.onnx_adapter` file `path` beside those already loaded, to be used by `name`.

        Raises:
            RuntimeFailure: the name is taken, not an adapter file, or an adapter of another base.
        """
        with self._model.shelf(loading=True) as shelf:
            shelf.load(name, Path(path))

    def unload_adapter(self, name: str) -> None:
        """Free the adapter `name`.

        Raises:
            RuntimeFailure: not loaded, or in use by the session or an answer.
        """
        with self._model.shelf() as shelf:
            if name and name == self._adapter:
                raise RuntimeFailure(f"adapter {name!r} is in use; set_adapter another one first")
            shelf.unload(name)

    def set_adapter(self, name_or_path: Path | str | None) -> None:
        """Answer with a loaded adapter, or an `.onnx_adapter` file, from now on; None: with none.

        The model is not loaded again; answers already begun keep their adapter.

        Raises:
            RuntimeFailure: not an adapter, or one of another base; the old one stays.
        """
        with self._model.shelf(loading=name_or_path is not None) as shelf:
            self._adapter = "" if name_or_path is None else shelf.find(name_or_path)
            self._adapter_path = shelf.path(self._adapter)
            shelf.drop_unnamed(keep=self._adapter)
        logger.info("adapter %s in use", self._adapter[:16] or "none")

    def _adapter_of(self, wanted: str | None) -> str:
        """The name of the adapter for a request that asks for `wanted`, None for the session's."""
        with self._model.shelf() as shelf:
            name = self._adapter if wanted is None else wanted
            if name:
                shelf.require(name)
            return name
