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
| w_t | each family's `exchange.factors` (A, B of every adapted layer; the base is frozen) |
| S_t | the first `need` devices of all families that answer |
| E, B, eta | `LocalTraining.steps`, `.batch`, `.lr` |
| n_k | `AdapterUpdate.examples`, believed up to `Rule.examples` times the median |

Differences from the paper: only LoRA factors are trained, and what is averaged are the products
B·A (averaging factors is biased, PAPERS.md 9.4), factored again at the same rank; local work is
counted in steps; updates travel encoded; a late update counts with its staleness
(`aggregate.staleness_weight`) and relative to the factors it started from; line 5 is bounded
(`robust.py`), and a round that makes things worse is rolled back (`gate.py`). Families of other
shapes cannot be averaged with one another: each is for itself, in rounds that they share.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from coordinator.algorithms.rounds import mean_accuracy, measured, patiently, told
from coordinator.exchange import LocalTraining
from coordinator.families import Families, Family
from coordinator.programs import Commit, Note, Program, Reply

__all__ = ["FedAvgConfig", "fedavg", "mean_accuracy", "measured", "patiently"]


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
    families: Sequence[Family], cfg: FedAvgConfig, *, resume: Commit | None = None
) -> Program:
    """Run `cfg.rounds` rounds over the devices of `families`, each family averaged by itself.

    The families' gates decide whether a round is kept; it is kept or taken back for all of them.

    Raises:
        ConfigError: families that cannot run together.
        QuorumMissed: too few updates, `cfg.retries` times over.
    """
    fleet = Families(families)
    fleet.begin(resume.state if resume is not None else None)  # line 1
    first = 0 if resume is None else resume.step + 1
    for step in range(first, cfg.rounds):  # line 2
        before = fleet.state()
        training = fleet.training(step, cfg.training, need=cfg.need, within_s=cfg.within_s)
        replies = yield from patiently(training, cfg.retries)  # lines 3 and 4
        merged = yield from fleet.merge(replies, learn_codec=cfg.learn_codec)  # line 5
        fault = merged.fault
        reports: tuple[Reply, ...] = ()
        if not fault:
            wishes = fleet.packaged(step, replies, merged, program="fedavg", whole=False)
            fault, reports = yield from fleet.release(wishes, cfg.within_s)
        if fault:
            fleet.undo(before)
        yield Note(
            {
                "round": step,
                "devices": len(replies),
                "discarded": round(merged.discarded, 6) if merged.aggregates else None,
                "accuracy": mean_accuracy(reports),
                **fleet.traffic,
                **told(merged.outliers, fault),
            }
        )
        yield Commit(step, fleet.state() | {"outcome": b"discarded" if fault else b"kept"})
