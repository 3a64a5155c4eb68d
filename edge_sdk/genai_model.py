"""One loaded model of onnxruntime-genai, and the adapters beside it.

Knows genai's calls and their dangers. Does not know text: it takes and gives token ids.

- Right-padding uses the id -1: genai masks trailing pad ids, and -1 is no token, so a text that
  really ends in the model's own pad token is not mistaken for padding.
- After `generate_next_token`, genai 0.18 appends further tokens at the wrong place (logits differ
  by several units). `rewind_to` a place before the picked token and appending it again is exact.
- A bundle may hold several graphs over the same weights (exporters/slm.py). The quickest that does
  what was asked is in memory, one at a time: the first adapter, or the first request for every
  row's logits, replaces it; answers already begun keep theirs. Beside the very quickest there may
  be one for requests that read more than they write (exporters/prompt_graph.py).
"""

import json
import platform
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edge_sdk.adapters import AdapterShelf, Slots
from edge_sdk.errors import RuntimeFailure
from edge_sdk.generation import Request
from edge_sdk.labels import F32
from edge_sdk.prompts import READ_TOKENS, Tokens
from edge_sdk.wire.manifest import PROMPT_FILE

_NO_TOKEN = -1
_QUICK, _ADAPTED, _WHOLE = range(3)
_GRAPHS = ("answer.onnx", "answer_adapted.onnx", "model.onnx")
"""The last row's logits; the same with slots for adapters; all rows' logits with slots."""
_QUIETLY = {"session.force_spinning_stop": "1"}
"""So that its threads do not wait busily, for tens of ms, while those of the other graph write: on
two cores that took a third of the speed."""
_MACHINES = ("x86_64", "amd64")
"""Where 8-bit weights read a prompt more quickly. Not ARM, where 4 bits have kernels of their own;
that was not measured."""


class GenaiModel:
    """A model in memory; its methods may be called from several threads."""

    def __init__(
        self,
        folder: Path,
        slots: Slots,
        *,
        session_options: Mapping[str, object],
        reads_apart: bool = True,
    ) -> None:
        """Load the bundle in `folder`; `session_options` are ONNX Runtime's. `reads_apart`: for
        requests that mostly read, load a second graph where there is one and it is quicker.

        Raises:
            RuntimeFailure: it cannot be loaded, or the infer extra is missing.
        """
        self._og = import_genai()
        self._lock = threading.Lock()
        self._folder, self._session_options = folder, session_options
        here = platform.machine().lower() in _MACHINES and (folder / PROMPT_FILE).is_file()
        self._reads_apart = reads_apart and here
        self._reader: Any = None
        self._graph, self._model, adapters = self._load(_QUICK)
        self._shelf = AdapterShelf(adapters, slots)

    def _load(self, wanted: int) -> tuple[int, Any, Any]:
        """The number of the quickest graph that does what `wanted` does, its model and adapters."""
        names = [name for name in _GRAPHS[wanted:-1] if (self._folder / name).is_file()]
        model = self._open(names[0] if names else "")
        return _GRAPHS.index(names[0]) if names else _WHOLE, model, self._og.Adapters(model)

    def _open(self, file: str, *, quietly: bool = False) -> Any:
        """The model of the graph `file`; of the one that genai_config.json names, if empty."""
        options = {**self._session_options, **(_QUIETLY if quietly else {})}
        settings: dict[str, Any] = {"session_options": options}
        if file:
            settings["filename"] = file
        try:
            config = self._og.Config(str(self._folder))
            config.overlay(json.dumps({"model": {"pad_token_id": _NO_TOKEN, "decoder": settings}}))
            return self._og.Model(config)
        except (RuntimeError, TypeError, ValueError) as exc:
            raise RuntimeFailure(f"the bundle {self._folder} cannot be loaded: {exc}") from exc

    def _reading(self) -> Any:
        """The model for requests that mostly read."""
        if self._reader is None and self._reads_apart and self._graph == _QUICK:
            self._reader = self._open(PROMPT_FILE, quietly=True)
        return self._reader or self._model

    def _reach(self, wanted: int) -> None:
        """Have a graph in memory that does what `wanted` does."""
        if self._graph >= wanted:
            return
        self._shelf.leave()
        self._model = self._reader = None  # one at a time in memory, unless answers keep theirs
        try:
            self._put(*self._load(wanted))
        except RuntimeFailure:
            self._put(*self._load(self._graph))
            raise

    def _put(self, graph: int, model: Any, adapters: Any) -> None:
        self._shelf.move(adapters)
        self._graph, self._model = graph, model

    def next_graph(self) -> bool:
        """Go on to the next graph that this bundle may ever open; False if there is none.

        Raises:
            RuntimeFailure: the model is closed, or that graph cannot be loaded.
        """
        with self._lock:
            self._opened()
            before = self._graph
            self._reach(min(before + 1, _WHOLE))
            return self._graph > before

    def close(self) -> None:
        """Free the model; later requests are refused. Closing twice is harmless."""
        with self._lock:
            self._model = self._reader = None
            self._shelf = AdapterShelf(None, {})

    @contextmanager
    def shelf(self, *, loading: bool = False) -> Iterator[AdapterShelf]:
        """The adapters, for one caller at a time; `loading`, who may load one.

        Raises:
            RuntimeFailure: the model is closed.
        """
        with self._lock:
            self._opened()
            if loading:
                self._reach(_ADAPTED)
            yield self._shelf

    def generator(
        self,
        request: Request,
        *,
        limit: int,
        rows: int = 1,
        every_row: bool = False,
        mostly_reads: bool = False,
        **search: Any,
    ) -> Any:
        """Return a generator that has read nothing; `limit` counts prompt and answer.
        `mostly_reads` says that the answer will not be longer than the prompt.

        With `every_row` its output "logits" has those of every token just read, not the last only.

        Raises:
            RuntimeFailure: the model is closed, there is no such adapter, or genai refuses the
                options or the schema.
        """
        search = {**request.search(), **search, "max_length": limit, "batch_size": rows}
        with self._lock:
            self._opened()
            if every_row:
                self._reach(_WHOLE)
            model = self._reading() if mostly_reads else self._model
            try:
                params = self._og.GeneratorParams(model)
                params.set_search_options(**search)
                if request.schema:
                    params.set_guidance("json_schema", request.schema, False)
                generator = self._og.Generator(model, params)
                self._shelf.use(generator, request.adapter or "")
            except (RuntimeError, TypeError) as exc:
                raise RuntimeFailure(f"the model refused the request: {exc}") from exc
        return generator

    def _opened(self) -> Any:
        if self._model is None:
            raise RuntimeFailure("the session is closed; open it again")
        return self._model


def read(generator: Any, rows: Sequence[Tokens]) -> None:
    """Let a generator read its prompts, one in steps, several at once and padded on the right.

    Raises:
        RuntimeFailure: genai refuses.
    """
    width = max(map(len, rows))
    ids = np.full((len(rows), width), _NO_TOKEN, np.int32)  # (B, T)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    step = READ_TOKENS if len(rows) == 1 else width
    try:
        for at in range(0, width, step):
            generator.append_tokens(ids[:, at : at + step])
    except (RuntimeError, TypeError) as exc:
        raise RuntimeFailure(f"the model refused the request: {exc}") from exc


def logits(generator: Any) -> F32:
    """Return what `generator` expects after what it has read, (B, vocab) float32."""
    return np.asarray(generator.get_logits(), np.float32)[:, -1]  # of (B, 1, vocab)


def import_genai() -> Any:
    """Return the package onnxruntime_genai with every report to its maker switched off.

    Raises:
        RuntimeFailure: the infer extra is missing.
    """
    try:
        import onnxruntime
        import onnxruntime_genai
    except ImportError as exc:
        raise RuntimeFailure(
            f"running a model needs the infer extra: pip install 'symbiont[infer]' ({exc})"
        ) from exc
    # The second line of defence: ORT_DISABLE_TELEMETRY is set in edge_sdk/__init__.py, but an
    # application may have loaded the runtime before us.
    onnxruntime.disable_telemetry_events()
    onnxruntime_genai.disable_telemetry_events()
    return onnxruntime_genai
