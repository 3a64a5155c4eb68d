"""One open model: text in, text or labels out, with ONNX Runtime and nothing else.

Knows a bundle folder and onnxruntime-genai. Does not know where bundles come from, whether they may
be trusted (models.py decides that before), messages, or any network.

A prompt is read by the `tokenizers` library, the one that training uses, so that both see the same
tokens. Right-padding uses the id -1: genai masks trailing pad ids, and -1 is no token, so a text
that really ends in the model's own pad token is not mistaken for padding.
"""

import hashlib
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import ConfigError, FleetError, RuntimeFailure
from edge_sdk.prompts import TaskPrompts, Tokens, batches, load_tokenizer
from edge_sdk.wire.manifest import MANIFEST_FILE, ReleaseManifest, decode_manifest
from edge_sdk.wire.messages import TextTask

logger = logging.getLogger(__name__)

F32 = npt.NDArray[np.float32]

BATCH_TOKENS = 1024
"""Padded tokens per classification batch: bounds the attention cache, which is reserved at once."""
SPEED_TOKENS = 32
"""Tokens generated to measure speed: a tenth of a second on a 10 M model."""
_NO_TOKEN = -1


class SlmSession:
    """A small language model ready to answer; also a context manager.

    Requests from several threads are safe. A refused request leaves the session usable.

    Attributes:
        context: most tokens of prompt and answer together.
        task: the labelled-text task the bundle was made for, if any.
        adapter: path of the adapter in use, or None.
        tokens_per_s: speed of the last generation of at least two tokens, 0.0 before.
    """

    def __init__(
        self,
        bundle_dir: Path | str,
        *,
        threads: int = 1,
        max_tokens: int = 64,
        task: TextTask | None = None,
        session_options: Mapping[str, object] | None = None,
    ) -> None:
        """Load the bundle in `bundle_dir`.

        `threads` is ONNX Runtime's intra-op thread count (0: its own choice). `session_options` are
        passed to it as they are, e.g. `{"enable_cpu_mem_arena": False}`.

        Raises:
            RuntimeFailure: no bundle there, it cannot be loaded, or the infer extra is missing.
        """
        folder = Path(bundle_dir)
        if not (folder / "genai_config.json").is_file():
            raise RuntimeFailure(f"{folder} is not a model bundle: it has no genai_config.json")
        self._og = _genai()
        self._lock = threading.Lock()
        options: dict[str, object] = {"intra_op_num_threads": threads} if threads else {}
        options |= dict(session_options or {})
        try:
            config = self._og.Config(str(folder))
            config.overlay(_overlay(options))
            self._model: Any = self._og.Model(config)
            self._adapters: Any = self._og.Adapters(self._model)
            self._tokenizer = load_tokenizer(folder)
            self._settings = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
            self.context = int(self._settings["model"]["context_length"])
        except (RuntimeError, ConfigError, ValueError, KeyError, OSError) as exc:
            raise RuntimeFailure(f"the bundle {folder} cannot be loaded: {exc}") from exc
        manifest = _manifest(folder)
        self.folder = folder
        self.release = manifest.release if manifest else ""
        self.task = task or (manifest.task if manifest else None)
        self.adapter: Path | None = None
        self.tokens_per_s = 0.0
        self._slots = dict(manifest.adapter_slots) if manifest else {}
        self._max_tokens = max_tokens
        self._adapter_name = ""
        self._prompts: dict[TextTask, TaskPrompts] = {}

    @classmethod
    def open(cls, bundle_dir: Path | str, **options: Any) -> "SlmSession":
        """Return `SlmSession(bundle_dir, **options)`."""
        return cls(bundle_dir, **options)

    def __enter__(self) -> "SlmSession":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model; later requests are refused. Closing twice is harmless."""
        with self._lock:
            self._adapters = None
            self._model = None

    # --- text out -----------------------------------------------------------------------------

    def generate(self, prompt: str, *, max_tokens: int | None = None, **search: Any) -> str:
        """Return what follows `prompt`, at most `max_tokens` tokens, greedily by default.

        `search` goes to genai's search options: `temperature=0.8, top_p=0.9, random_seed=1`.

        Raises:
            RuntimeFailure: an empty prompt, one that fills the context, or an unknown option.
        """
        return "".join(self.stream(prompt, max_tokens=max_tokens, **search))

    def stream(self, prompt: str, *, max_tokens: int | None = None, **search: Any) -> Iterator[str]:
        """Return an iterator over the pieces of `generate`'s answer; refusals come at once.

        Raises:
            RuntimeFailure: as `generate`.
        """
        ids = self._prompt_ids(prompt)
        if len(ids) >= self.context:
            raise RuntimeFailure(
                f"the prompt has {len(ids)} tokens and the model's context is {self.context}; "
                f"shorten it"
            )
        limit = min(self.context, len(ids) + (max_tokens or self._max_tokens))
        if "temperature" in search or "top_p" in search or "top_k" in search:
            search.setdefault("do_sample", search.get("temperature", 1.0) > 0)
        if not search.get("temperature", 1.0):  # genai divides by it
            del search["temperature"]
        generator = self._generator([ids], limit, search)
        return self._pieces(generator, len(ids))

    def _pieces(self, generator: Any, prompt_tokens: int) -> Iterator[str]:
        from tokenizers.decoders import DecodeStream

        decoder = DecodeStream(skip_special_tokens=True)
        started = 0.0
        while not generator.is_done():
            generator.generate_next_token()
            started = started or time.perf_counter()  # after the first: prompts are another speed
            count = generator.token_count() - prompt_tokens
            if count > 1:
                self.tokens_per_s = (count - 1) / max(time.perf_counter() - started, 1e-9)
            piece = decoder.step(self._tokenizer, int(generator.get_next_tokens()[0]))
            if piece:
                yield piece

    def measure_speed(self, prompt: str = "Request: what is the time?") -> float:
        """Return tokens per second of plain generation, end tokens ignored."""
        ids = self._prompt_ids(prompt)
        limit = min(self.context, len(ids) + SPEED_TOKENS)
        for _ in self._pieces(self._generator([ids], limit, {"min_length": limit}), len(ids)):
            pass
        return self.tokens_per_s

    # --- labels out ---------------------------------------------------------------------------

    def classify(self, text: str, task: TextTask | None = None) -> str:
        """Return the label of `task` (default: the bundle's) that fits `text` best.

        Raises:
            RuntimeFailure: no task, or an empty text.
        """
        return self.classify_many([text], task)[0]

    def classify_many(self, texts: Sequence[str], task: TextTask | None = None) -> list[str]:
        """Return the best label of each text, in order.

        Raises:
            RuntimeFailure: no task, or an empty text.
        """
        labels = self._task_prompts(task).task.labels
        best = self.label_probabilities(texts, task).argmax(axis=1)
        return [labels[i] for i in best]

    def score(
        self, texts: Sequence[str], labels: Sequence[str], task: TextTask | None = None
    ) -> F32:
        """Return the probability of `labels[i]` for `texts[i]`, (n,) float32 in [0, 1].

        Raises:
            RuntimeFailure: no task, or an empty text.
            DataError: a label that is not of the task.
        """
        prompts = self._task_prompts(task)
        columns = [prompts.label_index(label) for label in labels]
        if len(columns) != len(texts):
            raise RuntimeFailure(f"{len(texts)} texts came with {len(columns)} labels")
        probabilities = self.label_probabilities(texts, task)
        return probabilities[np.arange(len(texts)), columns]

    def label_probabilities(self, texts: Sequence[str], task: TextTask | None = None) -> F32:
        """Return each label's probability for each text, (n, labels) float32, rows sum to 1.

        A text too long for the context is cut at its end.

        Raises:
            RuntimeFailure: no task, or an empty text.
        """
        prompts = self._task_prompts(task)
        if any(not text.strip() for text in texts):
            raise RuntimeFailure("a text to classify is empty")
        rows = prompts.prompts(texts)
        found = np.zeros((len(rows), len(prompts.words)), np.float32)
        for batch in batches(rows, tokens=BATCH_TOKENS):
            scores = self._word_log_probs([rows[i] for i in batch], prompts)  # (B, labels)
            found[batch] = _softmax(scores)
        return found

    def top_logits(self, prompt: str, k: int = 5) -> tuple[npt.NDArray[np.int64], F32]:
        """Return the `k` most likely next token ids and their logits, best first.

        Raises:
            RuntimeFailure: an empty prompt, or one that fills the context.
        """
        logits = self._next_logits([self._prompt_ids(prompt)])[0]  # (vocab,)
        best = np.argsort(logits)[::-1][:k]
        return best, logits[best]

    def next_logits(self, ids: Sequence[int]) -> F32:
        """Return the logits after the token ids `ids`, (vocab,) float32.

        Raises:
            RuntimeFailure: no ids, or more than the context holds.
        """
        if not ids:
            raise RuntimeFailure("there are no tokens to continue")
        logits: F32 = self._next_logits([list(ids)])[0]
        return logits

    # --- adapter ------------------------------------------------------------------------------

    def set_adapter(self, path: Path | str | None) -> None:
        """Answer with the `.onnx_adapter` file `path` from now on; None returns to the plain model.

        The model is not loaded again; answers already begun keep their adapter.

        Raises:
            RuntimeFailure: not an adapter file, or an adapter of another base; the old one stays.
        """
        if path is None:
            self.adapter, self._adapter_name = None, ""
            return
        path = Path(path)
        self._check_adapter(path)
        name = hashlib.sha256(path.read_bytes()).hexdigest()
        with self._lock:
            adapters = self._open()[1]
            try:
                if name != self._adapter_name:
                    adapters.load(str(path), name)
            except RuntimeError as exc:
                if "already loaded" not in str(exc).lower():
                    raise RuntimeFailure(f"the adapter {path} cannot be loaded: {exc}") from exc
            self.adapter, self._adapter_name = path, name
        logger.info("adapter %s in use", name[:8])

    def _check_adapter(self, path: Path) -> None:
        """Names and shapes must be the graph's slots: A [in, r], B [r, out]."""
        import onnxruntime

        try:
            values = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
            shapes = {name: list(value.shape()) for name, value in values.items()}
        except Exception as exc:  # onnxruntime raises its own, unexported classes
            raise RuntimeFailure(f"{path} is not an adapter file: {exc}") from exc
        fault = _slot_fault(shapes, self._slots)
        if fault:
            raise RuntimeFailure(f"{path} is an adapter of another base: {fault}")

    # --- the one way to the model -------------------------------------------------------------

    def _open(self) -> tuple[Any, Any]:
        if self._model is None:
            raise RuntimeFailure("the session is closed; open it again")
        return self._model, self._adapters

    def _generator(self, rows: Sequence[Tokens], limit: int, search: Mapping[str, Any]) -> Any:
        """A generator that has read `rows`, padded on the right."""
        with self._lock:
            model, adapters = self._open()
            name = self._adapter_name
        width = max(map(len, rows))
        ids = np.full((len(rows), width), _NO_TOKEN, np.int32)  # (B, T)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        try:
            params = self._og.GeneratorParams(model)
            params.set_search_options(
                **{"do_sample": False, **search, "max_length": limit, "batch_size": len(rows)}
            )
            generator = self._og.Generator(model, params)
            if name:
                generator.set_active_adapter(adapters, name)
            generator.append_tokens(ids)
        except (RuntimeError, TypeError) as exc:
            raise RuntimeFailure(f"the model refused the request: {exc}") from exc
        return generator

    def _next_logits(self, rows: Sequence[Tokens]) -> F32:
        """Logits after each row, (B, vocab) float32."""
        width = max(map(len, rows))
        if width >= self.context:
            raise RuntimeFailure(
                f"the prompt has {width} tokens and the model's context is {self.context}"
            )
        logits = self._generator(rows, width + 1, {}).get_logits()  # (B, 1, vocab)
        return np.asarray(logits, np.float32)[:, -1]

    def _word_log_probs(self, rows: list[Tokens], prompts: TaskPrompts) -> F32:
        """Log-probability of every label's word after each prompt, (B, labels)."""
        if prompts.one_token_decides:
            firsts = [word[0] for word in prompts.words]
            return _log_softmax(self._next_logits(rows))[:, firsts]
        scores = np.zeros((len(rows), len(prompts.words)), np.float32)
        for i, row in enumerate(rows):
            for j, word in enumerate(prompts.words):
                starts = [row + word[:t] for t in range(len(word))]
                logs = _log_softmax(self._next_logits(starts))  # (len(word), vocab)
                scores[i, j] = logs[np.arange(len(word)), word].sum()
        return scores

    def _prompt_ids(self, prompt: str) -> Tokens:
        if not prompt.strip():
            raise RuntimeFailure("the prompt is empty")
        ids: Tokens = list(self._tokenizer.encode(prompt).ids)
        if not ids:
            raise RuntimeFailure("the prompt has no tokens this model knows")
        return ids

    def _task_prompts(self, task: TextTask | None) -> TaskPrompts:
        chosen = task or self.task
        if chosen is None:
            raise RuntimeFailure("this bundle was made for no task; pass one with task=")
        if chosen not in self._prompts:
            try:
                self._prompts[chosen] = TaskPrompts(
                    chosen, self._tokenizer, max_tokens=self.context
                )
            except FleetError as exc:
                raise RuntimeFailure(str(exc)) from exc
        return self._prompts[chosen]


def accuracy(session: SlmSession, texts: Sequence[str], labels: Sequence[str]) -> float:
    """Return the share of texts that `session` labels right; 0.0 of no texts."""
    if not texts:
        return 0.0
    found = session.classify_many(texts)
    return sum(a == b for a, b in zip(found, labels, strict=True)) / len(texts)


def _genai() -> Any:
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


def _overlay(session_options: Mapping[str, object]) -> str:
    options = {
        "model": {"pad_token_id": _NO_TOKEN, "decoder": {"session_options": session_options}}
    }
    return json.dumps(options)


def _manifest(folder: Path) -> ReleaseManifest | None:
    """The bundle's own description; a plain genai folder has none and serves as well."""
    try:
        return decode_manifest((folder / MANIFEST_FILE).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, FleetError) as exc:
        raise RuntimeFailure(f"{folder / MANIFEST_FILE} cannot be read: {exc}") from exc


def _slot_fault(shapes: Mapping[str, list[int]], slots: Mapping[str, tuple[int, int]]) -> str:
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
    return ""


def _log_softmax(logits: F32) -> F32:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logs: F32 = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return logs


def _softmax(scores: F32) -> F32:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares: F32 = powers / powers.sum(axis=-1, keepdims=True)
    return shares
