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
| n_k | `AdapterUpdate.examples`, believed up to `Rule.examples` times the median |

Differences from the paper: only LoRA factors are trained, and what is averaged are the products
B·A (averaging factors is biased, PAPERS.md 9.4), factored again at the same rank; local work is
counted in steps; updates travel encoded; a late update counts with its staleness
(`aggregate.staleness_weight`) and relative to the factors it started from; line 5 is bounded
(`robust.py`), and a round that makes things worse is rolled back (`gate.py`).
"""

from dataclasses import dataclass, field

from coordinator.algorithms.rounds import (
    lineage,
    mean_accuracy,
    measured,
    merge,
    patiently,
    told,
    tried,
)
from coordinator.exchange import AdapterExchange, LocalTraining
from coordinator.families import Package
from coordinator.gate import Gate
from coordinator.programs import Ask, Commit, Note, Program, Publish, Reply

__all__ = ["FedAvgConfig", "Package", "fedavg", "mean_accuracy", "measured", "patiently"]


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
    gate: Gate | None = None,
    resume: Commit | None = None,
) -> Program:
    """Run `cfg.rounds` rounds over the devices of `cohort`, whose bundle is release `base`.

    `gate` decides whether a round is kept; without one, every round is.

    Raises:
        QuorumMissed: too few updates, `cfg.retries` times over.
    """
    gate, kept, first = gate or Gate(), base, 0  # line 1 is the exchange's start
    if resume is not None:
        exchange.restore(resume.state["exchange"])
        gate.restore(resume.state.get("gate", b""))
        kept = resume.state.get("kept", base.encode()).decode()
        first = resume.step + 1
    gate.start(exchange.factors)
    for step in range(first, cfg.rounds):  # line 2
        before, figures = exchange.state(), gate.to_bytes()
        update = Ask(
            exchange.start(step, base, cfg.training),
            cohort,
            need=cfg.need or len(cohort),
            within_s=cfg.within_s,
            check=exchange.check(),
        )
        replies = yield from patiently(update, cfg.retries)  # lines 3 and 4
        merged, changes, fault = yield from merge(exchange, gate, replies)  # line 5
        reports: tuple[Reply, ...] = ()
        if not fault:
            if cfg.learn_codec and exchange.codec.basis is None:
                exchange.learn_codec(changes)
            name = f"{base}-fedavg-{step + 1}"
            folder = package(name, exchange.factors)
            wish = Publish(exchange.family, name, folder, base, lineage(step, replies, merged))
            fault, reports = yield from tried(wish, cohort, cfg.within_s, gate, instead=kept)
        if fault:
            exchange.roll_back(before)
            gate.restore(figures)
        else:
            kept = name
        yield Note(
            {
                "round": step,
                "devices": len(replies),
                "discarded": round(merged.discarded, 6) if merged else None,
                "accuracy": mean_accuracy(reports),
                **told(merged.outliers if merged else (), fault),
            }
        )
        yield Commit(
            step,
            {
                "exchange": exchange.state(),
                "gate": gate.to_bytes(),
                "kept": kept.encode(),
                "outcome": b"discarded" if fault else b"kept",
            },
        )
