"""Federated averaging of LoRA adapters, the baseline of every comparison.

Knows the order of one round. Does not know tasks, texts, transport or files.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas: "Communication-Efficient Learning of Deep Networks
from Decentralized Data", AISTATS 2017 (arXiv 1602.05629), Algorithm 1.

    line 1  initialise w_0
    line 2  for each round t:
    line 3      S_t <- a set of devices
    line 4      each k in S_t trains w_t on its own data for E epochs, giving w_k
    line 5      w_{t+1} <- sum_k (n_k / n) w_k

| paper | here |
|---|---|
| w_t | `exchange.factors` (A, B of every adapted layer; the base is frozen) |
| S_t | the first `need` of `cohort` that answer |
| E, B, eta | `LocalTraining.steps`, `.batch`, `.lr` |
| n_k | `AdapterUpdate.examples` |

Differences from the paper: only LoRA factors are trained, and what is averaged are the products
B·A (averaging factors is biased, PAPERS.md 9.4), factored again at the same rank; local work is
counted in steps; updates travel encoded; a late update counts with its staleness
(`aggregate.staleness_weight`) and relative to the factors it started from.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.exchange import AdapterExchange, LocalTraining
from coordinator.programs import Ask, Commit, Note, Program, Publish, Reply, Request
from edge_sdk.errors import QuorumMissed
from edge_sdk.train.lora import Factors
from edge_sdk.wire.messages import ModelReport

Package = Callable[[str, Factors], Path]
"""Writes an adapter release of that name and returns its folder."""


@dataclass(frozen=True, slots=True)
class FedAvgConfig:
    """Rounds; updates to wait for (0: all); seconds without progress before an Ask is given up;
    how often an Ask is repeated before the program stops; and what devices do."""

    rounds: int = 3
    need: int = 0
    within_s: float = 120.0
    retries: int = 1
    learn_codec: bool = True
    training: LocalTraining = field(default_factory=LocalTraining)


def fedavg(
    exchange: AdapterExchange,
    cohort: tuple[str, ...],
    cfg: FedAvgConfig,
    *,
    base: str,
    package: Package,
    resume: Commit | None = None,
) -> Program:
    """Run `cfg.rounds` rounds over the devices of `cohort`, whose bundle is release `base`.

    Raises:
        QuorumMissed: too few updates, `cfg.retries` times over.
    """
    first = 0  # line 1 is the exchange's start
    if resume is not None:
        exchange.restore(resume.state["exchange"])
        first = resume.step + 1
    for step in range(first, cfg.rounds):  # line 2
        update = Ask(
            exchange.start(step, base, cfg.training),
            cohort,
            need=cfg.need or len(cohort),
            within_s=cfg.within_s,
            check=exchange.check(),
        )
        replies = yield from patiently(update, cfg.retries)  # lines 3 and 4
        merged, changes = exchange.receive(replies)  # line 5
        if cfg.learn_codec and step == 0:
            exchange.learn_codec(changes)
        name = f"{base}-fedavg-{step + 1}"
        release = yield Publish(exchange.family, name, package(name, exchange.factors), base=base)
        reports = yield from measured(Ask(release.offer(), cohort, len(cohort), cfg.within_s))
        yield Note(
            {
                "round": step,
                "devices": len(replies),
                "discarded": round(merged.discarded, 6),
                "accuracy": mean_accuracy(reports),
            }
        )
        yield Commit(step, {"exchange": exchange.state()})


def patiently(request: Ask, retries: int) -> Generator[Request, Any, tuple[Reply, ...]]:
    """Ask up to `retries` more times in the same words; replies that had arrived are kept.

    Raises:
        QuorumMissed: the last attempt missed its quorum too.
    """
    for left in range(retries, -1, -1):
        try:
            replies: tuple[Reply, ...] = yield request
            return replies
        except QuorumMissed as exc:
            if left == 0:
                raise
            yield Note({"quorum_missed": str(exc), "retries_left": left})
    raise AssertionError("unreachable")


def measured(request: Ask) -> Generator[Request, Any, tuple[Reply, ...]]:
    """Ask for reports; a missing quorum costs the numbers, not the round."""
    try:
        replies: tuple[Reply, ...] = yield request
    except QuorumMissed as exc:
        yield Note({"quorum_missed": str(exc)})
        return ()
    return replies


def mean_accuracy(replies: tuple[Reply, ...]) -> float | None:
    """Accuracy on the devices' own held-out text, weighted by its size; None without reports."""
    reports = [reply.message for reply in replies if isinstance(reply.message, ModelReport)]
    total = sum(report.examples for report in reports)
    if total == 0:
        return None
    return round(sum(report.accuracy * report.examples for report in reports) / total, 4)
