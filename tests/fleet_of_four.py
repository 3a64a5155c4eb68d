"""Devices without a network: they answer a program's tasks with real training and real codecs."""

from dataclasses import dataclass, field

from learning_world import TASK, examples, model, tokenizer

from compression.codec import Compressor, FeedbackState
from coordinator.programs import Ask, Commit, Note, Publish, Release, Reply, Tell, Withdraw
from edge_sdk.train.lora import Adapter, LoraSpec, delta, from_bytes
from edge_sdk.train.text_task import TaskReader, accuracy, label_probs
from edge_sdk.train.trainer import train_adapter
from edge_sdk.wire.messages import (
    AdapterUpdate,
    ModelReport,
    OfferData,
    OfferModel,
    Score,
    Scores,
    TrainAdapter,
)

SPEC = LoraSpec(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "up_proj", "down_proj"))
COHORT = ("dev-a", "dev-b", "dev-c")
HELD_OUT = examples(40, seed=77)


@dataclass
class Device:
    """One device: its own examples lean to one label."""

    name: str
    adapter: Adapter
    reader: TaskReader
    examples: list[tuple[str, str]]
    codecs: dict[str, Compressor] = field(default_factory=dict)
    feedback: FeedbackState = field(default_factory=FeedbackState)
    synthetic: OfferData | None = None
    held: dict[str, object] = field(default_factory=dict)

    def answer(self, message):
        match message:
            case TrainAdapter():
                return self.train(message)
            case Score(task_id=task, texts=texts, labels=labels):
                probs = label_probs(self.adapter.model, self.reader, texts)
                wanted = [TASK.labels.index(label) for label in labels]
                return Scores(task, tuple(float(p[i]) for p, i in zip(probs, wanted, strict=True)))
            case OfferData():
                self.synthetic = message
                return None
            case OfferModel(task_id=task, release=release):
                texts, labels = zip(*HELD_OUT, strict=True)
                score = accuracy(self.adapter.model, self.reader, texts, labels)
                return ModelReport(task, release, score, len(texts), 1.0, 1.0, {})

    def train(self, task):
        if task.codec:
            codec = Compressor.from_bytes(task.codec)
            self.codecs[codec.codec_id] = codec
        codec = self.codecs[task.codec_id]
        start = from_bytes(task.adapter)
        self.adapter.load(start)
        made = self.synthetic
        extra = list(zip(made.texts, made.labels, made.weights, strict=True)) if made else []
        result = train_adapter(
            self.adapter,
            self.reader,
            self.examples,
            steps=task.steps,
            batch=task.batch,
            lr=task.lr,
            seed=task.seed,
            synthetic=extra,
            synthetic_weight=task.synthetic_weight,
        )
        encoded = codec.encode(delta(result.factors, start), self.feedback, task.bytes_target)
        return AdapterUpdate(
            task.task_id, task.round, task.release, codec.codec_id, encoded.data,
            len(self.examples), codec.raw_bytes, encoded.cosine, {}, 1.0,
        )  # fmt: skip


def fleet():
    """Three devices that each rarely see one of the labels."""
    devices = {}
    for i, name in enumerate(COHORT):
        rare = TASK.labels[i]
        rows = [row for n, row in enumerate(examples(90, seed=i)) if row[1] != rare or n % 4 == 0]
        reader = TaskReader(TASK, tokenizer(), max_tokens=32)
        devices[name] = Device(name, Adapter(model(), SPEC), reader, rows)
    return devices


class Log(list):
    """Requests seen, by kind."""

    def of(self, kind):
        return [request for request in self if isinstance(request, kind)]


def drive(program, devices, log, *, until_commit=None, arrival=lambda replies: replies):
    """Run a program by plain `send`; returns the last Commit."""
    last, answer = None, None
    while True:
        try:
            request = program.send(answer)
        except StopIteration:
            return last
        log.append(request)
        answer = None
        match request:
            case Ask():
                replies = []
                for name in request.to:
                    message = devices[name].answer(request.message(name))
                    if request.check is not None:
                        request.check(name, message)
                    replies.append(Reply(name, message))
                answer = tuple(arrival(replies))
            case Tell():
                for name in request.to:
                    devices[name].answer(request.message)
            case Publish(family=family, release=release) | Withdraw(family=family, instead=release):
                answer = Release(family, release, ("model",), {})
            case Commit():
                last = request
                if until_commit == request.step:
                    return last
            case Note():
                pass
