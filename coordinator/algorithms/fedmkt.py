"""FedMKT: a large model and small ones of any tokenizer teach each other on public texts.

Knows the order of one round. Does not know transport, files, tokens or how a loss is computed.

Fan, Ma, Kang, Gu, Song, Fan, Chen, Yang: "FedMKT: Federated Mutual Knowledge Transfer for Large and
Small Language Models", COLING 2025 (arXiv 2406.02224), algorithms 1 and 2; PAPERS.md 2.

    line 1   for each round t:
    line 2       each device k trains theta_k on its own D_k
    line 3       each device k tells S_k = {(l_k^i, p_k^i)} of the public texts i
    line 4       the coordinator aligns p_k to the LLM's tokens (MinED, then DTW)
    line 5       k* = argmin_k l_k^i;  i enters S~_0 with p_{k*}^i if l_{k*}^i < l_0^i
    line 6       omega <- lambda CE(f(x), y) over D_p + (1 - lambda) CE(f(x), p) over S~_0
    line 7       S_0 = {(l_0^i, p_0^i)} of the LLM as it is now
    line 8       S_0 aligned to the small model's tokens;  i is kept if l_0^i < l_g^i
    line 9       theta <- lambda CE(g(x), y) over D_p + (1 - lambda) CE(g(x), p_0) over those kept

| paper | here |
|---|---|
| f, omega | `llm` and its adapter |
| g_k, theta_k | a family's twin; the adapter that device k has trained in this round |
| D_p, D_k | `public`, texts with labels; the device's examples, which no message can carry |
| l, p | `LogitTable.losses()` and its rows: k log-probabilities, never a vocabulary |
| lambda, R, E | `Lesson.share`, and steps instead of epochs |

Settings of the paper are what is passed in: several families (heterogeneous), one family of several
devices (homogeneous), one of one device (one-to-one); `teach_llm=False` is LLM2SLM, `teach_slms=
False` the other way alone.

Differences from the paper: a family's adapters are averaged (`fedavg.py`; the paper does so when
all are homogeneous) before lines 8 and 9, which are done to that average: by every device with its
own draws, or here. It is the same lesson, but what devices learned comes back coded (`lessons.py`).
Losses are compared in bits per byte of the target, which tokenizers share. A text on
which the own model is best teaches nothing. A device's rows serve until `stale_rounds` later, their
loss divided by the staleness weight, so an old teacher has to be better than a new one. What else
differs from the published code: `alignment`.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.algorithms.rounds import gathered, mean_accuracy, patiently, told
from coordinator.bank import Bank
from coordinator.exchange import LocalTraining
from coordinator.families import Families, Family
from coordinator.gate import Gate
from coordinator.lessons import Lessons
from coordinator.llm import Llm
from coordinator.peers import shuffled
from coordinator.programs import LATE_STEPS, Ask, Commit, Note, Program, Reply, Request
from coordinator.school import LLM, School
from coordinator.yardstick import Yardstick
from edge_sdk.algorithms.alignment import dtw, greedy
from edge_sdk.train.lora import from_bytes, to_bytes
from edge_sdk.train.teaching import Lesson, Pairs
from edge_sdk.wire.messages import TopLogits


@dataclass(frozen=True, slots=True)
class FedMktConfig:
    """One run of FedMKT.

    Attributes:
        rounds, need, within_s, retries, learn_codec, training: as in FedAvgConfig.
        kept: k, entries of a row.
        whole: teach every token of the public texts, not the label's word alone.
        llm, slm: lines 6 and 9.
        teach_llm, teach_slms: the two directions.
        ask_devices: line 3 by the devices; else by their replicas here, which costs no traffic.
        teach_on_devices: lines 8 and 9 by the devices that trained in the round, as in the paper;
            a family none of whose devices did them is taught here, as all are without it.
        greedy: align by bytes instead of warping.
        stale_rounds: how long a device's rows serve.
        max_rise, patience: as in Yardstick, on the held-out texts.
        shuffle_teachers: the ablation of PAPERS.md 2 (f): rows are dealt to other places.
    """

    rounds: int = 3
    need: int = 0
    within_s: float = 120.0
    retries: int = 1
    kept: int = 16
    whole: bool = False
    llm: Lesson = field(default_factory=Lesson)
    slm: Lesson = field(default_factory=Lesson)
    teach_llm: bool = True
    teach_slms: bool = True
    ask_devices: bool = True
    teach_on_devices: bool = False
    greedy: bool = False
    stale_rounds: int = LATE_STEPS
    max_rise: float = 0.5
    patience: int = 0
    shuffle_teachers: bool = False
    learn_codec: bool = True
    training: LocalTraining = field(default_factory=LocalTraining)


def fedmkt(
    llm: Llm,
    families: Sequence[Family],
    cfg: FedMktConfig,
    *,
    public: Pairs,
    held_out: Pairs = (),
    cache: Path | None = None,
    llm_gate: Gate | None = None,
    measure: Callable[[], dict[str, float]] | None = None,
    stage: Callable[[str], AbstractContextManager[object]] = nullcontext,
    seed: int,
    resume: Commit | None = None,
) -> Program:
    """Run FedMKT over the devices of `families` with the labelled texts `public` (D_p).

    `held_out` texts are never learned from: they judge rounds and end the run (`Yardstick`).
    `cache` keeps vocabulary tables. `llm_gate` judges the LLM, as each family's gate its factors.
    `measure` adds numbers to each Note; `stage` is entered around each step that takes long.

    Raises:
        QuorumMissed: too few updates, `cfg.retries` times over.
        DataError: a public label is not of the task.
        ConfigError: families that cannot be told apart.
    """
    fleet, llm_gate = Families(families), llm_gate or Gate()
    align = greedy if cfg.greedy else dtw
    school = School(llm, fleet, public, held_out, whole=cfg.whole, align=align, cache=cache)
    bank = Bank(fleet, school.small, kept=cfg.kept, stale_rounds=cfg.stale_rounds)
    lessons = Lessons(fleet, school, whole=cfg.whole, greedy=cfg.greedy)
    rise = Yardstick(cfg.max_rise, cfg.patience)
    first = 0
    if resume is not None:
        llm.load(from_bytes(resume.state["llm"]))
        bank.restore(resume.state["bank"])
        lessons.restore(resume.state.get("lessons", b""))
        rise.restore(resume.state["yardstick"])
        llm_gate.restore(resume.state["llm_gate"])
        first = resume.step + 1
    fleet.begin(resume.state if resume is not None else None)
    llm_gate.start(llm.state())
    if resume is None:
        rise.keep(school.held_out_bits(fleet))

    def held(outcome: str) -> dict[str, bytes]:
        return fleet.state() | {
            "llm": to_bytes(llm.state()),
            "bank": bank.to_bytes(),
            "lessons": lessons.to_bytes(),
            "yardstick": rise.to_bytes(),
            "llm_gate": llm_gate.to_bytes(),
            "outcome": outcome.encode(),
        }

    before = held("start")
    for step in range(first, cfg.rounds):  # line 1
        if rise.over:
            yield Note({"stopped": f"no gain on held-out texts in {rise.waited} rounds"})
            return
        training = fleet.training(step, cfg.training, need=cfg.need, within_s=cfg.within_s)
        replies = yield from patiently(training, cfg.retries)  # line 2
        with stage("aggregate"):
            merged = yield from fleet.merge(replies, learn_codec=cfg.learn_codec)
        if cfg.teach_llm and not merged.fault:
            yield from _listen(fleet, school, bank, replies, step, cfg)  # line 3
            bank.forget(merged.outliers)

        draws = np.random.default_rng([seed, step])
        said: dict[str, Any] = {"round": step, "devices": len(replies)}
        if cfg.teach_llm and not merged.fault:
            with stage("teach_llm"):
                teachers = {family.name: bank.teachers(family.name, step) for family in fleet.all}
                targets, chosen, taught = school.for_large(teachers)  # lines 4 and 5
                if cfg.shuffle_teachers:
                    targets = shuffled(targets, chosen, np.random.default_rng([seed, step, 1]))
                drawn = int(draws.integers(2**31))
                loss = school.large.learn(targets, chosen, cfg.llm, seed=drawn)  # line 6
            wrong = rise.fault(LLM, school.large.held_out_bits()) or llm_gate.measured(llm.state())
            if wrong:
                llm.load(from_bytes(before["llm"]))
                said["llm_rolled_back"] = wrong
            said |= {"llm_loss": round(loss, 4), "llm_taught": int(chosen.sum()), "by": taught}
        if cfg.teach_slms and not merged.fault:
            with stage("teach_slms"):
                table = school.large.table(cfg.kept)  # line 7
                seeds = {family.name: int(draws.integers(2**31)) for family in fleet.all}
                learned: dict[str, int] = {}
                if cfg.teach_on_devices and not cfg.shuffle_teachers:
                    able = [r for r in replies if r.device not in merged.outliers]
                    asked = lessons.ask(
                        step, able, table, cfg.slm, seeds, cfg.training.ratio, cfg.within_s
                    )
                    learned = yield from lessons.given(asked)  # lines 8 and 9
                said |= {f"lessons_{name}": count for name, count in learned.items()}
                for family in [f for f in fleet.all if f.name not in learned]:
                    family.twin.adapter.load(family.twin.factors)
                    targets, chosen = school.for_small(family.name, table)  # line 8
                    if cfg.shuffle_teachers:
                        targets = shuffled(targets, chosen, np.random.default_rng([seed, step, 2]))
                    drawn = seeds[family.name]
                    school.small[family.name].learn(targets, chosen, cfg.slm, seed=drawn)  # line 9
                    family.twin.set_global(family.twin.adapter.factors())
                    said[f"taught_{family.name}"] = int(chosen.sum())

        figures = school.held_out_bits(fleet)
        fault = merged.fault or "; ".join(
            filter(None, (rise.fault(family.name, figures[family.name]) for family in fleet.all))
        )
        if not fault:
            with stage("package"):
                last = step == cfg.rounds - 1
                wishes = fleet.packaged(step, replies, merged, program="fedmkt", whole=last)
                origin = {"public": school.digest, "rows": bank.told(), "llm": said.get("by", {})}
                wishes = [replace(w, lineage={**w.lineage, **origin}) for w in wishes]
            fault, reports = yield from fleet.release(wishes, cfg.within_s)
            said["accuracy"] = mean_accuracy(reports)
        if fault:
            fleet.undo(before)
            figures = school.held_out_bits(fleet)
        rise.keep(figures)
        said |= {f"bits_{name}": round(bits, 4) for name, bits in figures.items() if bits}
        said |= measure() if measure is not None else {}
        said |= fleet.traffic | told(merged.outliers, fault)
        yield Note(said)
        before = held("discarded" if fault else "kept")
        yield Commit(step, before)
        llm.load(from_bytes(before["llm"]))  # so that a resumed run is the same run


def _listen(
    fleet: Families,
    school: School,
    bank: Bank,
    replies: Sequence[Reply],
    step: int,
    cfg: FedMktConfig,
) -> Generator[Request, Any, None]:
    """Line 3: rows of the devices that have trained in this round, into the bank."""
    fresh = tuple(reply.device for reply in replies if reply.staleness == 0)
    if not cfg.ask_devices:
        for device in fresh:
            family = fleet.of(device)
            if device in family.twin.replicas:
                family.twin.adapter.load(family.twin.replicas[device])
                bank.put(device, step, school.small[family.name].table(cfg.kept))
        return
    texts, labels = (tuple(column) for column in zip(*school.public, strict=True))

    def task(device: str) -> TopLogits:
        family = fleet.of(device)
        return TopLogits(
            f"rows-{step}", step, family.name, family.base, texts, labels, cfg.kept, cfg.whole
        )

    if fresh:
        asked = Ask(task, fresh, len(fresh), cfg.within_s, check=bank.check)
        bank.keep((yield from gathered(asked)))
