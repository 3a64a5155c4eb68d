"""The adapters of one open encoder: loaded beside it, several at once, one of them answering.

Knows onnxruntime's adapters, which a run is given one by one. Does not know graphs or texts; a
decoder's adapters, which genai keeps in a store of its own, are in adapters.py and adapter_use.py.
"""

import threading
from pathlib import Path
from typing import Any

from edge_sdk.adapters import Slots, check_adapter
from edge_sdk.errors import RuntimeFailure


class EncoderAdapters:
    """Loads adapters of one encoder and remembers which of them answers; safe for several threads.

    Attributes:
        adapter: path of the adapter in use, or None.
    """

    def __init__(self, slots: Slots) -> None:
        self.adapter: Path | None = None
        self._slots = slots
        self._lock = threading.Lock()
        self._adapters: dict[str, tuple[Path, Any]] = {}
        self._adapter = ""

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the loaded adapters."""
        return tuple(self._adapters)

    def load_adapter(self, name: str, path: Path | str) -> None:
        """Load the `.onnx_adapter` file `path` beside those already loaded, to be used by `name`.

        Raises:
            RuntimeFailure: the name is taken, not an adapter file, or an adapter of another base.
        """
        if not name or name in self._adapters:
            raise RuntimeFailure(f"the name {name!r} is empty or taken; unload that adapter first")
        loaded = self._load(Path(path))
        with self._lock:
            self._adapters[name] = (Path(path), loaded)

    def unload_adapter(self, name: str) -> None:
        """Free the adapter `name`.

        Raises:
            RuntimeFailure: not loaded, or in use.
        """
        with self._lock:
            if name not in self._adapters:
                raise RuntimeFailure(f"no adapter {name!r} is loaded; load_adapter loads one")
            if name == self._adapter:
                raise RuntimeFailure(f"adapter {name!r} is in use; set_adapter another one first")
            del self._adapters[name]

    def set_adapter(self, name_or_path: Path | str | None) -> None:
        """Answer with a loaded adapter, or an `.onnx_adapter` file, from now on; None: with none.

        The model is not loaded again.

        Raises:
            RuntimeFailure: not an adapter, or one of another base; the old one stays.
        """
        name = "" if name_or_path is None else str(name_or_path)
        loaded = self._load(Path(name)) if name and name not in self._adapters else None
        with self._lock:
            # One loaded by its path alone goes when another is chosen.
            kept = {n: a for n, a in self._adapters.items() if n == name or str(a[0]) != n}
            if loaded is not None:
                kept[name] = (Path(name), loaded)
            self._adapters, self._adapter = kept, name
            self.adapter = kept[name][0] if name else None

    def _in_use(self) -> Any:
        """The loaded adapter that answers, None for the plain model; the caller holds the lock."""
        found = self._adapters.get(self._adapter)
        return found[1] if found else None

    def _load(self, path: Path) -> Any:
        import onnxruntime as ort

        check_adapter(path, self._slots)
        adapter = ort.LoraAdapter()
        try:
            adapter.Load(str(path))
        except Exception as exc:  # onnxruntime raises its own, unexported classes
            raise RuntimeFailure(f"the adapter {path} cannot be loaded: {exc}") from exc
        return adapter
