"""One (task, seed): models and data together, training and measuring, and what arms share.

Knows the models, the dealt rows and the measures. Does not know which arms there are (`arms.py`).

Work with equal inputs is done once: a device's training from the same factors with the same seed
(so the first round of FedAvg and of every CrossLM arm), the LLM's first texts, label probabilities
of the same factors on the same texts. A remembered result is the same as one computed anew.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from compression.int4_torch import load_slm
from coordinator.exchange import AdapterExchange
from coordinator.llm import Llm, Update, Written
from coordinator.twin import Twin
from edge_sdk.train.local import quickest_dtype
from edge_sdk.train.lora import Adapter, Factors, LoraSpec
from edge_sdk.train.text_task import TaskReader
from edge_sdk.train.trainer import train_adapter
from examples.learning.answers import rouge_l, write_answers
from examples.learning.deal import Dealt, shares
from examples.learning.fleet import Fleet, LocalWork
from examples.learning.tasks import BenchTask, Example

F32 = npt.NDArray[np.float32]
T = TypeVar("T")

EVERY_LAYER = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Knobs:
    """Settings of all arms. How each was chosen: docstring of `bench_learning.py`.

    Attributes:
        rounds: rounds of the federated programs; devices' steps a round are the task's.
        batch, lr: of every training of a small model on labelled rows.
        synthetic_weight, ratio: as in LocalTraining.
        rank: of every adapter; alpha is twice it.
        samples, tau, distil_lr, sharpness, llm_share: as in CrossLMConfig.
        llm_steps, llm_lr, llm_batch: the LLM's update in each round.
        central_llm_steps: steps of the LLM trained on all devices' rows.
        answer_tokens: most tokens of an open answer.
    """

    rounds: int = 3
    batch: int = 8
    lr: float = 3e-3
    synthetic_weight: float = 0.5
    ratio: float = 16.0
    rank: int = 8
    samples: int = 48
    tau: float = 0.3
    sharpness: float = 1.5
    llm_share: float = 0.3
    distil_lr: float = 2e-3
    llm_steps: int = 16
    llm_lr: float = 2e-3
    llm_batch: int = 8
    central_llm_steps: int = 96
    answer_tokens: int = 14


@dataclass(frozen=True, slots=True)
class Models:
    """Names and folders of the small model's bundle and of the LLM."""

    slm: str
    bundle: Path
    llm: Path


@dataclass(frozen=True, slots=True)
class Measured:
    """One number: of which model, in which role, by which measure."""

    model: str
    role: str
    metric: str
    value: float | str


SHARED, SERVER = "shared", "server"


class Memory:
    """Results by the content of what they were computed from."""

    def __init__(self) -> None:
        self._held: dict[str, Any] = {}

    def of(self, compute: Callable[[], T], *inputs: object) -> T:
        """`compute()`, or what it returned for equal inputs."""
        sha = hashlib.sha256()
        for value in inputs:
            if isinstance(value, dict):
                for name in sorted(value):
                    sha.update(name.encode() + np.ascontiguousarray(value[name]).tobytes())
            else:
                sha.update(repr(value).encode())
            sha.update(b"\0")
        key = sha.hexdigest()
        if key not in self._held:
            self._held[key] = compute()
        result: T = self._held[key]
        return result


class SharedTwin(Twin):
    """A twin that does not ask the same model about the same texts twice."""

    memory: Memory

    def probs(self, texts: Sequence[str], factors: Factors | None = None) -> F32:
        """As `Twin.probs`."""
        chosen = self.factors if factors is None else factors
        return self.memory.of(lambda: Twin.probs(self, texts, chosen), "probs", list(texts), chosen)


class SharedLlm(Llm):
    """An LLM that does not write the same texts twice."""

    memory: Memory

    def generate(self, labels: Sequence[str], *, seed: int, **how: Any) -> Written:
        """As `Llm.generate`."""
        return self.memory.of(
            lambda: Llm.generate(self, labels, seed=seed, **how),
            "written", list(labels), seed, sorted(how.items()), self.state(),
        )  # fmt: skip


@dataclass
class Lab:
    """Everything the arms of one (task, seed) work with.

    Raises:
        ConfigError, WeightsError, OSError: a model cannot be loaded or does not fit the task.
    """

    task: BenchTask
    dealt: Dealt
    models: Models
    knobs: Knobs
    seed: int
    memory: Memory = field(default_factory=Memory)

    @property
    def spec(self) -> LoraSpec:
        """Of every adapter."""
        return LoraSpec(self.knobs.rank, 2.0 * self.knobs.rank, EVERY_LAYER)

    @property
    def pooled(self) -> list[Example]:
        """All devices' rows."""
        return [row for rows in self.dealt.devices.values() for row in rows]

    @cached_property
    def twin(self) -> SharedTwin:
        """The one small model of this process; every arm puts its factors into it."""
        twin = SharedTwin(
            self.models.slm,
            load_slm(self.models.bundle, dtype=quickest_dtype()),
            self._reader(self.models.bundle, self.pooled),
            self.spec,
            seed=self.seed,
        )
        twin.memory = self.memory
        return twin

    @cached_property
    def start(self) -> Factors:
        """The small model's zero adapter."""
        return self.exchange().factors

    @cached_property
    def llm(self) -> SharedLlm:
        """The one LLM of this process, and below where it starts."""
        llm = SharedLlm(
            self.models.llm,
            self._reader(self.models.llm, self.pooled).task,
            self.spec,
            seed=self.seed,
            generic=self.dealt.public[:64],
            dtype=quickest_dtype(),
        )
        llm.memory = self.memory
        return llm

    @cached_property
    def llm_start(self) -> Factors:
        """The LLM's zero adapter."""
        return self.llm.state()

    def exchange(self) -> AdapterExchange:
        """A new exchange; its factors are the zero adapter."""
        return AdapterExchange(self.models.slm, self.twin.layout, self.spec, seed=self.seed)

    def fleet(self, *, learns: bool = True) -> Fleet:
        """New devices. Without `learns` they send back what they were given."""
        train = self.train if learns else lambda _device, start, _work: start
        return Fleet(self.dealt.devices, train)

    def train(self, device: str, start: Factors, work: LocalWork) -> Factors:
        """What `device` makes of `start`."""
        rows = self.dealt.devices[device]
        reader = self.twin.reader
        if self.task.is_open:  # a device's answers are its own; all devices' would not fit the wire
            reader = self._reader(self.models.bundle, rows)
        return self._trained(self.twin.adapter, reader, rows, start, work)

    def train_pooled(self, work: LocalWork) -> Factors:
        """The small model trained on all devices' rows in one place."""
        twin = self.twin
        return self._trained(twin.adapter, twin.reader, self.pooled, self.start, work)

    def train_llm_pooled(self, work: LocalWork) -> Factors:
        """The LLM trained on all devices' rows in one place."""
        return self._trained(self.llm.adapter, self.llm.reader, self.pooled, self.llm_start, work)

    def small(self, role: str, factors: Factors) -> list[Measured]:
        """Measure the small model with `factors`."""
        if self.task.is_open:
            self.twin.adapter.load(factors)
            value = self._rouge(self.twin.adapter, self.twin.reader, self.models.bundle)
            return [Measured(self.models.slm, role, "rouge-l", value)]
        texts, _ = zip(*self.dealt.measured, strict=True)
        right = self._right(self.twin.probs(texts, factors))
        mixes = [
            self._own_mix(right, rows)
            for name, rows in self.dealt.devices.items()
            if role in (SHARED, name)
        ]
        return [
            Measured(self.models.slm, role, "accuracy", float(right.mean())),
            Measured(self.models.slm, role, "accuracy-own-mix", float(np.mean(mixes))),
        ]

    def large(self, factors: Factors) -> list[Measured]:
        """Measure the LLM with `factors`."""
        return self.memory.of(lambda: self._large(factors), "large", factors)

    def _large(self, factors: Factors) -> list[Measured]:
        self.llm.load(factors)
        if self.task.is_open:
            value = self._rouge(self.llm.adapter, self.llm.reader, self.models.llm)
            return [Measured("llm", SERVER, "rouge-l", value)]
        texts, _ = zip(*self.dealt.measured, strict=True)
        return [
            Measured("llm", SERVER, "accuracy", float(self._right(self.llm.probs(texts)).mean()))
        ]

    def update(self) -> Update:
        """How the LLM learns in a round."""
        k = self.knobs
        return Update(lr=k.llm_lr, batch=k.llm_batch, steps=k.llm_steps, tau=k.tau)

    def _reader(self, folder: Path, rows: Sequence[Example]) -> TaskReader:
        answers = tuple(dict.fromkeys(label for _, label in rows)) if self.task.is_open else ()
        return TaskReader.from_folder(self.task.text_task(answers), folder)

    def _trained(
        self,
        adapter: Adapter,
        reader: TaskReader,
        rows: list[Example],
        start: Factors,
        work: LocalWork,
    ) -> Factors:
        def compute() -> Factors:
            adapter.load(start)
            return train_adapter(
                adapter,
                reader,
                rows,
                steps=work.steps,
                batch=work.batch,
                lr=work.lr,
                seed=work.seed,
                synthetic=work.synthetic,
                synthetic_weight=work.synthetic_weight,
            ).factors

        return self.memory.of(compute, "trained", rows, start, work)

    def _right(self, probs: F32) -> npt.NDArray[np.bool_]:
        names = list(self.task.labels)
        wanted = [names.index(label) for _, label in self.dealt.measured]
        return np.asarray(probs.argmax(axis=1) == np.array(wanted))

    def _own_mix(self, right: npt.NDArray[np.bool_], rows: Sequence[Example]) -> float:
        """Accuracy as it would be were the measured labels as frequent as among `rows`."""
        names = list(self.task.labels)
        here, there = shares(self.dealt.measured, names), shares(rows, names)
        weight = {n: there[i] / here[i] if here[i] > 0 else 0.0 for i, n in enumerate(names)}
        w = np.array([weight[label] for _, label in self.dealt.measured])
        return float((w * right).sum() / w.sum()) if w.sum() > 0 else float(right.mean())

    def _rouge(self, adapter: Adapter, reader: TaskReader, folder: Path) -> float:
        texts, wanted = zip(*self.dealt.measured, strict=True)
        said = write_answers(
            adapter.model, reader, folder, texts, most_tokens=self.knobs.answer_tokens
        )
        return float(np.mean([rouge_l(a, b) for a, b in zip(said, wanted, strict=True)]))


def quiet() -> None:
    """One thread: cells run side by side, and sums then come out the same on any machine."""
    torch.set_num_threads(1)
