"""CrossLM: small models judge what the large one writes; both get better, the data stay put.

Knows the order of one round between devices, their twin and the LLM. Does not know transport,
files, ONNX or how any of the parts it is given works.

Deng, Qiao, Ren, Liu, Zhang: "Mutual Enhancement of Large and Small Language Models with Cross-Silo
Knowledge Transfer" (CrossLM), arXiv 2312.05842, 2023; rebuilt from PAPERS.md 1 (b).

    line 1   for each round:
    line 2       each device k trains its small model w_k on D_k (and on S, weight mu)
    line 3       the coordinator keeps the newest w_k of every device
    line 4       y_i ~ U(labels);  x_i ~ p_theta( . | prompt(y_i)),  i = 1..N
    line 5       s_i = mean_k p_{w_k}(y_i | x_i)
    line 6       theta <- one pass of L_gen(s) + beta L_und(S) + lambda L_reg
    line 7       S = {(x_i, y_i) : s_i >= tau}
    line 8       S goes to the devices

| paper | here |
|---|---|
| w_k | `twin.replicas[k]`: its family's base plus the device's decoded adapter |
| theta, theta_0 | `llm` with its adapter on, and off |
| D_k | the device's examples; no message can carry them |
| S, tau | `Pool`, `CrossLMConfig.tau` |
| beta, lambda, mu | `Update.beta`, `Update.reg`, `LocalTraining.synthetic_weight` |

Differences from the paper: devices send encoded LoRA updates instead of weights, so w_k is the
server's replica and line 5 costs no traffic (`score_on_devices` asks the devices instead); the
updates of one family are also averaged (as in fedavg.py), since its devices share a shape; after
line 7 each family's averaged small model is distilled on S with soft labels of the LLM and of all
families' replicas and published, which the paper leaves to the devices; S is deduplicated and texts
that name their own label are dropped (both inflate s); N can be divided over temperatures and
writers by what was of use before (`osca.py`); N and all weights are ours, the paper's were not
found. The LLM sees no label but those it asked for itself, and `public_texts` only as the replicas
label them.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from coordinator.algorithms.rounds import gathered, mean_accuracy, patiently, told
from coordinator.distill import distil, sharpen
from coordinator.diversity import diversity
from coordinator.exchange import LocalTraining
from coordinator.families import Families, Family
from coordinator.llm import Llm, Update, Written
from coordinator.programs import Ask, Commit, Note, Program, Request
from coordinator.sampling import Sampler, Way
from coordinator.synthetic import Pool, joined, shuffled_labels, uniform_labels, worth_keeping
from coordinator.yardstick import Yardstick
from edge_sdk.errors import RemoteProtocolError
from edge_sdk.train.lora import from_bytes, to_bytes
from edge_sdk.wire.messages import AnyMessage, Score, Scores, TextTask

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class CrossLMConfig:
    """One run of CrossLM.

    Attributes:
        rounds, need, within_s, retries: as in FedAvgConfig.
        samples: N, texts written per round.
        tau: least score of a text that enters S.
        temperature, top_p, max_new_tokens: how the LLM samples.
        more_temperatures: further temperatures; OSCA then divides N by what was of use before.
        frozen_writer: the LLM's frozen start writes too, which cannot collapse.
        drop_near: texts nearly like one in S do not enter it.
        pool: most texts S may hold; the best-scored stay.
        min_texts: fewer texts than this, or texts of fewer than half the labels, are not distilled
            on: a handful of one label teaches a small model to say nothing else (seen: from 0.26
            to chance in 20 steps).
        llm_share: most share of the LLM in the soft labels; the replicas have the rest. It is
            multiplied by the share of texts on which both agree: an LLM that does not know the
            task yet says one label of everything, and did spoil the small model (0.52 to 0.27).
        sharpness: power to which the jury's probabilities are raised before they teach; a mean of
            votes is less sure than it is right (seen: 0.44 and 0.57).
        distil_steps, distil_batch, distil_lr: the server's distillation; 0 steps leaves it out.
        score_on_devices: line 5 by the devices themselves.
        permute_feedback: the ablation of PAPERS.md 1 (f): scores are shuffled among the texts, and
            opinions among the public texts.
        permute_scores: a finer ablation: the scores are shuffled, the opinions stay.
        shuffle_labels: the ablation of S: its labels, hard and soft, are dealt to other texts for
            everyone who learns from them.
        patience: rounds in which neither the devices' mean accuracy nor `measure`'s figures gain,
            after which the run ends; 0: never.
        learn_codec: fit the learned codec on the first round's updates.
    """

    rounds: int = 3
    need: int = 0
    within_s: float = 120.0
    retries: int = 1
    samples: int = 96
    tau: float = 0.3
    temperature: float = 0.9
    more_temperatures: tuple[float, ...] = ()
    frozen_writer: bool = False
    drop_near: bool = True
    top_p: float = 0.95
    max_new_tokens: int = 28
    pool: int = 512
    min_texts: int = 24
    llm_share: float = 0.3
    sharpness: float = 1.5
    distil_steps: int = 40
    distil_batch: int = 16
    distil_lr: float = 2e-3
    score_on_devices: bool = False
    permute_feedback: bool = False
    permute_scores: bool = False
    shuffle_labels: bool = False
    patience: int = 0
    learn_codec: bool = True
    training: LocalTraining = field(default_factory=LocalTraining)
    update: Update = field(default_factory=Update)

    def ways(self) -> list[Way]:
        """The ways of writing among which a round's texts are divided."""
        hot = [self.temperature, *self.more_temperatures]
        frozen = [Way("start", heat) for heat in hot] if self.frozen_writer else []
        return [Way("llm", heat) for heat in hot] + frozen


def crosslm(
    llm: Llm,
    families: Sequence[Family],
    cfg: CrossLMConfig,
    *,
    public_texts: Sequence[str] = (),
    measure: Callable[[], dict[str, float]] | None = None,
    stage: Callable[[str], AbstractContextManager[object]] = nullcontext,
    seed: int,
    resume: Commit | None = None,
) -> Program:
    """Run CrossLM over the devices of `families`, which may differ in model and tokenizer.

    The last round's release of a family is a whole new model with the adapter merged in, where the
    family has a `package_model`. `measure` adds numbers to each Note; `stage` is entered around
    each step that takes long, with its name. The families' gates decide whether a round is kept;
    one that is not leaves the LLM, S and every small model as they were before it.

    Raises:
        ConfigError: families that cannot run together.
        QuorumMissed: too few updates, `cfg.retries` times over.
    """
    fleet, pool, task = Families(families), Pool(), llm.reader.task
    sampler = Sampler(cfg.ways(), task.labels)
    gains = Yardstick(math.inf, cfg.patience)
    first, version = 0, 0
    if resume is not None:
        llm.load(from_bytes(resume.state["llm"]))
        pool.restore(resume.state["pool"])
        sampler.restore(resume.state["sampler"])
        gains.restore(resume.state["gains"])
        version, first = int(resume.state["version"]), resume.step + 1
    fleet.begin(resume.state if resume is not None else None)

    def held(outcome: str) -> dict[str, bytes]:
        return fleet.state() | {
            "llm": to_bytes(llm.state()),
            "pool": pool.to_bytes(),
            "sampler": sampler.to_bytes(),
            "gains": gains.to_bytes(),
            "version": str(version).encode(),
            "outcome": outcome.encode(),
        }

    before = held("start")
    for step in range(first, cfg.rounds):  # line 1
        if gains.over:
            yield Note({"stopped": f"no gain in {gains.waited} rounds"})
            return
        training = fleet.training(step, cfg.training, need=cfg.need, within_s=cfg.within_s)
        replies = yield from patiently(training, cfg.retries)  # line 2
        with stage("aggregate"):
            merged = yield from fleet.merge(replies, learn_codec=cfg.learn_codec)  # line 3
        if merged.fault:
            fleet.undo(before)
            yield Note(
                {"round": step, "devices": len(replies), **told(merged.outliers, merged.fault)}
            )
            before = held("discarded")
            yield Commit(step, before)
            continue

        rng = np.random.default_rng([seed, step])
        with stage("generate"):
            written, ways = write(llm, sampler, cfg, rng)  # line 4
        with stage("score"):
            opinions = fleet.calibrate(public_texts) if public_texts else no_opinions(task)
            scores = picked(fleet.jury(written.texts), written, task)  # line 5
        if cfg.score_on_devices:
            judged = yield from asked(fleet, step, written, cfg.within_s)
            scores = judged if judged is not None else scores
        feedback = scores
        if cfg.permute_feedback:
            feedback, opinions = rng.permutation(scores), rng.permutation(opinions)
        unpaired = np.random.default_rng([seed, step, 1])  # draws of ablations only
        if cfg.permute_scores:
            feedback = unpaired.permutation(scores)
        if cfg.shuffle_labels:
            written = shuffled_labels(written, unpaired)
        with stage("update"):
            losses = llm.update(  # line 6
                written,
                feedback.tolist(),
                cfg.update,
                seed=int(rng.integers(2**31)),
                public=public_texts,
                opinions=sharpen(opinions, 1 / cfg.sharpness),
            )
        chosen = worth_keeping(  # line 7
            task, written, feedback, cfg.tau, held=pool.texts, near_too=cfg.drop_near
        )
        of_use = set(chosen)
        sampler.learn(ways, written.labels, [i in of_use for i in range(len(ways))])
        pool.add(
            [written.texts[i] for i in chosen],
            [written.labels[i] for i in chosen],
            [float(feedback[i]) for i in chosen],
        )
        pool.trim(cfg.pool)
        with stage("distil"):
            distilled, agreement = _distil(
                llm, fleet, pool, public_texts, opinions, cfg, seed=int(rng.integers(2**31))
            )
        if pool.texts:
            version = max(version, step) + 1
            yield fleet.tell(pool.offer(version))  # line 8

        with stage("package"):
            wishes = fleet.packaged(
                step, replies, merged, program="crosslm", whole=step == cfg.rounds - 1
            )
        fault, reports = yield from fleet.release(wishes, cfg.within_s)
        numbers = measure() if measure is not None else {}
        if fault:
            fleet.undo(before)
            llm.load(from_bytes(before["llm"]))
            pool.restore(before["pool"])
            sampler.restore(before["sampler"])
            version += 1
            yield fleet.tell(pool.offer(version))  # S as it was, in place of this round's
        accuracy = mean_accuracy(reports)
        gains.keep(_errors({"devices": None if fault else accuracy, **numbers}))
        yield Note(
            {
                "round": step,
                "devices": len(replies),
                **fleet.traffic,
                "discarded": round(merged.discarded, 6),
                "score": round(float(np.mean(scores)), 4),
                "kept": len(chosen),
                "pool": len(pool.texts),
                "distil_loss": round(distilled, 4),
                "agreement": round(agreement, 4),
                "accuracy": accuracy,
                **diversity(written.texts).told(),
                **{f"loss_{key}": round(value, 4) for key, value in losses.items()},
                **numbers,
                **told(merged.outliers, fault),
            }
        )
        before = held("discarded" if fault else "kept")
        yield Commit(step, before)
        llm.load(from_bytes(to_bytes(llm.state())))  # so that a resumed run is the same run


def _errors(accuracies: Mapping[str, float | None]) -> dict[str, float | None]:
    """1 - accuracy: a yardstick's figures are better the lower they are."""
    return {name: None if one is None else 1.0 - one for name, one in accuracies.items()}


def write(
    llm: Llm, sampler: Sampler, cfg: CrossLMConfig, rng: np.random.Generator
) -> tuple[Written, list[int]]:
    """A round's texts, and which of the sampler's ways wrote each."""
    labels = uniform_labels(llm.reader.task, cfg.samples, rng)
    seeds = rng.integers(2**31, size=len(sampler.ways)).tolist()
    parts, ways, start = [], [], 0
    for i, (way, n) in enumerate(zip(sampler.ways, sampler.divide(len(labels)), strict=True)):
        with llm.adapter.off() if way.writer == "start" else nullcontext():
            parts.append(
                llm.generate(
                    labels[start : start + n],
                    seed=seeds[i],
                    temperature=way.temperature,
                    top_p=cfg.top_p,
                    max_new_tokens=cfg.max_new_tokens,
                )
            )
        ways += [i] * n
        start += n
    return joined(parts), ways


def picked(probs: F32, written: Written, task: TextTask) -> F32:
    """s_i: the probability that `probs` (n, labels) gives the label asked for, (n,).

    Source: CrossLM (arXiv 2312.05842), feedback of the small models; PAPERS.md 1 (b).
    """
    wanted = [task.labels.index(label) for label in written.labels]
    result: F32 = probs[np.arange(len(wanted)), wanted]
    return result


def asked(
    fleet: Families, step: int, written: Written, within_s: float
) -> Generator[Request, Any, F32 | None]:
    """The mean scores of the devices that gave any, (n,); None if nobody did.

    Who lies or is silent is left out, and the others count. A text of nothing is scored 0 and
    sent to nobody: an encoder would refuse it, and all with it.
    """
    rows = [i for i, text in enumerate(written.texts) if text.strip()]
    texts = tuple(written.texts[i] for i in rows)
    labels = tuple(written.labels[i] for i in rows)

    def task(device: str) -> AnyMessage:
        return Score(f"score-{step}", fleet.of(device).base, texts, labels)

    def check(_device: str, message: AnyMessage) -> None:
        if isinstance(message, Scores) and len(message.scores) != len(texts):
            raise RemoteProtocolError(f"{len(message.scores)} scores came for {len(texts)} texts")

    request = Ask(task, fleet.cohort, len(fleet.cohort), within_s, check)
    verdicts = yield from gathered(request)
    found = [reply.message.scores for reply in verdicts if isinstance(reply.message, Scores)]
    if not found:
        return None
    scores = np.zeros(len(written.texts), np.float32)
    scores[rows] = np.mean(found, axis=0)
    return scores


def no_opinions(task: TextTask) -> F32:
    """What a jury says of no texts, (0, labels)."""
    return np.zeros((0, len(task.labels)), np.float32)


def _distil(
    llm: Llm,
    fleet: Families,
    pool: Pool,
    public: Sequence[str],
    opinions: F32,
    cfg: CrossLMConfig,
    *,
    seed: int,
) -> tuple[float, float]:
    """Loss of the distillation, and the share of texts on which the LLM and the jury agree."""
    texts = [*pool.texts, *public]
    if len(texts) < cfg.min_texts or cfg.distil_steps == 0:
        return 0.0, 0.0
    jury = np.concatenate([fleet.jury(pool.texts), opinions]) if pool.texts else opinions
    large = llm.probs(texts)
    agreement = float(np.mean(large.argmax(axis=1) == jury.argmax(axis=1)))
    share = cfg.llm_share * agreement
    soft = share * large + (1 - share) * sharpen(jury, 1 / cfg.sharpness)
    if cfg.shuffle_labels:
        made = np.random.default_rng([seed, 1]).permutation(len(pool.texts))
        soft = np.concatenate([soft[made], soft[len(made) :]])
    likely = np.bincount(soft.argmax(axis=1), minlength=soft.shape[1])  # texts per label
    if 2 * int((likely > 0).sum()) < len(likely):
        return 0.0, agreement
    losses = [
        distil(
            family.twin,
            texts,
            soft.astype(np.float32),
            steps=cfg.distil_steps,
            batch=cfg.distil_batch,
            lr=cfg.distil_lr,
            seed=seed,
            weights=[*pool.scores, *[1.0] * len(public)],
        )
        for family in fleet.all
    ]
    return float(np.mean(losses)), agreement
