"""What a device does with each message: the task in, the replies and what to remember out.

Knows the vocabulary's device half and its own data. Does not know links, seals or the mailbox: the
caller stores `Handled` in one transaction, so a task is done once however often it is begun.

Privacy is decided here: a reply is built field by field from figures and factors, and a refusal
never quotes an example, a label of one, or a path of this machine.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from edge_sdk.collect import ExampleStore
from edge_sdk.config import EdgeConfig
from edge_sdk.errors import DataError, FleetError, RuntimeFailure, StorageError, TrustError
from edge_sdk.measure import Stopwatch, peak_mb
from edge_sdk.models import Held, ModelStore
from edge_sdk.wire.messages import (
    AdapterUpdate,
    AnyMessage,
    File,
    ModelReport,
    OfferData,
    OfferModel,
    Refused,
    Score,
    Scores,
    TextTask,
    TrainAdapter,
    WantFiles,
    decode,
    encode,
)

if TYPE_CHECKING:
    from compression.codec import Compressor, FeedbackState
    from edge_sdk.runtime import SlmSession

logger = logging.getLogger(__name__)

OFFER, SYNTHETIC, FEEDBACK, CODEC = "offer", "synthetic", "feedback", "codec"
"""Names under which the device remembers things between tasks."""

Event = Callable[[dict[str, object]], None]
"""Told what happens, in plain values without any text of an example."""


@dataclass(frozen=True, slots=True)
class Handled:
    """Replies to send and values to remember (b"" forgets), to be kept together or not at all."""

    replies: tuple[AnyMessage, ...] = ()
    remember: Mapping[str, bytes] = field(default_factory=dict)


class TaskDesk:
    """Carries out one message at a time for one device.

    Attributes:
        session: the open model, None before the first release.
    """

    def __init__(
        self,
        config: EdgeConfig,
        *,
        task: TextTask,
        examples: ExampleStore,
        models: ModelStore,
        recall: Callable[[str], bytes],
        on_event: Event | None = None,
    ) -> None:
        """`recall` returns what was remembered under a name, b"" for nothing."""
        self._config, self._task = config, task
        self._examples, self._models, self._recall = examples, models, recall
        self._tell = on_event or (lambda event: None)
        self.session: SlmSession | None = None

    def handle(self, message: AnyMessage, *, now: datetime) -> Handled:
        """Carry out `message`; what this device cannot or will not do becomes Refused.

        Raises:
            StorageError: this machine's disk refused; the message should be tried again later.
        """
        task_id = getattr(message, "task_id", "")
        self._tell({"event": "task", "kind": type(message).__name__, "task": task_id})
        try:
            return self._carry_out(message, now)
        except StorageError:
            raise
        except DataError as exc:
            logger.warning("task %s refused: %s", task_id, exc)
            reason = "this device's examples do not serve the task; its own log says why"
        except FleetError as exc:
            reason = self._without_paths(str(exc))
        except (MemoryError, RuntimeError) as exc:
            # torch reports exhausted memory as a RuntimeError; its text may quote tensors.
            logger.exception("task %s failed", task_id)
            reason = f"the task failed on this device ({type(exc).__name__}); its own log says why"
        self._tell({"event": "refused", "task": task_id, "reason": reason})
        forget = {OFFER: b""} if isinstance(message, OfferModel | File) else {}
        return Handled((Refused(task_id, reason[:65_536]),), forget)

    def open_current(self) -> None:
        """Open the release that runs, or the one before it if that fails; nothing if none is held.

        Raises:
            RuntimeFailure: neither can be opened.
        """
        held = self._models.current
        if held is None:
            return
        try:
            self._use(held)
        except RuntimeFailure:
            if self._models.previous is None:
                raise
            self._use(self._models.roll_back())

    def close(self) -> None:
        """Close the open model."""
        if self.session is not None:
            self.session.close()
            self.session = None

    def _carry_out(self, message: AnyMessage, now: datetime) -> Handled:
        match message:
            case OfferModel():
                return self._offer(message, now)
            case File():
                return self._file(message, now)
            case OfferData():
                return self._data(message)
            case TrainAdapter():
                return self._train(message)
            case Score():
                return self._score(message)
            case _:
                logger.warning("a %s is not for a device; ignored", type(message).__name__)
                return Handled()

    # --- models -------------------------------------------------------------------------------

    def _offer(self, offer: OfferModel, now: datetime) -> Handled:
        accepted = self._config.device.families
        if accepted and offer.family not in accepted:
            raise RuntimeFailure(f"family {offer.family} is not one this device accepts")
        watch = Stopwatch()
        with watch.stage("verify"):
            missing = self._models.missing(offer, now=now)
        if missing:
            return Handled((WantFiles(offer.task_id, missing),), {OFFER: encode(offer)})
        return self._install(offer, now, watch)

    def _file(self, file: File, now: datetime) -> Handled:
        saved = self._recall(OFFER)
        offer = decode(saved) if saved else None
        if not isinstance(offer, OfferModel) or offer.task_id != file.task_id:
            logger.info("a file of a release that is no longer awaited; ignored")
            return Handled()
        if file.path not in offer.targets:
            raise TrustError("a file came that the offer does not name")
        watch = Stopwatch()
        with watch.stage("verify"):
            self._models.put(file.path, file.data)
            missing = self._models.missing(offer, now=now)
        if file.path in missing:
            raise TrustError(f"{file.path} is not the file that was signed")
        if missing:
            return Handled()
        return self._install(offer, now, watch)

    def _install(self, offer: OfferModel, now: datetime, watch: Stopwatch) -> Handled:
        before = self._models.current
        with watch.stage("swap"):
            held = self._models.install(offer, now=now)
            try:
                self._use(held)
            except RuntimeFailure:
                if self._models.previous is not None:
                    self._use(self._models.roll_back())
                raise
        report = self._measure(offer.task_id, held, watch)
        self._tell(
            {
                "event": "model",
                "release": held.release,
                "accuracy": report.accuracy,
                "tokens_per_s": report.tokens_per_s,
            }
        )
        forget = {OFFER: b""}
        if before is None or before.bundle != held.bundle:
            forget[FEEDBACK] = b""  # what is owed belongs to the adapter of another base
        return Handled((report,), forget)

    def _use(self, held: Held) -> None:
        """Answer with `held` from now on; a new adapter over the open bundle needs no loading."""
        from edge_sdk.runtime import SlmSession

        session = self.session
        if session is None or str(session.folder) != held.bundle:
            runtime = self._config.runtime
            session = SlmSession(
                held.bundle,
                threads=runtime.threads,
                max_tokens=runtime.max_tokens,
                task=self._task,
            )
        session.set_adapter(held.adapter_path)
        # Answers still being written keep the session they began with; it goes when they end.
        self.session = session

    def _measure(self, task_id: str, held: Held, watch: Stopwatch) -> ModelReport:
        from edge_sdk.runtime import accuracy

        session = self._running()
        own = self._examples.held_out()
        with watch.stage("measure"):
            share = accuracy(session, [x.text for x in own], [x.label for x in own])
            speed = session.measure_speed()
        return ModelReport(
            task_id=task_id,
            release=held.release,
            accuracy=share,
            examples=len(own),
            tokens_per_s=speed,
            peak_mb=peak_mb(),
            seconds=watch.seconds,
        )

    def _running(self) -> "SlmSession":
        if self.session is None:
            raise RuntimeFailure("this device holds no model yet")
        return self.session

    def _require(self, release: str) -> Held:
        held = self._models.current
        # An adapter release trains and scores over its bundle, so a task may name either.
        if held is None or release not in (held.release, held.base_release):
            raise RuntimeFailure(
                f"the task is for release {release}, this device runs "
                f"{held.release if held else 'none'}"
            )
        return held

    # --- data, scores, training ---------------------------------------------------------------

    def _data(self, offer: OfferData) -> Handled:
        if not len(offer.texts) == len(offer.labels) == len(offer.weights):
            raise RuntimeFailure("the synthetic set's texts, labels and weights differ in number")
        known = self._synthetic()
        if known is not None and known.version >= offer.version:
            return Handled()
        self._tell({"event": "data", "version": offer.version, "texts": len(offer.texts)})
        return Handled(remember={SYNTHETIC: encode(offer)})

    def _synthetic(self) -> OfferData | None:
        saved = self._recall(SYNTHETIC)
        offer = decode(saved) if saved else None
        return offer if isinstance(offer, OfferData) else None

    def _score(self, task: Score) -> Handled:
        self._require(task.release)
        if len(task.texts) != len(task.labels):
            raise RuntimeFailure("the task's texts and labels differ in number")
        if set(task.labels) - set(self._task.labels):
            raise RuntimeFailure("the task names labels that its text task does not have")
        scores = self._running().score(task.texts, task.labels)
        bounded = tuple(min(1.0, max(0.0, float(score))) for score in scores)
        return Handled((Scores(task.task_id, bounded),))

    def _train(self, order: TrainAdapter) -> Handled:
        held = self._require(order.release)
        settings = self._config.train
        if not settings.enabled:
            raise RuntimeFailure("training is switched off on this device")
        if order.steps > settings.max_steps:
            raise RuntimeFailure(
                f"{order.steps} steps are over this device's limit of {settings.max_steps}"
            )
        examples = [(x.text, x.label) for x in self._examples.training()]
        if not examples:
            raise RuntimeFailure("this device has no examples to train on")
        codec, feedback = self._codec(order)
        try:
            from edge_sdk.train.local import Means, train_locally
        except ImportError as exc:
            raise RuntimeFailure("training needs the train extra, absent on this device") from exc
        watch = Stopwatch()
        offered = self._synthetic()
        extra = (
            list(zip(offered.texts, offered.labels, offered.weights, strict=True))
            if offered
            else []
        )
        change = train_locally(
            order,
            Path(held.bundle),
            self._task,
            examples,
            extra,
            means=Means(settings.memory_mb, settings.threads, settings.max_tokens),
            seed=order.seed + settings.seed,
            watch=watch,
            progress=self._progress(order.task_id),
        )
        from compression.errors import CodecError

        with watch.stage("encode"):
            try:
                encoded = codec.encode(change, feedback, order.bytes_target)
            except CodecError as exc:
                raise RuntimeFailure(f"the update cannot be encoded: {exc}") from exc
        update = AdapterUpdate(
            task_id=order.task_id,
            round=order.round,
            release=order.release,
            codec_id=codec.codec_id,
            codes=encoded.data,
            examples=len(examples),
            raw_bytes=codec.raw_bytes,
            cosine=max(-1.0, min(1.0, encoded.cosine)),
            seconds=watch.seconds,
            peak_mb=peak_mb(),
        )
        self._tell({"event": "trained", "task": order.task_id, "bytes": len(encoded.data)})
        return Handled((update,), {FEEDBACK: feedback.to_bytes(), CODEC: codec.to_bytes()})

    def _codec(self, order: TrainAdapter) -> "tuple[Compressor, FeedbackState]":
        from compression.codec import Compressor, FeedbackState
        from compression.errors import CodecError

        data = order.codec or self._recall(CODEC)
        try:
            codec = Compressor.from_bytes(data) if data else None
        except CodecError as exc:
            raise RuntimeFailure(f"the codec cannot be used: {exc}") from exc
        if codec is None or codec.codec_id != order.codec_id:
            raise RuntimeFailure(f"codec {order.codec_id} is not here and was not sent along")
        try:
            feedback = FeedbackState.from_bytes(self._recall(FEEDBACK))
            feedback.tensors(codec.layout)  # of this layout?
        except CodecError as exc:
            logger.info("error feedback begins anew: %s", exc)
            feedback = FeedbackState()
        return codec, feedback

    def _progress(self, task_id: str) -> Callable[[int, int, float], None]:
        def step(done: int, total: int, _loss: float) -> None:
            # The loss stays here: it says something about the examples.
            if done == total or done % max(1, total // 20) == 0:
                self._tell({"event": "training", "task": task_id, "done": done, "total": total})

        return step

    def _without_paths(self, reason: str) -> str:
        return reason.replace(self._config.device.state_dir, "(state)")
