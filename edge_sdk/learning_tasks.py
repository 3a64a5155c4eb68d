"""What a device learns and judges with its own examples: synthetic sets, scores, training.

Knows the examples, the trainer and the codec. Does not know releases' trust, links or the mailbox;
what must survive goes back in `Handled`. No reply holds an example, a label of one, or a loss.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edge_sdk.calibration import fit_temperature, tempered
from edge_sdk.collect import ExampleStore
from edge_sdk.config import EdgeConfig
from edge_sdk.errors import Lacking, RuntimeFailure
from edge_sdk.handled import (
    ADAPTERS,
    CODEC,
    FEEDBACK,
    OWN,
    RELEASED,
    SYNTHETIC,
    Event,
    Handled,
    Recall,
)
from edge_sdk.measure import Stopwatch, peak_mb
from edge_sdk.model_tasks import ModelDesk
from edge_sdk.train.policy import Gate, Policy, Spare
from edge_sdk.wire.messages import (
    AdapterUpdate,
    LogitRows,
    OfferData,
    Refused,
    Score,
    Scores,
    TeachAdapter,
    TextTask,
    TopLogits,
    TrainAdapter,
    decode,
    encode,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from compression.codec import Compressor, Encoded, FeedbackState
    from edge_sdk.train.local import Means

logger = logging.getLogger(__name__)

CHECKPOINT = "training.checkpoint"
"""The file in the device's folder from which an interrupted training goes on."""

CALIBRATION_TEXTS = 200
"""Held-out examples on which the temperature of a Score is fitted; more say little more."""


class LearningDesk:
    """Carries out what needs the device's examples or opinions; `models` has the open session."""

    def __init__(
        self,
        config: EdgeConfig,
        *,
        task: TextTask,
        examples: ExampleStore,
        models: ModelDesk,
        recall: Recall,
        tell: Event,
        policy: Policy | None = None,
    ) -> None:
        """`policy` decides between steps whether training goes on; default: as configured."""
        self._gate = _gate(config, policy)
        self._config, self._task = config, task
        self._examples, self._models, self._recall = examples, models, recall
        self._tell = tell

    def data(self, offer: OfferData) -> Handled:
        """Keep a synthetic set if it is newer than the one held.

        Raises:
            RuntimeFailure: its columns differ in length.
        """
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

    def score(self, task: Score) -> Handled:
        """Say how well each label fits its text, in [0, 1], no surer than held-out text bears out.

        Raises:
            RuntimeFailure: another release, a label of no task, or columns that differ in length.
        """
        self._models.require(task.release)
        if len(task.texts) != len(task.labels):
            raise RuntimeFailure("the task's texts and labels differ in number")
        if set(task.labels) - set(self._task.labels):
            raise RuntimeFailure("the task names labels that its text task does not have")
        probs = tempered(self._label_probabilities(task.texts), self._temperature())
        columns = [self._task.labels.index(label) for label in task.labels]
        scores = probs[range(len(columns)), columns]
        bounded = tuple(min(1.0, max(0.0, float(score))) for score in scores)
        return Handled((Scores(task.task_id, bounded),))

    def _temperature(self) -> float:
        """How much too sure the running model is, by the newest of its held-out examples."""
        known = [x for x in self._examples.held_out() if x.label in self._task.labels]
        known = known[-CALIBRATION_TEXTS:]
        probs = self._label_probabilities([x.text for x in known])
        return fit_temperature(probs, [self._task.labels.index(x.label) for x in known])

    def _label_probabilities(self, texts: Sequence[str]) -> "npt.NDArray[np.float32]":
        return self._models.running().label_probabilities(list(texts), self._task)

    def train(self, order: TrainAdapter) -> Handled:
        """Train on this device's examples and return the encoded change.

        It starts ahead of the common adapter by what this device still owes of earlier changes
        (`compression/feedback.py`), which it need not learn again. Where not even its headers fit
        the allowance, nothing is sent and all of it is owed.

        Raises:
            Lacking: the order's adapter or codec is not here; sent whole, it can be done.
            RuntimeFailure: switched off, over the limits, or nothing to train on.
            DataError: the examples do not serve the task.
            Postponed: the device's policy asks to wait; to be tried again.
        """
        held = self._models.require(order.release)
        settings = self._config.train
        self._check_allowed(order.steps)
        examples = [(x.text, x.label) for x in self._examples.training()]
        if not examples:
            raise RuntimeFailure("this device has no examples to train on")
        try:
            from edge_sdk.train.held import HeldAdapters, completed
            from edge_sdk.train.local import train_locally, with_change
        except ImportError as exc:
            raise RuntimeFailure("training needs the train extra, absent on this device") from exc
        order = completed(order, self._recall(RELEASED))
        codec, feedback = self._codec(order)
        if self._gate is not None:
            self._gate()  # before memory is taken
        adapters = HeldAdapters.from_bytes(self._recall(ADAPTERS))
        shapes = zip(codec.layout.names, codec.layout.shapes, strict=True)
        order = adapters.begin(order, {name: (shape[0], shape[-1]) for name, shape in shapes})
        watch = Stopwatch()
        offered = self._synthetic()
        extra = (
            list(zip(offered.texts, offered.labels, offered.weights, strict=True))
            if offered
            else []
        )
        started = with_change(order, feedback.ahead(codec.layout))
        change = train_locally(
            started,
            Path(held.bundle),
            self._task,
            examples,
            extra,
            means=self._means(),
            seed=order.seed + settings.seed,
            watch=watch,
            progress=self._progress(order.task_id),
            gate=self._gate,
        )
        from compression.errors import CodecError, TooFewBytes

        own = encode(with_change(started, change))
        kept = {ADAPTERS: adapters.to_bytes(), CODEC: codec.to_bytes(), OWN: own}
        target = min(filter(None, (order.bytes_target, settings.uplink_bytes_per_round)), default=0)
        with watch.stage("encode"):
            try:
                encoded = codec.encode(change, feedback, target)
            except TooFewBytes as exc:
                feedback.owe(codec.layout.pack(change), codec.layout)
                kept[FEEDBACK] = feedback.to_bytes()
                return Handled((self._kept_back(order, exc),), kept)
            except CodecError as exc:
                raise RuntimeFailure(f"the update cannot be encoded: {exc}") from exc
        update = adapter_update(
            order, codec, encoded, watch, examples=len(examples), holds=order.digest
        )
        self._tell({"event": "trained", "task": order.task_id, "bytes": len(encoded.data)})
        return Handled((update,), kept | {FEEDBACK: feedback.to_bytes()})

    def _check_allowed(self, steps: int) -> None:
        settings = self._config.train
        if not settings.enabled:
            raise RuntimeFailure("training is switched off on this device")
        if steps > settings.max_steps:
            raise RuntimeFailure(
                f"{steps} steps are over this device's limit of {settings.max_steps}"
            )

    def _means(self) -> "Means":
        from edge_sdk.train.local import Means

        settings = self._config.train
        checkpoint = Path(self._config.device.state_dir) / CHECKPOINT
        return Means(
            settings.memory_mb,
            settings.threads,
            settings.max_tokens,
            checkpoint if settings.checkpoint_s else None,
            settings.checkpoint_s,
        )

    def _kept_back(self, order: TrainAdapter, exc: Exception) -> Refused:
        reason = (
            f"{exc}; train.uplink_bytes_per_round here is "
            f"{self._config.train.uplink_bytes_per_round} (0: no limit), the coordinator allows "
            f"{order.bytes_target}; raise the lower one. What was learned is owed and sent later"
        )
        self._tell({"event": "refused", "task": order.task_id, "reason": reason})
        return Refused(order.task_id, reason, ("allowance",))

    def top_logits(self, task: TopLogits) -> Handled:
        """Say what the adapter trained in the task's round finds likeliest on public texts.

        Computed with the training model: no release holds that adapter, and what trains is here
        already. It is the adapter before encoding, so rows say more than the update did.

        Raises:
            RuntimeFailure: another release, a round this device did not train in, columns that
                differ in length, or no train extra.
            DataError: a label of no task, or a text too long for this device.
        """
        held = self._models.require(task.release)
        saved = self._recall(OWN)
        own = decode(saved) if saved else None
        if not isinstance(own, TrainAdapter) or own.round != task.round:
            raise RuntimeFailure(f"this device did not train in round {task.round}")
        if own.release != task.release or own.family != task.family:
            raise RuntimeFailure(f"this device trained release {own.release}, not {task.release}")
        if len(task.texts) != len(task.labels):
            raise RuntimeFailure("the task's texts and labels differ in number")
        try:
            from edge_sdk.algorithms.logit_rows import pack
            from edge_sdk.train.local import Means, rows_locally
        except ImportError as exc:
            raise RuntimeFailure("logits need the train extra, absent on this device") from exc
        settings, watch = self._config.train, Stopwatch()
        table, vocabulary = rows_locally(
            own,
            task,
            Path(held.bundle),
            self._task,
            means=Means(settings.memory_mb, settings.threads, settings.max_tokens),
            watch=watch,
        )
        truth, ids, logps = pack(table, vocabulary)
        rows = LogitRows(
            task_id=task.task_id,
            round=task.round,
            release=task.release,
            places=table.places.digest,
            kept=table.kept,
            truth=truth,
            ids=ids,
            logps=logps,
            seconds=watch.seconds,
            peak_mb=peak_mb(),
        )
        return Handled((rows,))

    def _codec(self, order: TrainAdapter | TeachAdapter) -> "tuple[Compressor, FeedbackState]":
        from compression.codec import Compressor, FeedbackState
        from compression.errors import CodecError

        data = order.codec or self._recall(CODEC)
        if not data:
            raise Lacking(f"codec {order.codec_id} is not here and was not sent along", "codec")
        changes = [delta.codes for delta in getattr(order, "deltas", ())]
        try:
            codec = Compressor.from_bytes(data)
        except CodecError as exc:
            raise RuntimeFailure(f"the codec cannot be used: {exc}") from exc
        try:
            codec = codec.followed_to(order.codec_id, changes)
        except CodecError as exc:
            raise Lacking(str(exc), "codec") from exc
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


def adapter_update(
    order: TrainAdapter | TeachAdapter,
    codec: "Compressor",
    encoded: "Encoded",
    watch: Stopwatch,
    *,
    examples: int,
    holds: bytes = b"",
) -> AdapterUpdate:
    """The answer to a task that changed an adapter."""
    return AdapterUpdate(
        task_id=order.task_id,
        round=order.round,
        release=order.release,
        codec_id=codec.codec_id,
        codes=encoded.data,
        examples=examples,
        raw_bytes=codec.raw_bytes,
        cosine=max(-1.0, min(1.0, encoded.cosine)),
        seconds=watch.seconds,
        peak_mb=peak_mb(),
        holds=holds,
    )


def _gate(config: EdgeConfig, policy: Policy | None) -> Gate | None:
    train = config.train
    if policy is None and (train.min_charge or train.max_load):
        policy = Spare(train.min_charge, train.max_load, train.threads)
    return None if policy is None else Gate(policy, patience_s=train.patience_s)
