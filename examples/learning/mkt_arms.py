"""FedMKT in the learning benchmark: the program and what is taken from it.

Knows how each arm is run in a `Lab`. Does not know how rows are stored or tested.

| arm | what it is |
|---|---|
| ours | both directions, lambda of the paper, labels of the public texts known to all |
| labels-only | no teacher: lambda 1, the same steps on the public labels; the paper lacks it |
| teachers-shuffled | rows are dealt to other places |
| llm-frozen | LLM2SLM: the LLM teaches and does not learn |

Unlike crosslm's, these arms see the labels of the public texts, and are to be compared with
labels-only rather than with fedavg. Rows are made by the devices' replicas: in this process that is
what the devices would send, but for the encoding of updates. The small models are taught for as
many steps as crosslm's distillation takes, the LLM for as many as its update takes.
"""

from functools import partial
from typing import Any

from coordinator.algorithms.fedmkt import FedMktConfig, fedmkt
from coordinator.families import Family
from edge_sdk.train.teaching import Lesson
from examples.learning.arms import (
    NONE,
    OURS,
    Arm,
    _small_models,
    _training,
    distil_steps,
)
from examples.learning.fleet import package
from examples.learning.lab import Lab, Measured

SHARE = 0.9
"""lambda, as published."""
LLM_LR = 2e-3
"""Of the LLM on public labels; crosslm's 8e-3 is for losses that push both ways."""


def mutual(lab: Lab, *, share: float = SHARE, **ablation: Any) -> list[Measured]:
    """FedMKT, or one of its ablations."""
    knobs = lab.knobs
    fleet = lab.fleet()
    exchange = lab.exchange()
    lab.llm.load(lab.llm_start)
    family = Family(lab.twin, exchange, fleet.cohort, "base", package)
    cfg = FedMktConfig(
        rounds=knobs.rounds,
        ask_devices=False,
        llm=Lesson(share, knobs.llm_steps, knobs.llm_batch, LLM_LR),
        slm=Lesson(share, distil_steps(lab), knobs.batch, knobs.distil_lr),
        training=_training(lab),
        **ablation,
    )
    public = list(zip(lab.dealt.public, lab.dealt.public_labels, strict=True))
    fleet.drive(fedmkt(lab.llm, [family], cfg, public=public, seed=lab.seed))
    large = lab.llm.state()
    return [*_small_models(lab, exchange.factors, fleet), *lab.large(large)]


FEDMKT_ARMS = (
    Arm("fedmkt", OURS, NONE, mutual),
    Arm("fedmkt", OURS, "labels-only", partial(mutual, share=1.0)),
    Arm("fedmkt", OURS, "teachers-shuffled", partial(mutual, shuffle_teachers=True)),
    Arm("fedmkt", OURS, "llm-frozen", partial(mutual, teach_llm=False)),
)
