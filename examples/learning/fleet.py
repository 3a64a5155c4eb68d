"""Devices in this process: they answer a program's requests with real training and real codecs.

Knows programs' requests and the product's trainer, codec and messages. Does not know tasks' data,
measures, or what is compared with what. There is no network here; every byte that a device would
send is encoded, and decoded by the program.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compression.codec import Compressor, FeedbackState
from coordinator.programs import Ask, Note, Program, Publish, Release, Reply, Tell
from edge_sdk.train.lora import Factors, delta, from_bytes
from edge_sdk.train.trainer import Weighted
from edge_sdk.wire.messages import AdapterUpdate, AnyMessage, OfferData, TrainAdapter
from examples.learning.tasks import Example

Train = Callable[[str, Factors, "LocalWork"], Factors]
"""Trains on a device's examples: device, factors it starts from, what to do; returns factors."""


@dataclass(frozen=True, slots=True)
class LocalWork:
    """One call of the trainer, in the words of `train_adapter`."""

    steps: int
    batch: int
    lr: float
    seed: int
    synthetic: tuple[Weighted, ...] = ()
    synthetic_weight: float = 0.0


@dataclass
class Device:
    """What one device holds between rounds.

    Attributes:
        own: the factors it trained last, before encoding; None before its first task.
    """

    name: str
    seed: int
    examples: Sequence[Example]
    codecs: dict[str, Compressor] = field(default_factory=dict)
    feedback: FeedbackState = field(default_factory=FeedbackState)
    synthetic: OfferData | None = None
    own: Factors | None = None

    def train(self, order: TrainAdapter, train: Train) -> AdapterUpdate:
        """Carry out `order` as a device would."""
        if order.codec:
            codec = Compressor.from_bytes(order.codec)
            self.codecs[codec.codec_id] = codec
        codec = self.codecs[order.codec_id]
        start, held = from_bytes(order.adapter), self.synthetic
        work = LocalWork(
            steps=order.steps,
            batch=order.batch,
            lr=order.lr,
            seed=order.seed + self.seed,
            synthetic=tuple(zip(held.texts, held.labels, held.weights, strict=True))
            if held
            else (),
            synthetic_weight=order.synthetic_weight,
        )
        self.own = train(self.name, start, work)
        encoded = codec.encode(delta(self.own, start), self.feedback, order.bytes_target)
        return AdapterUpdate(
            task_id=order.task_id,
            round=order.round,
            release=order.release,
            codec_id=codec.codec_id,
            codes=encoded.data,
            examples=len(self.examples),
            raw_bytes=codec.raw_bytes,
            cosine=max(-1.0, min(1.0, encoded.cosine)),
            seconds={},
            peak_mb=0.0,
        )


DEVICE_SEEDS = 1000
"""Devices draw their batches from seeds this far apart."""


class Fleet:
    """All devices of one run, new at its start."""

    def __init__(self, examples: Mapping[str, Sequence[Example]], train: Train) -> None:
        self.devices = {
            name: Device(name, DEVICE_SEEDS * k, rows)
            for k, (name, rows) in enumerate(examples.items())
        }
        self._train = train

    @property
    def cohort(self) -> tuple[str, ...]:
        """The devices' ids."""
        return tuple(self.devices)

    def drive(self, program: Program, *, after_round: Callable[[int], None] | None = None) -> None:
        """Run `program` to its end; `after_round` is called with the round of each Note."""
        answer: Any = None
        while True:
            try:
                request = program.send(answer)
            except StopIteration:
                return
            answer = None
            match request:
                case Ask():
                    answer = self._replies(request)
                case Tell():
                    for name in request.to:
                        message: Any = request.message
                        self._told(name, message(name) if callable(message) else message)
                case Publish():
                    answer = Release(request.family, request.release, ())
                case Note():
                    if after_round is not None and "round" in request.values:
                        after_round(int(request.values["round"]))

    def _replies(self, request: Ask) -> tuple[Reply, ...]:
        """Updates to TrainAdapter. Nothing to OfferModel: rows are measured by the benchmark, and
        a program does without devices' reports."""
        replies = []
        for name in sorted(request.to):
            order = request.message(name)
            if not isinstance(order, TrainAdapter):
                continue
            update = self.devices[name].train(order, self._train)
            if request.check is not None:
                request.check(name, update)
            replies.append(Reply(name, update))
        return tuple(replies)

    def _told(self, name: str, message: AnyMessage) -> None:
        if isinstance(message, OfferData):
            self.devices[name].synthetic = message


def package(_release: str, _factors: Factors) -> Path:
    """Releases are not written here: nothing reads them."""
    return Path()
