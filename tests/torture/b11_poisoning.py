"""B11: one device of five is hostile; what its attacks cost with our defaults, and without them.

Knows federated averaging by plain `send`: real training of a tiny model on a task with a rule, real
codecs, checks, bounds and gate. Does not know transport, which other figures are about.
"""

import math
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compression.codec import Compressor
from compression.header import Header, Method
from coordinator.algorithms.fedavg import FedAvgConfig, fedavg
from coordinator.exchange import AdapterExchange, LocalTraining
from coordinator.families import Family
from coordinator.gate import Gate
from coordinator.programs import (
    Ask,
    Blame,
    Note,
    Publish,
    Release,
    Reply,
    Withdraw,
)
from coordinator.robust import Rule
from coordinator.twin import Twin
from edge_sdk.errors import FleetError
from edge_sdk.train.lora import Adapter, Factors, LoraSpec, delta, from_bytes
from edge_sdk.train.text_task import TaskReader, accuracy
from edge_sdk.train.trainer import train_adapter
from edge_sdk.wire.messages import AdapterUpdate, ModelReport, OfferModel, TrainAdapter
from tests.torture.result import Result, Scale, say

sys.path.append(str(Path(__file__).resolve().parent.parent))
from learning_world import TASK, examples, model, tokenizer

GOAL = "within 3 points of the clean run"
DEVICES = tuple(f"dev-{i}" for i in range(5))
HOSTILE = DEVICES[2]
SPEC = LoraSpec(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "up_proj", "down_proj"))
TRAINING = LocalTraining(steps=20, lr=1e-2, batch=8, ratio=0.0)
PLAIN = Rule(clip=1e30, refuse=0.0, max_norm=1e30, examples=1e30)

Attack = Callable[[Factors, np.random.Generator], Factors]


def _same(change: Factors, _rng: np.random.Generator) -> Factors:
    size = math.sqrt(sum(float(np.sum(v**2)) for v in change.values()))
    count = sum(v.size for v in change.values())
    return {k: np.full_like(v, size / math.sqrt(count)) for k, v in change.items()}


def _noise(change: Factors, rng: np.random.Generator) -> Factors:
    return {
        k: (rng.normal(size=v.shape) * math.sqrt(float(np.mean(v**2)))).astype(np.float32)
        for k, v in change.items()
    }


ATTACKS: dict[str, Attack] = {
    "sign flip": lambda change, _: {k: -v for k, v in change.items()},
    "scale x100": lambda change, _: {k: 100 * v for k, v in change.items()},
    "not a number": lambda change, _: {k: np.full_like(v, np.nan) for k, v in change.items()},
    "random": _noise,
    "label flip": lambda change, _: change,  # the training data are flipped, not the change
    "same value": _same,
}


@dataclass
class World:
    """Five devices that share one model object; `attack` says what the hostile one does."""

    seed: int
    attack: str = ""
    rounds: int = 6
    blamed: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    rolled_back: int = 0

    def __post_init__(self) -> None:
        self.adapter = Adapter(model(seed=self.seed), SPEC)
        self.reader = TaskReader(TASK, tokenizer(), max_tokens=32)
        self.data = {name: examples(90, seed=self.seed * 100 + i) for i, name in enumerate(DEVICES)}
        if self.attack == "label flip":
            turned = dict(zip(TASK.labels, TASK.labels[1:] + TASK.labels[:1], strict=True))
            self.data[HOSTILE] = [(text, turned[label]) for text, label in self.data[HOSTILE]]
        self.test = examples(400, seed=self.seed * 100 + 77)
        self.judged = examples(200, seed=self.seed * 100 + 78)
        self.codec = Compressor.identity(self._blocks())

    def _blocks(self) -> Any:
        from compression.blocks import Layout

        layout = self.adapter.layout
        return Layout(tuple(layout), tuple(layout.values()))

    def measure(self, factors: Factors, rows: list[tuple[str, str]]) -> float:
        self.adapter.load(factors)
        texts, labels = zip(*rows, strict=True)
        return float(accuracy(self.adapter.model, self.reader, texts, labels))

    def run(self, rule: Rule, *, gate: bool) -> float:
        """Accuracy on the test texts after all rounds."""
        exchange = AdapterExchange("tiny", self.adapter.layout, SPEC, seed=self.seed, rule=rule)
        exchange.use_codec(self.codec)

        def judge(factors: Factors) -> tuple[float, int]:
            return self.measure(factors, self.judged), len(self.judged)

        plan = FedAvgConfig(rounds=self.rounds, need=3, learn_codec=False, training=TRAINING)
        twin = Twin("tiny", model(seed=self.seed), self.reader, SPEC, seed=self.seed)
        family = Family(twin, exchange, DEVICES, "base", lambda name, factors: Path(name))
        if gate:
            family.gate = Gate(0.05, judge)
        program = fedavg([family], plan)
        answer: object = None
        while True:
            try:
                request = program.send(answer)
            except StopIteration:
                return self.measure(exchange.factors, self.test)
            answer = self._answer(request)

    def _answer(self, request: object) -> object:
        match request:
            case Ask():
                return tuple(reply for name in request.to if (reply := self._reply(request, name)))
            case Publish():
                return Release(request.family, request.release, ())
            case Withdraw():
                return Release(request.family, request.instead, ())
            case Blame():
                self.blamed.append(request.device)
            case Note():
                self.rolled_back += "rolled_back" in request.values
        return None

    def _reply(self, ask: Ask, name: str) -> Reply | None:
        task = ask.message(name)
        if isinstance(task, OfferModel):
            claimed = 0.0 if name == HOSTILE and self.attack else 0.9
            return Reply(name, ModelReport("t", task.release, claimed, 90, 1.0, 1.0, {}))
        assert isinstance(task, TrainAdapter)
        message = self._train(task, name)
        try:
            if ask.check is not None:
                ask.check(name, message)
        except (FleetError, ValueError):
            self.refused.append(name)
            return None
        return Reply(name, message)

    def _train(self, task: TrainAdapter, name: str) -> AdapterUpdate:
        start = from_bytes(task.adapter)
        self.adapter.load(start)
        rank = DEVICES.index(name)
        made = train_adapter(
            self.adapter,
            self.reader,
            self.data[name],
            steps=task.steps,
            batch=task.batch,
            lr=task.lr,
            seed=task.seed * 31 + rank,
            synthetic=[],
            synthetic_weight=0.0,
        )
        change = delta(made.factors, start)
        count = len(self.data[name])
        if name == HOSTILE and self.attack:
            change = ATTACKS[self.attack](change, np.random.default_rng([self.seed, task.round]))
            count = 2**40  # and it claims to have seen everything
        return AdapterUpdate(
            "t", task.round, task.release, self.codec.codec_id, self._codes(change),
            count, self.codec.raw_bytes, 1.0, {}, 1.0,
        )  # fmt: skip

    def _codes(self, change: Factors) -> bytes:
        """Identity codes, also of what our own encoder would refuse to encode."""
        layout = self.codec.layout
        body = b"".join(change[name].astype("<f4").tobytes() for name in layout.names)
        short = bytes.fromhex(self.codec.codec_id[:8])
        return Header(Method.IDENTITY, short, layout.hash[:4]).encode(body)


WAYS = {
    "defaults": (Rule("auto"), True),
    "bounded mean": (Rule("mean"), True),
    "plain mean": (PLAIN, False),
}
"""How updates are combined, and whether a gate looks at what comes out."""


def one(seed: int, attack: str, way: str, rounds: int) -> dict[str, float]:
    """One whole run; "" is no attack."""
    torch.set_num_threads(1)
    world = World(seed, attack, rounds)
    rule, gate = WAYS[way]
    return {
        "accuracy": world.run(rule, gate=gate),
        "refused": len(world.refused),
        "left_out": len(world.blamed),
        "rolled_back": world.rolled_back,
        "honest_blamed": sum(name != HOSTILE for name in world.refused + world.blamed),
    }


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Clean, attacked with our defaults, attacked with the plain mean; final accuracies.

    The short form stops long before training has settled, so it only looks whether an attack that
    can be told from honest updates is left out every time, and nobody else ever.
    """
    full = scale is Scale.FULL
    seeds = range(seed, seed + (3 if full else 1))
    rounds = 20 if full else 1
    names = list(ATTACKS) if full else ["scale x100", "not a number"]
    ways = {name: ["defaults", "plain mean"] for name in names}
    if full:
        ways["sign flip"].insert(1, "bounded mean")
    wanted = [("", "defaults"), *((name, way) for name in names for way in ways[name])]
    jobs = [(s, name, way, rounds) for name, way in wanted for s in seeds]
    say("B11", f"{len(jobs)} runs of {rounds} rounds")
    found = dict(zip(jobs, _all(jobs, parallel=full), strict=True))
    rows: dict[str, dict[str, dict[str, float]]] = {}
    clean = {s: found[s, "", "defaults", rounds]["accuracy"] for s in seeds}
    for name, way in wanted[1:]:
        runs = [found[s, name, way, rounds] for s in seeds]
        lost = [100 * (clean[s] - r["accuracy"]) for s, r in zip(seeds, runs, strict=True)]
        rows.setdefault(name, {})[way] = {
            "lost_points": round(sum(lost) / len(lost), 2),
            "worst_seed": round(max(lost), 2),
            **{key: round(sum(r[key] for r in runs) / len(runs), 4) for key in runs[0]},
        }
        say("B11", f"{name}, {way}: {rows[name][way]}")
    worst = max(row["defaults"]["lost_points"] for row in rows.values())
    honest = sum(r["honest_blamed"] for r in found.values())
    caught = all(
        row["defaults"]["refused"] + row["defaults"]["left_out"] >= rounds for row in rows.values()
    )
    return Result(
        "B11",
        "poisoning by 20 % of the devices",
        worst,
        "points of accuracy lost to the worst attack",
        GOAL,
        passed=honest == 0 and (worst <= 3.0 if full else caught),
        notes={
            "clean": round(sum(clean.values()) / len(clean), 4),
            "untrained": round(_untrained(seed), 4),
            "attacks": rows,
            "seeds": len(seeds),
            "rounds": rounds,
            "every attacker also claims": "2^40 examples, and accuracy 0 for every release",
        },
    )


def _all(jobs: list[tuple[int, str, str, int]], *, parallel: bool) -> Iterator[dict[str, float]]:
    if not parallel:
        yield from (one(*job) for job in jobs)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn) as pool:
        for job, result in zip(jobs, pool.map(one, *zip(*jobs, strict=True)), strict=True):
            say("B11", f"{job[1] or 'clean'}, {job[2]}, seed {job[0]}: {result['accuracy']:.3f}")
            yield result


def _untrained(seed: int) -> float:
    world = World(seed)
    return world.measure(world.adapter.factors(), world.test)
