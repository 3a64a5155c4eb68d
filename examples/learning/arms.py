"""What is compared: settings, programs and ablations, one entry each.

Knows how each arm is run in a `Lab`. Does not know how rows are stored or tested.

| setting | what it is |
|---|---|
| zero-shot | the models as they are pretrained |
| standalone | every device alone, as many rounds and steps, each from its own last factors |
| fedavg | plain federated LoRA (`coordinator/algorithms/fedavg.py`) |
| ours | the program itself (`coordinator/algorithms/crosslm.py`) |
| centralised | all devices' rows in one place, and as many steps as all devices take together |

| ablation | what is taken away |
|---|---|
| feedback-permuted | the small models' judgements: scores and opinions are dealt to other texts |
| labels-shuffled | the synthetic set's labels, hard and soft, are dealt to other texts |
| public-only | the devices: they send back what they got, so only the public texts can teach |
| same-steps | ours' advantage in steps: FedAvg goes on for as many steps as ours takes, the \
distillation's included |

A new program is one entry of `PROGRAMS` in `programs.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from coordinator.algorithms.crosslm import CrossLMConfig, crosslm
from coordinator.algorithms.fedavg import FedAvgConfig, fedavg
from coordinator.exchange import LocalTraining
from coordinator.families import Family
from edge_sdk.train.lora import Factors
from examples.learning.fleet import Fleet, LocalWork, package
from examples.learning.lab import SHARED, Lab, Measured

NONE = "-"
"""The program of settings without one, and the ablation of none."""

OURS, FEDAVG, STANDALONE, ZERO_SHOT, CENTRALISED = (
    "ours", "fedavg", "standalone", "zero-shot", "centralised",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Arm:
    """One row group of the table. `open_too`: whether it is defined for open answers."""

    program: str
    setting: str
    ablation: str
    run: Callable[[Lab], list[Measured]]
    open_too: bool = False

    @property
    def name(self) -> str:
        """For people: the program or the baseline, and the ablation if any."""
        shown = self.program if self.setting == OURS else self.setting
        return shown if self.ablation == NONE else f"{shown}, {self.ablation}"

    def measure(self, lab: Lab) -> list[Measured]:
        """The arm's rows on this task and seed."""
        if lab.task.is_open and not self.open_too:
            why = (
                f"not applicable: {self.program} asks for texts of a label, open answers have none"
            )
            roles = ((lab.models.slm, SHARED), ("llm", "server"))
            return [Measured(model, role, "rouge-l", why) for model, role in roles]
        return self.run(lab)


def zero_shot(lab: Lab) -> list[Measured]:
    """Nobody has learned anything."""
    return [*lab.small(SHARED, lab.start), *lab.large(lab.llm_start)]


def standalone(lab: Lab) -> list[Measured]:
    """The rounds and steps of FedAvg, without the exchange."""
    rows = []
    for name, device in lab.fleet().devices.items():
        factors = lab.start
        for step in range(lab.knobs.rounds):
            factors = lab.train(name, factors, _work(lab, seed=lab.seed + step + device.seed))
        rows += lab.small(name, factors)
    return [*rows, *lab.large(lab.llm_start)]


def centralised(lab: Lab) -> list[Measured]:
    """The upper bound."""
    everyone = len(lab.dealt.devices) * lab.knobs.rounds
    work = _work(lab, seed=lab.seed)
    small = lab.train_pooled(replace(work, steps=everyone * lab.task.steps))
    large = lab.train_llm_pooled(replace(work, steps=lab.knobs.central_llm_steps))
    return [*lab.small(SHARED, small), *lab.large(large)]


def federated(lab: Lab, *, more_rounds: int = 0) -> list[Measured]:
    """FedAvg of LoRA; `more_rounds` continue the same run."""
    rows = lab.memory.of(lambda: _federated(lab), "federated")
    return [*rows[lab.knobs.rounds + more_rounds - 1], *lab.large(lab.llm_start)]


EXTRA_ROUNDS = 1
"""FedAvg's rounds beyond ours' that make up for the steps of ours' distillation."""


def _federated(lab: Lab) -> list[list[Measured]]:
    """The small model's rows after each round."""
    exchange, fleet = lab.exchange(), lab.fleet()
    rows: list[list[Measured]] = []
    cfg = FedAvgConfig(
        rounds=lab.knobs.rounds + EXTRA_ROUNDS, learn_codec=True, training=_training(lab)
    )
    fleet.drive(
        fedavg([Family(lab.twin, exchange, fleet.cohort, "base", package)], cfg),
        after_round=lambda _: rows.append(_small_models(lab, exchange.factors, fleet)),
    )
    return rows


def cross(lab: Lab, *, learns: bool = True, **ablation: bool) -> list[Measured]:
    """CrossLM, or one of its ablations."""
    knobs = lab.knobs
    exchange, fleet = lab.exchange(), lab.fleet(learns=learns)
    lab.llm.load(lab.llm_start)
    cfg = CrossLMConfig(
        rounds=knobs.rounds,
        samples=knobs.samples,
        tau=knobs.tau,
        sharpness=knobs.sharpness,
        drop_near=False,
        llm_share=knobs.llm_share,
        distil_steps=distil_steps(lab),
        distil_batch=knobs.batch,
        distil_lr=knobs.distil_lr,
        training=_training(lab),
        update=lab.update(),
        **ablation,
    )
    fleet.drive(
        crosslm(
            lab.llm,
            [Family(lab.twin, exchange, fleet.cohort, "base", package)],
            cfg,
            public_texts=lab.dealt.public,
            seed=lab.seed,
        )
    )
    large = lab.llm.state()
    return [*_small_models(lab, exchange.factors, fleet), *lab.large(large)]


def distil_steps(lab: Lab) -> int:
    """Steps of distillation in a round: over all rounds as many as EXTRA_ROUNDS of a device."""
    return EXTRA_ROUNDS * lab.task.steps // lab.knobs.rounds


def _small_models(lab: Lab, factors: Factors, fleet: Fleet) -> list[Measured]:
    rows = lab.small(SHARED, factors)
    for device in fleet.devices.values():
        if device.own is not None:
            rows += lab.small(device.name, device.own)
    return rows


def _training(lab: Lab) -> LocalTraining:
    k = lab.knobs
    return LocalTraining(
        steps=lab.task.steps,
        batch=k.batch,
        lr=k.lr,
        synthetic_weight=k.synthetic_weight,
        ratio=k.ratio,
    )


def _work(lab: Lab, *, seed: int) -> LocalWork:
    k = lab.knobs
    return LocalWork(lab.task.steps, k.batch, k.lr, seed, (), k.synthetic_weight)


BASELINES = (
    Arm(NONE, ZERO_SHOT, NONE, zero_shot, open_too=True),
    Arm(NONE, STANDALONE, NONE, standalone, open_too=True),
    Arm(NONE, CENTRALISED, NONE, centralised, open_too=True),
)

FEDAVG_ARMS = (Arm("fedavg", FEDAVG, NONE, federated, open_too=True),)

CROSSLM_ARMS = (
    Arm("crosslm", OURS, NONE, cross),
    Arm("crosslm", OURS, "feedback-permuted", partial(cross, permute_feedback=True)),
    Arm("crosslm", OURS, "labels-shuffled", partial(cross, shuffle_labels=True)),
    Arm("crosslm", OURS, "public-only", partial(cross, learns=False)),
    Arm("crosslm", FEDAVG, "same-steps", partial(federated, more_rounds=EXTRA_ROUNDS)),
)
