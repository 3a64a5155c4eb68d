"""The adapters of one open model: loaded beside it, several at once, each under a name.

Knows `.onnx_adapter` files and the graph's slots. Does not know which request uses which.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_sdk.errors import RuntimeFailure

Slots = Mapping[str, tuple[int, int]]
"""Linear name -> (out, in), as the bundle's manifest has them; empty: unknown."""


class AdapterShelf:
    """Loads, names and unloads adapters; not safe for several threads at once."""

    def __init__(self, adapters: Any, slots: Slots) -> None:
        """`adapters` is genai's own store of one model."""
        self._adapters, self._slots = adapters, slots
        self._paths: dict[str, Path] = {}
        self._unnamed: set[str] = set()

    @property
    def names(self) -> tuple[str, ...]:
        """The names given to loaded adapters, in order of loading."""
        return tuple(name for name in self._paths if name not in self._unnamed)

    def path(self, name: str) -> Path | None:
        """Return the file of a loaded adapter; None for "", the plain model."""
        return self._paths[name] if name else None

    def load(self, name: str, path: Path) -> None:
        """Load `path` as `name`.

        Raises:
            RuntimeFailure: the name is taken, not an adapter file, or an adapter of another base.
        """
        if not name or name in self._paths:
            raise RuntimeFailure(
                f"an adapter is loaded as {name!r} already; unload it first or choose another name"
                if name
                else "an adapter needs a name of a character or more"
            )
        check_adapter(path, self._slots)
        try:
            self._adapters.load(str(path), name)
        except RuntimeError as exc:
            raise RuntimeFailure(f"the adapter {path} cannot be loaded: {exc}") from exc
        self._paths[name] = path

    def leave(self) -> None:
        """Let go of the store, which keeps its graph in memory, before `move`.

        Raises:
            RuntimeFailure: a file has changed or gone; then everything stays where it was.
        """
        for path in self._paths.values():
            check_adapter(path, self._slots)
        self._adapters = None

    def move(self, adapters: Any) -> None:
        """Load every adapter into `adapters`, the store of another graph with the same slots.

        Raises:
            RuntimeFailure: a file has changed or gone since `leave`.
        """
        for name, path in self._paths.items():
            try:
                adapters.load(str(path), name)
            except RuntimeError as exc:
                raise RuntimeFailure(f"the adapter {path} cannot be loaded again: {exc}") from exc
        self._adapters = adapters

    def unload(self, name: str) -> None:
        """Free the adapter `name`.

        Raises:
            RuntimeFailure: no such adapter, or an answer that is being written uses it.
        """
        self.require(name)
        try:
            self._adapters.unload(name)
        except RuntimeError as exc:
            raise RuntimeFailure(
                f"adapter {name!r} is used by an answer or a conversation; close that first"
            ) from exc
        del self._paths[name]
        self._unnamed.discard(name)

    def find(self, name_or_path: Path | str) -> str:
        """Return the name of a loaded adapter, or load the file `name_or_path` unnamed.

        Raises:
            RuntimeFailure: as `load`.
        """
        if isinstance(name_or_path, str) and name_or_path in self._paths:
            return name_or_path
        path = Path(name_or_path)
        if not path.is_file():
            raise RuntimeFailure(
                f"{name_or_path} is not an adapter file, and {self._lacking(str(name_or_path))}"
            )
        name = hashlib.sha256(path.read_bytes()).hexdigest()
        if name not in self._paths:
            self.load(name, path)
            self._unnamed.add(name)
        return name

    def drop_unnamed(self, keep: str) -> None:
        """Free every adapter without a name but `keep`, as far as no answer uses it."""
        for name in self._unnamed - {keep}:
            try:
                self.unload(name)
            except RuntimeFailure:
                continue  # the answer keeps it; the next change of adapter tries again

    def use(self, generator: Any, name: str) -> None:
        """Let `generator` answer with the adapter `name`; "" for the plain model.

        Raises:
            RuntimeError: genai refuses.
        """
        if name:
            generator.set_active_adapter(self._adapters, name)

    def require(self, name: str) -> None:
        """Check that an adapter `name` is loaded.

        Raises:
            RuntimeFailure: there is none; names those there are.
        """
        if name not in self._paths:
            raise RuntimeFailure(self._lacking(name))

    def _lacking(self, name: str) -> str:
        loaded = ", ".join(self.names) or "none"
        return f"no adapter {name!r} is loaded (loaded: {loaded}); load_adapter loads one"


def check_adapter(path: Path, slots: Slots) -> None:
    """Check that a file holds an adapter for a graph: A is (in, r), B is (r, out), for known slots.

    Raises:
        RuntimeFailure: not an adapter file, or names and shapes of another base.
    """
    import onnxruntime

    try:
        values = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
        shapes = {name: list(value.shape()) for name, value in values.items()}
    except Exception as exc:  # onnxruntime raises its own, unexported classes
        raise RuntimeFailure(f"{path} is not an adapter file: {exc}") from exc
    fault = _slot_fault(shapes, slots)
    if fault:
        raise RuntimeFailure(f"{path} is an adapter of another base: {fault}")


def _slot_fault(shapes: Mapping[str, list[int]], slots: Slots) -> str:
    for name, shape in shapes.items():
        slot, _, half = name.rpartition(".")
        if slots and (slot not in slots or half not in ("lora_A", "lora_B")):
            return f"it has no slot {name}"
        if len(shape) != 2:
            return f"{name} has shape {shape}"
        if not slots:
            continue
        out_features, in_features = slots[slot]
        wanted = in_features if half == "lora_A" else out_features
        if (shape[0] if half == "lora_A" else shape[1]) != wanted:
            return f"{name} has shape {shape}, the slot has {out_features} out, {in_features} in"
        other = shapes.get(f"{slot}.{'lora_B' if half == 'lora_A' else 'lora_A'}")
        if other is None or len(other) != 2:
            return f"{slot} lacks one of its two factors"
        if half == "lora_A" and shape[1] != other[0]:
            return f"{slot} has factors of rank {shape[1]} and {other[0]}"
    return ""
