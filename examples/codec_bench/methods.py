"""All methods by name: what is measured, at which ratios, and how each is made for a run.

Knows how a baseline's knob is set for a byte budget. Does not know runs or results.

To measure a new codec, add one `Method` to `METHODS`; ours begin with "symbiont". Raise `version`
when a method changes: its rows in a result file are then thrown away and measured again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from compression.baselines.method import Baseline
from compression.baselines.power_sgd import PowerSgd
from compression.baselines.quantized import FourBit, Int8, Qsgd, Sign
from compression.baselines.sparse import CountSketch, RandomProjection, TopK
from examples.codec_bench.published import Published
from examples.codec_bench.sessions import F32, DeadZone, Learned, Moving, Peer, Plan, Session, Whole

RATIOS = (10, 30, 100, 300, 1000)
"""Times fewer bytes than float32 that methods with a knob are set to."""

OWN = (0,)
"""The ratio of a method without a knob: whatever it is."""


@dataclass(frozen=True, slots=True)
class Method:
    """One method.

    Attributes:
        make: a new session for a run.
        ratios: those it is measured at.
    """

    make: Callable[[Plan], Session]
    ratios: tuple[int, ...] = RATIOS
    version: int = 1


def _fixed(baseline: Callable[[Plan], Baseline]) -> Method:
    def make(plan: Plan) -> Session:
        return Peer(plan, lambda _values: baseline(plan), feedback=baseline(plan).feedback)

    return Method(make, OWN)


def _share(make: Callable[[float], Baseline]) -> Method:
    """Methods of `share` float16 numbers a coordinate, and four bytes."""

    def session(plan: Plan) -> Session:
        baseline = make((plan.allowance - 4) / 2 / plan.size)
        return Peer(plan, lambda _values: baseline, feedback=baseline.feedback)

    return Method(session)


def _top_k(plan: Plan) -> Session:
    baseline = TopK(_top_share(8 * (plan.allowance - 8) / plan.size))
    return Peer(plan, lambda _values: baseline, feedback=True)


def _top_share(bits: float) -> float:
    """The share of values whose places and float16 values take this many bits a coordinate."""
    low, high = 0.0, 0.5
    for _ in range(50):
        p = (low + high) / 2
        entropy = -p * np.log2(p) - (1 - p) * np.log2(1 - p)
        low, high = (p, high) if entropy + 16 * p < bits else (low, p)
    return low


def _qsgd(plan: Plan) -> Session:
    """Few levels and long buckets for few bytes, many levels for many: the first fit."""

    def tuned(values: F32) -> Baseline:
        rng = np.random.default_rng(plan.seed)
        coarse = [Qsgd(1, 2**k) for k in range(values.size.bit_length(), 8, -1)]
        fine = [Qsgd(round(2 ** (k / 2)), 512) for k in range(1, 16)]
        best: Baseline = coarse[0]
        for one in [*coarse, *fine]:  # from few bytes to many
            if len(one.encode(values, rng)) > plan.allowance:
                break
            best = one
        return best

    chosen: list[Baseline] = []

    def make(values: F32) -> Baseline:
        if not chosen:
            chosen.append(tuned(values))
        return chosen[0]

    return Peer(plan, make, feedback=False)


UNCOMPRESSED = "uncompressed"

METHODS: dict[str, Method] = {
    UNCOMPRESSED: Method(Whole, OWN),
    "int8": _fixed(lambda plan: Int8()),
    "int4": _fixed(lambda plan: FourBit("int4")),
    "nf4": _fixed(lambda plan: FourBit("nf4")),
    "sign": _fixed(lambda plan: Sign()),
    "powersgd 1": _fixed(lambda plan: PowerSgd(tuple(plan.shapes.values()))),
    "cg-fedllm": Method(Published, OWN),
    "qsgd": Method(_qsgd),
    "top-k": Method(_top_k),
    "random projection": _share(lambda share: RandomProjection(share)),
    "count sketch": _share(lambda share: CountSketch(share)),
    "dead-zone": Method(DeadZone),
    "symbiont": Method(partial(Moving, ahead=True), version=3),
    "symbiont started alike": Method(Moving),
    "symbiont dead-zone": Method(partial(DeadZone, ahead=True)),
    "symbiont autoencoder": Method(Learned, version=2),
}
