"""What a device learns from a large model's word on public texts: the task TeachAdapter.

Knows the LLM's vocabulary as an artifact kept between tasks, and the order of the steps. Does not
know alignment, losses or training (`edge_sdk.train.taught`), nor links or the mailbox. No example
of this device is read here, and no loss leaves it.
"""

import hmac
import logging
from pathlib import Path

from edge_sdk.algorithms.vocabulary import Vocabulary
from edge_sdk.errors import Lacking, RemoteProtocolError, RuntimeFailure
from edge_sdk.handled import CODEC, FEEDBACK, WORDS, Handled
from edge_sdk.learning_tasks import LearningDesk, adapter_update
from edge_sdk.measure import Stopwatch
from edge_sdk.wire.messages import TeachAdapter

logger = logging.getLogger(__name__)

TABLES = "vocabularies"
"""Folder of the device's state that keeps tables from other vocabularies to its own."""


class LessonDesk(LearningDesk):
    """A learning desk that takes lessons too."""

    def teach(self, task: TeachAdapter) -> Handled:
        """Learn what the LLM knows better of the task's texts; return the encoded change.

        Raises:
            Lacking: the LLM's vocabulary or the codec is neither here nor in the task.
            RuntimeFailure: switched off, over the limits, or no train extra.
            DataError: a label of no task, or a text too long for this device.
            Postponed: the device's policy asks to wait; to be tried again.
        """
        held = self._models.require(task.release)
        settings = self._config.train
        self._check(task)
        words = self._words(task)
        codec, feedback = self._codec(task)
        try:
            from edge_sdk.train.taught import learn_locally
        except ImportError as exc:
            raise RuntimeFailure("lessons need the train extra, absent on this device") from exc
        if self._gate is not None:
            self._gate()  # before memory is taken
        watch, state = Stopwatch(), Path(self._config.device.state_dir)
        change = learn_locally(
            task,
            words,
            Path(held.bundle),
            self._task,
            means=self._means(),
            seed=task.seed + settings.seed,
            cache=state / TABLES,
            watch=watch,
            progress=self._progress(task.task_id),
            gate=self._gate,
        )
        from compression.errors import CodecError

        with watch.stage("encode"):
            try:
                encoded = codec.encode(change, feedback, task.bytes_target)
            except CodecError as exc:
                raise RuntimeFailure(f"the update cannot be encoded: {exc}") from exc
        # The examples are the task's, not those that taught: how many these were stays here.
        update = adapter_update(task, codec, encoded, watch, examples=len(task.texts))
        self._tell({"event": "taught", "task": task.task_id, "bytes": len(encoded.data)})
        kept = {WORDS: words.to_bytes(), FEEDBACK: feedback.to_bytes(), CODEC: codec.to_bytes()}
        return Handled((update,), kept)

    def _check(self, task: TeachAdapter) -> None:
        self._check_allowed(task.steps)
        if self._config.train.uplink_bytes_per_round:
            reason = "what this device may send in a round is for its own update"
            raise Lacking(reason, "allowance")
        if not task.texts or len(task.texts) != len(task.labels):
            raise RuntimeFailure("the task has no texts, or its texts and labels differ in number")

    def _words(self, task: TeachAdapter) -> Vocabulary:
        data = task.words or self._recall(WORDS)
        words = Vocabulary.from_bytes(data) if data else None
        if words is not None and hmac.compare_digest(bytes.fromhex(words.digest), task.words_id):
            return words
        if task.words:
            raise RemoteProtocolError("the vocabulary sent along is not the one the task names")
        raise Lacking("the LLM's vocabulary is not here and was not sent along", "words")
