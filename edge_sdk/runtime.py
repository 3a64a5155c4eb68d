"""One open model: text in, text or labels out, with ONNX Runtime and nothing else.

Knows a bundle folder and onnxruntime-genai. Does not know where bundles come from, whether they may
be trusted (models.py decides that before), messages, or any network.

A prompt is read by the `tokenizers` library, the one that training uses, so that both see the same
tokens (session_texts.py). What a request may ask is in generation.py, how text is written in
answer.py.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from edge_sdk.adapter_use import AdapterUse
from edge_sdk.answer import Answer, Strand, stopped_by
from edge_sdk.bundle_files import BundleFiles
from edge_sdk.conversation import Conversation
from edge_sdk.errors import ConfigError, RuntimeFailure
from edge_sdk.genai_model import GenaiModel, logits, read
from edge_sdk.generation import Options, Request
from edge_sdk.json_answers import check_whole
from edge_sdk.labels import F32, accuracy
from edge_sdk.many import MANY_TOKENS, groups, write_many
from edge_sdk.prompts import READ_TOKENS, Tokens, load_tokenizer
from edge_sdk.session_texts import SessionTexts
from edge_sdk.wire.messages import TextTask
from edge_sdk.word_labels import BATCH_TOKENS, WordLabels

__all__ = ["Answer", "Conversation", "SlmSession", "accuracy"]

SPEED_TOKENS = 32
"""Tokens generated to measure speed: a tenth of a second on a 10 M model."""


class SlmSession(WordLabels, AdapterUse, SessionTexts):
    """A small language model ready to answer; also a context manager.

    Requests from several threads are safe. A refused request leaves the session usable.

    Attributes:
        folder: the bundle's folder, `release` the name of its release ("" if it has none).
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
        context: int | None = None,
        memory_mb: float | None = None,
        check: bool = True,
    ) -> None:
        """Load the bundle in `bundle_dir`.

        `threads` is ONNX Runtime's intra-op thread count (0: its own choice), `max_tokens` what an
        answer may have unless a request says otherwise. `session_options` are passed to ONNX
        Runtime as they are, e.g. `{"enable_cpu_mem_arena": False}`. `context` lowers the model's
        own limit. `memory_mb` refuses a model that would take more, one text of a full context at
        a time. `check` compares the files with the manifest's hashes first (a second per gigabyte
        or so); switch it off where that was done already.

        Raises:
            DigestError: a file is not the one that was exported.
            RuntimeFailure: no bundle there, it cannot be loaded or needs more than `memory_mb`, or
                the infer extra is missing.
        """
        files = BundleFiles.read(Path(bundle_dir))
        limit = files.limit(context)
        if check:
            files.check()
        if memory_mb is not None:
            files.check_memory(memory_mb, limit)
        own: dict[str, object] = {"intra_op_num_threads": threads} if threads else {}
        manifest, own = files.manifest, own | dict(session_options or {})
        slots = manifest.adapter_slots if manifest else {}
        try:
            tokenizer = load_tokenizer(files.folder)
        except ConfigError as exc:
            raise RuntimeFailure(f"the bundle {files.folder} cannot be loaded: {exc}") from exc
        tight = memory_mb is not None
        self._model = GenaiModel(files.folder, slots, session_options=own, reads_apart=not tight)
        task = task or (manifest.task if manifest else None)
        at_once = READ_TOKENS if tight else BATCH_TOKENS
        WordLabels.__init__(self, task, tokenizer, context=limit, batch_tokens=at_once)
        self._many_tokens = limit if tight else MANY_TOKENS
        AdapterUse.__init__(self, self._model)
        SessionTexts.__init__(self, files.folder, tokenizer, context=limit)
        self.folder, self._ends = files.folder, files.ends
        self.release = manifest.release if manifest else ""
        self.tokens_per_s = 0.0
        self._max_tokens = max_tokens

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
        self._model.close()

    # --- text out -----------------------------------------------------------------------------

    def generate(self, prompt: str, **options: Unpack[Options]) -> str:
        """Return what follows `prompt`, greedily by default; see `Options`.

        Raises:
            RuntimeFailure: an empty prompt, one that fills the context, an option that is unknown
                or out of its range, or JSON that was cut off by a limit.
        """
        answer = self.stream(prompt, **options)
        for _ in answer:
            pass
        if options.get("schema") is not None:
            check_whole(answer.finish, len(answer.tokens))
        return answer.text

    def stream(self, prompt: str, **options: Unpack[Options]) -> Answer:
        """Return an iterator over the pieces of `generate`'s answer; refusals come at once.

        Raises:
            RuntimeFailure: as `generate`, but JSON that was cut off shows in the answer's `finish`.
        """
        request = self.request(options)
        ids = self._prompt_ids(prompt)
        limit = min(self.context, len(ids) + request.max_tokens)
        mostly_reads = len(ids) > request.max_tokens
        generator = self._model.generator(request, limit=limit, mostly_reads=mostly_reads)
        return self.answer(generator, request, unread=ids, prompt_tokens=len(ids))

    def generate_many(self, prompts: Sequence[str], **options: Unpack[Options]) -> list[str]:
        """Return what follows each prompt, in order; texts of similar length are read together.

        Limits of tokens are each answer's, limits of time and `cancel` all answers'.

        Raises:
            RuntimeFailure: as `generate`; nothing is answered then.
        """
        request = self.request(options)
        rows = [self._prompt_ids(prompt) for prompt in prompts]
        strands = [Strand(self._tokenizer, request.stop, self._ends) for _ in rows]
        started = time.perf_counter()
        for batch in groups(rows, request, context=self.context, tokens=self._many_tokens):
            together = [strands[i] for i in batch]
            if finish := stopped_by(request, started):
                for strand in together:
                    strand.end(finish)
                continue
            width = max(len(rows[i]) for i in batch)
            room = min(request.max_tokens, self.context - width)
            generator = self._model.generator(
                request, limit=width + room, rows=len(batch), mostly_reads=width > room
            )
            read(generator, [rows[i] for i in batch])
            write_many(generator, together, request, limit=room, started=started)
        for strand in strands if request.schema else ():
            check_whole(strand.finish, len(strand.tokens))
        return [strand.text for strand in strands]

    def conversation(self, system: str = "") -> Conversation:
        """Return a new dialogue, begun with the `system`'s words if there are any."""
        return Conversation(self, system)

    def measure_speed(self, prompt: str = "Request: what is the time?") -> float:
        """Return tokens per second of plain generation, end tokens ignored."""
        ids = self._prompt_ids(prompt)
        limit = min(self.context, len(ids) + SPEED_TOKENS)
        generator = self._model.generator(self.request({}), limit=limit, min_length=limit)
        read(generator, [ids])
        generator.generate_next_token()  # reading a prompt has another speed
        started, count = time.perf_counter(), 0
        while not generator.is_done():
            generator.generate_next_token()
            count += 1
        if count:
            self.tokens_per_s = count / max(time.perf_counter() - started, 1e-9)
        return self.tokens_per_s

    # --- labels out ---------------------------------------------------------------------------

    def top_logits(self, prompt: str, k: int = 5) -> tuple[npt.NDArray[np.int64], F32]:
        """Return the `k` most likely next token ids and their logits, best first.

        Raises:
            RuntimeFailure: an empty prompt, or one that fills the context.
        """
        found = self._next_logits([self._prompt_ids(prompt)])[0]  # (vocab,)
        best = np.argsort(found)[::-1][:k]
        return best, found[best]

    def next_logits(self, ids: Sequence[int]) -> F32:
        """Return the logits after the token ids `ids`, (vocab,) float32.

        Raises:
            RuntimeFailure: no ids, or more than the context holds.
        """
        if not ids:
            raise RuntimeFailure("there are no tokens to continue")
        found: F32 = self._next_logits([list(ids)])[0]
        return found

    # --- the one way to the model, for Conversation too ---------------------------------------

    def request(self, options: Options, *, chat: bool = False) -> Request:
        """Return the checked request for `options`, its adapter named; in a `chat` it ends where
        the user's next turn would begin.

        Raises:
            RuntimeFailure: the session is closed, an option unknown or out of range, no such
                adapter, or not a JSON schema.
        """
        request = Request.of(options, max_tokens=self._max_tokens)
        stops = self._template.stops if chat else ()
        name = self._adapter_of(request.adapter)
        return replace(request, adapter=name, stop=request.stop + stops)

    def generator(self, request: Request, *, limit: int, every_row: bool = False) -> Any:
        """Return a genai generator that has read nothing; `limit` counts prompt and answer.

        With `every_row` its output "logits" has those of every token just read; without, the
        quickest graph that does may give the last one's only.

        Raises:
            RuntimeFailure: the session is closed, or genai refuses the options or the schema.
        """
        return self._model.generator(request, limit=limit, every_row=every_row)

    def next_graph(self) -> bool:
        """Open the next graph that an adapter or another request might need; False for none left.

        Raises:
            RuntimeFailure: it cannot be loaded.
        """
        return self._model.next_graph()

    def answer(
        self,
        generator: Any,
        request: Request,
        *,
        unread: Tokens,
        prompt_tokens: int,
        ended: Callable[[Answer], None] | None = None,
    ) -> Answer:
        """Return the answer that `generator` writes once it has read the tokens `unread`."""

        def finished(answer: Answer) -> None:
            if answer.tokens_per_s:
                self.tokens_per_s = answer.tokens_per_s
            if ended is not None:
                ended(answer)

        strand = Strand(self._tokenizer, request.stop, self._ends)
        limit = min(request.max_tokens, self.context - prompt_tokens)
        return Answer(
            generator,
            strand,
            request,
            unread=unread,
            prompt_tokens=prompt_tokens,
            limit=limit,
            ended=finished,
        )

    def _next_logits(self, rows: Sequence[Tokens]) -> F32:
        """Logits after each row, (B, vocab) float32."""
        width = max(map(len, rows))
        self._check_room(width)
        generator = self._model.generator(
            self.request({}), limit=width + 1, rows=len(rows), mostly_reads=True
        )
        read(generator, rows)
        return logits(generator)
