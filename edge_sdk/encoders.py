"""One open encoder: texts in, labels or embeddings out, with ONNX Runtime and nothing else.

Knows an encoder bundle's folder and onnxruntime. Does not know where bundles come from, whether
they may be trusted (models.py decides that before), messages, or any network.

A text is read as it is, without a prompt around it; one longer than the context is cut at its end,
its special tokens kept. Texts of similar length are read together. A layer's inputs are rounded to
8 bits on a scale common to the texts read together, so answers differ a little (some 0.01 in a
probability) with the company a text is in.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.bundle_files import BundleFiles, read_manifest
from edge_sdk.encoder_adapters import EncoderAdapters
from edge_sdk.errors import ConfigError, RuntimeFailure
from edge_sdk.labels import F32, LabelAnswers, columns_of, softmax
from edge_sdk.prompts import Tokens, batches, load_tokenizer
from edge_sdk.sessions import ENCODER_GRAPH
from edge_sdk.wire.messages import TextTask

__all__ = ["GRAPH_FILE", "EncoderSession"]

GRAPH_FILE = ENCODER_GRAPH
LOGITS, EMBEDDING = "logits", "sentence_embedding"
BATCH_TOKENS = 2048
"""Padded tokens read at once: activations of some tens of MiB on a 100 M model."""
SPEED_TOKENS, SPEED_RUNS = 64, 3
_WIDTH_MIN = 2  # graphs are traced with two tokens or more
_SLOW = ["SkipLayerNormFusion"]
"""Joins a sum and a norm into an operator that takes five times as long on a CPU (1.31)."""


class EncoderSession(LabelAnswers, EncoderAdapters):
    """An encoder ready to answer; also a context manager.

    Requests from several threads are safe. A refused request leaves the session usable.

    Attributes:
        folder: the bundle's folder, `release` the name of its release ("" if it has none).
        context: most tokens of a text; further ones are not read.
        task: the labelled-text task the bundle was made for, if any.
        labels: the labels of the graph's logits, empty for an encoder without a classifier.
        adapter: path of the adapter in use, or None.
        tokens_per_s: tokens read a second in the last `measure_speed`, 0.0 before.
    """

    def __init__(
        self,
        bundle_dir: Path | str,
        *,
        threads: int = 1,
        task: TextTask | None = None,
        check: bool = True,
    ) -> None:
        """Load the bundle in `bundle_dir`.

        `threads` is ONNX Runtime's intra-op thread count (0: its own choice). `check` compares the
        files with the manifest's hashes first; switch it off where that was done already.

        Raises:
            DigestError: a file is not the one that was exported.
            RuntimeFailure: no encoder bundle there, it cannot be loaded, or the infer extra is
                missing.
        """
        folder = Path(bundle_dir)
        if not (folder / GRAPH_FILE).is_file():
            raise RuntimeFailure(f"{folder} is not an encoder bundle: it has no {GRAPH_FILE}")
        manifest = read_manifest(folder)
        if check:
            BundleFiles(folder, {}, manifest).check()
        config = _config(folder)
        self.folder, self.release = folder, manifest.release if manifest else ""
        self.task = task or (manifest.task if manifest else None)
        self.tokens_per_s = 0.0
        EncoderAdapters.__init__(self, dict(manifest.adapter_slots) if manifest else {})
        try:
            self._session: Any = _open(folder / GRAPH_FILE, threads)
            self._takes = {value.name for value in self._session.get_inputs()}
            outputs = {value.name: value.shape for value in self._session.get_outputs()}
            self.labels = _labels(config, outputs)
            self.context = int(manifest.context if manifest else config["max_position_embeddings"])
            self._tokenizer = load_tokenizer(folder)
            self._tokenizer.enable_truncation(self.context)
        except (ConfigError, ValueError, KeyError, TypeError) as exc:
            raise RuntimeFailure(f"the bundle {folder} cannot be loaded: {exc}") from exc

    def __enter__(self) -> "EncoderSession":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model; later requests are refused. Closing twice is harmless."""
        with self._lock:
            self._session = None
            self._adapters.clear()

    # --- labels and embeddings ------------------------------------------------------------------

    def label_probabilities(self, texts: Sequence[str], task: TextTask | None = None) -> F32:
        """Return each label's probability for each text, (n, labels) float32, rows sum to 1.

        The columns are the task's labels, without a task the model's own. A text too long for the
        context is cut at its end.

        Raises:
            RuntimeFailure: an empty text, no classifier, or one without the task's labels.
        """
        columns = self._columns(task or self.task)
        return softmax(self._run(LOGITS, self._rows(texts))[:, columns])

    def embed(self, texts: Sequence[str]) -> F32:
        """Return each text's embedding, (n, d) float32: the mean over its tokens, at unit length.

        Raises:
            RuntimeFailure: an empty text.
        """
        return self._run(EMBEDDING, self._rows(texts))

    def next_logits(self, ids: Sequence[int]) -> F32:
        """Return what `golden.json` holds for the token ids `ids`: the logits (labels,), or the
        embedding (d,) of an encoder without a classifier.

        Raises:
            RuntimeFailure: no ids, or more than the context holds.
        """
        if not 0 < len(ids) <= self.context:
            raise RuntimeFailure(f"{len(ids)} tokens are outside 1..{self.context}")
        row: F32 = self._run(LOGITS if self.labels else EMBEDDING, [list(ids)])[0]
        return row

    def measure_speed(self) -> float:
        """Return tokens read per second, a text of SPEED_TOKENS tokens at a time."""
        row = [1] * min(SPEED_TOKENS, self.context)
        begun = time.perf_counter()
        for _ in range(SPEED_RUNS):
            self.next_logits(row)
        self.tokens_per_s = SPEED_RUNS * len(row) / max(time.perf_counter() - begun, 1e-9)
        return self.tokens_per_s

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, at most `context`."""
        return list(self._tokenizer.encode(text).ids)

    def count(self, text: str) -> int:
        """Return how many tokens of `text` are read."""
        return len(self.encode(text))

    # --- the one way to the model ---------------------------------------------------------------

    def _rows(self, texts: Sequence[str]) -> list[Tokens]:
        if any(not text.strip() for text in texts):
            raise RuntimeFailure("a text to read is empty")
        rows = [list(row.ids) for row in self._tokenizer.encode_batch(list(texts))]
        if not all(rows):
            raise RuntimeFailure("a text has no tokens this model knows")
        return rows

    def _run(self, output: str, rows: Sequence[Tokens]) -> F32:
        """The output's rows (n, columns) float32, read in batches of similar length."""
        import onnxruntime as ort

        with self._lock:
            session, adapter = self._session, self._in_use()
        if session is None:
            raise RuntimeFailure("the session is closed; open it again")
        options = ort.RunOptions()
        if adapter is not None:
            options.add_active_adapter(adapter)
        found: list[Any] = [None] * len(rows)
        for batch in batches(rows, tokens=BATCH_TOKENS):
            feed = self._feed([rows[i] for i in batch])
            try:
                answers = session.run([output], feed, options)[0]
            except Exception as exc:  # onnxruntime raises its own, unexported classes
                raise RuntimeFailure(f"the model refused the request: {exc}") from exc
            for i, answer in zip(batch, answers, strict=True):
                found[i] = answer
        width = len(self.labels) if output == LOGITS else 0
        return np.stack(found) if found else np.zeros((0, width), np.float32)

    def _feed(self, rows: Sequence[Tokens]) -> dict[str, npt.NDArray[np.int64]]:
        width = max(_WIDTH_MIN, *map(len, rows))
        ids = np.zeros((len(rows), width), np.int64)  # (B, T)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        return {name: value for name, value in feed.items() if name in self._takes}

    def _chosen(self, task: TextTask | None) -> TextTask:
        chosen = task or self.task
        return chosen or TextTask("own", "{text}", "{label}", self.labels, self.labels)

    def _columns(self, task: TextTask | None) -> list[int]:
        if not self.labels:
            raise RuntimeFailure("this encoder has no classifier; it embeds texts")
        return columns_of(task, self.labels) if task else list(range(len(self.labels)))


def _open(path: Path, threads: int) -> Any:
    try:
        import onnxruntime as ort
    except ImportError as exc:
        raise RuntimeFailure(
            f"running a model needs the infer extra: pip install 'symbiont[infer]' ({exc})"
        ) from exc
    # The second line of defence: ORT_DISABLE_TELEMETRY is set in edge_sdk/__init__.py, but an
    # application may have loaded the runtime before us.
    ort.disable_telemetry_events()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=_SLOW
        )
    except Exception as exc:  # onnxruntime raises its own, unexported classes
        raise RuntimeFailure(f"the graph {path} cannot be loaded: {exc}") from exc


def _config(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no table")
    except (OSError, ValueError, RecursionError) as exc:
        raise RuntimeFailure(f"the bundle {folder} cannot be loaded: {path}: {exc}") from exc
    return config


def _labels(config: Mapping[str, Any], outputs: Mapping[str, Sequence[Any]]) -> tuple[str, ...]:
    """The names of the logits' columns, by number; the graph says how many there are."""
    if LOGITS not in outputs:
        return ()
    width = outputs[LOGITS][-1]
    names = config.get("id2label") or {}
    count = width if isinstance(width, int) else len(names)
    return tuple(str(names.get(str(i), f"LABEL_{i}")) for i in range(count))
