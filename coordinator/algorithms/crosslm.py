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
| w_k | `twin.replicas[k]`: the family's base plus the device's decoded adapter |
| theta, theta_0 | `llm` with its adapter on, and off |
| D_k | the device's examples; no message can carry them |
| S, tau | `Pool`, `CrossLMConfig.tau` |
| beta, lambda, mu | `Update.beta`, `Update.reg`, `LocalTraining.synthetic_weight` |

Differences from the paper: devices send encoded LoRA updates instead of weights, so w_k is the
server's replica and line 5 costs no traffic (`score_on_devices` asks the devices instead); the
updates are also averaged (as in fedavg.py), since all devices of a family share a shape; after line
7 the averaged small model is distilled on S with soft labels of LLM and replicas and published,
which the paper leaves to the devices; S is deduplicated and texts that name their own label are
dropped (both inflate s); N and all weights are ours, the paper's were not found. The LLM sees no
label but those it asked for itself, and `public_texts` only as the replicas label them.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from coordinator.algorithms.fedavg import Package
from coordinator.algorithms.rounds import (
    lineage,
    mean_accuracy,
    measured,
    merge,
    patiently,
    told,
    tried,
)
from coordinator.distill import distil, sharpen, synthetic_from_bytes, synthetic_to_bytes
from coordinator.exchange import AdapterExchange, LocalTraining
from coordinator.gate import Gate
from coordinator.llm import Llm, Update, Written
from coordinator.programs import Ask, Commit, Note, Program, Publish, Reply, Tell
from coordinator.twin import Twin
from edge_sdk.train.lora import from_bytes, to_bytes
from edge_sdk.wire.messages import OfferData, Score, Scores, TextTask

F32 = npt.NDArray[np.float32]

MIN_WORDS = 3
"""A generated request of fewer words says nothing that a label could be told from."""


@dataclass(frozen=True, slots=True)
class CrossLMConfig:
    """One run of CrossLM.

    Attributes:
        rounds, need, within_s, retries: as in FedAvgConfig.
        samples: N, texts written per round.
        tau: least score of a text that enters S.
        temperature, top_p, max_new_tokens: how the LLM samples.
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
        learn_codec: fit the learned codec on the first round's updates.
    """

    rounds: int = 3
    need: int = 0
    within_s: float = 120.0
    retries: int = 1
    samples: int = 96
    tau: float = 0.3
    temperature: float = 0.9
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
    learn_codec: bool = True
    training: LocalTraining = field(default_factory=LocalTraining)
    update: Update = field(default_factory=Update)


@dataclass(slots=True)
class Pool:
    """S: synthetic texts, their labels and scores."""

    texts: list[str]
    labels: list[str]
    scores: list[float]

    def add(self, texts: Sequence[str], labels: Sequence[str], scores: Sequence[float]) -> None:
        """Take in more; a text already held keeps its place."""
        held = {fingerprint(text) for text in self.texts}
        for text, label, score in zip(texts, labels, scores, strict=True):
            if fingerprint(text) not in held:
                held.add(fingerprint(text))
                self.texts.append(text)
                self.labels.append(label)
                self.scores.append(float(score))

    def trim(self, size: int) -> None:
        """Keep the `size` best-scored."""
        order = sorted(range(len(self.texts)), key=lambda i: (-self.scores[i], self.texts[i]))
        keep = sorted(order[:size])
        self.texts = [self.texts[i] for i in keep]
        self.labels = [self.labels[i] for i in keep]
        self.scores = [self.scores[i] for i in keep]

    def offer(self, version: int) -> OfferData:
        """The message that brings S to a device."""
        return OfferData(
            task_id=f"data-{version}",
            version=version,
            texts=tuple(self.texts),
            labels=tuple(self.labels),
            weights=tuple(min(1.0, max(0.0, score)) for score in self.scores),
        )


def crosslm(
    llm: Llm,
    twin: Twin,
    exchange: AdapterExchange,
    cohort: tuple[str, ...],
    cfg: CrossLMConfig,
    *,
    base: str,
    package: Package,
    package_model: Package | None = None,
    public_texts: Sequence[str] = (),
    measure: Callable[[], dict[str, float]] | None = None,
    stage: Callable[[str], AbstractContextManager[object]] = nullcontext,
    seed: int,
    gate: Gate | None = None,
    resume: Commit | None = None,
) -> Program:
    """Run CrossLM over the devices of `cohort`, whose bundle is release `base`.

    `package` writes an adapter release; `package_model`, when given, writes the last round's
    release as a whole new model with the adapter merged in. `measure` adds numbers to each Note;
    `stage` is entered around each step that takes long, with its name. `gate` decides whether a
    round is kept; one that is not leaves LLM, S and small model as they were before it.

    Raises:
        QuorumMissed: too few updates, `cfg.retries` times over.
    """
    pool, gate = Pool([], [], []), gate or Gate()
    first, version, kept = 0, 0, base
    if resume is not None:
        exchange.restore(resume.state["exchange"])
        llm.load(from_bytes(resume.state["llm"]))
        pool = Pool(*synthetic_from_bytes(resume.state["pool"]))
        gate.restore(resume.state.get("gate", b""))
        kept = resume.state.get("kept", base.encode()).decode()
        version = int(resume.state.get("version", b"%d" % (resume.step + 1)))
        first = resume.step + 1
    gate.start(exchange.factors)
    twin.restore(exchange.factors, exchange.replicas)
    task = llm.reader.task

    def held(outcome: str) -> dict[str, bytes]:
        return {
            "exchange": exchange.state(),
            "llm": to_bytes(llm.state()),
            "pool": synthetic_to_bytes(pool.texts, pool.labels, pool.scores),
            "gate": gate.to_bytes(),
            "kept": kept.encode(),
            "version": str(version).encode(),
            "outcome": outcome.encode(),
        }

    def undo(state: Mapping[str, bytes]) -> None:
        exchange.roll_back(state["exchange"])
        llm.load(from_bytes(state["llm"]))
        pool.texts, pool.labels, pool.scores = synthetic_from_bytes(state["pool"])
        gate.restore(state["gate"])
        twin.restore(exchange.factors, exchange.replicas)

    before = held("start")
    for step in range(first, cfg.rounds):  # line 1
        training = Ask(
            exchange.start(step, base, cfg.training),
            cohort,
            need=cfg.need or len(cohort),
            within_s=cfg.within_s,
            check=exchange.check(),
        )
        replies = yield from patiently(training, cfg.retries)  # line 2
        with stage("aggregate"):
            merged, changes, fault = yield from merge(exchange, gate, replies)  # line 3
        if fault:
            undo(before)
            yield Note({"round": step, "devices": len(replies), **told(merged, fault)})
            before = held("discarded")
            yield Commit(step, before)
            continue
        assert merged is not None, "without a fault there is an aggregate"
        if cfg.learn_codec and exchange.codec.basis is None:
            exchange.learn_codec(changes)
        twin.restore(exchange.factors, exchange.replicas)

        rng = np.random.default_rng([seed, step])
        with stage("generate"):
            written = llm.generate(  # line 4
                uniform_labels(task, cfg.samples, rng),
                seed=int(rng.integers(2**31)),
                temperature=cfg.temperature,
                top_p=cfg.top_p,
                max_new_tokens=cfg.max_new_tokens,
            )
        with stage("score"):
            opinions = twin.calibrate(public_texts) if public_texts else no_opinions(task)
            scores = twin.score(written.texts, written.labels)  # line 5
        if cfg.score_on_devices:
            judged = Score(f"score-{step}", base, tuple(written.texts), tuple(written.labels))
            verdicts = yield from measured(Ask(judged, cohort, len(cohort), cfg.within_s))
            scores = mean_scores(verdicts, otherwise=scores)
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
        chosen = worth_keeping(task, written, feedback, cfg.tau)  # line 7
        pool.add(
            [written.texts[i] for i in chosen],
            [written.labels[i] for i in chosen],
            [float(feedback[i]) for i in chosen],
        )
        pool.trim(cfg.pool)
        with stage("distil"):
            distilled, agreement = _distil(
                llm, twin, pool, public_texts, opinions, cfg, seed=int(rng.integers(2**31))
            )
        exchange.set_global(twin.factors)
        if pool.texts:
            version = max(version, step) + 1
            yield Tell(pool.offer(version), cohort)  # line 8

        whole = package_model if step == cfg.rounds - 1 else None
        name = f"{base}-distilled" if whole else f"{base}-crosslm-{step + 1}"
        with stage("package"):
            folder = (whole or package)(name, exchange.factors)
        made_from = lineage(step, replies, merged)
        wish = Publish(exchange.family, name, folder, None if whole else base, made_from)
        fault, reports = yield from tried(wish, cohort, cfg.within_s, gate, instead=kept)
        numbers = measure() if measure is not None else {}
        if fault:
            undo(before)
            version += 1
            yield Tell(pool.offer(version), cohort)  # S as it was, in place of this round's
        else:
            kept = name
        yield Note(
            {
                "round": step,
                "devices": len(replies),
                "discarded": round(merged.discarded, 6),
                "score": round(float(np.mean(scores)), 4),
                "kept": len(chosen),
                "pool": len(pool.texts),
                "distinct": round(distinct(written.texts), 4),
                "distil_loss": round(distilled, 4),
                "agreement": round(agreement, 4),
                "accuracy": mean_accuracy(reports),
                **{f"loss_{key}": round(value, 4) for key, value in losses.items()},
                **numbers,
                **told(merged, fault),
            }
        )
        before = held("discarded" if fault else "kept")
        yield Commit(step, before)
        llm.load(from_bytes(to_bytes(llm.state())))  # so that a resumed run is the same run


def uniform_labels(task: TextTask, n: int, rng: np.random.Generator) -> list[str]:
    """y_i ~ U(labels), with every label as often as any other (give or take one), shuffled."""
    order = [task.labels[i % len(task.labels)] for i in range(n)]
    return [order[i] for i in rng.permutation(n)]


def shuffled_labels(written: Written, rng: np.random.Generator) -> Written:
    """The same texts and the same labels, paired at random."""
    order = rng.permutation(len(written.labels)).tolist()
    return replace(written, labels=[written.labels[i] for i in order])


def mean_scores(verdicts: tuple[Reply, ...], *, otherwise: F32) -> F32:
    """Mean of the devices' scores, (n,); `otherwise` where no device gave as many as were asked."""
    rows = [
        reply.message.scores
        for reply in verdicts
        if isinstance(reply.message, Scores) and len(reply.message.scores) == len(otherwise)
    ]
    return np.mean(rows, axis=0).astype(np.float32) if rows else otherwise


def no_opinions(task: TextTask) -> F32:
    """What a jury says of no texts, (0, labels)."""
    return np.zeros((0, len(task.labels)), np.float32)


def worth_keeping(task: TextTask, written: Written, scores: F32, tau: float) -> list[int]:
    """Rows of `written` fit for S: scored at least tau, MIN_WORDS long, not a repetition, and not
    naming the label they were asked for (such a text is judged by its label word alone)."""
    words = dict(zip(task.labels, (word.strip().lower() for word in task.words), strict=True))
    seen: set[str] = set()
    rows = []
    for i, (text, label) in enumerate(zip(written.texts, written.labels, strict=True)):
        name = fingerprint(text)
        said = re.findall(r"\w+", text.lower())
        if scores[i] < tau or len(said) < MIN_WORDS or name in seen or words[label] in said:
            continue
        seen.add(name)
        rows.append(i)
    return rows


def fingerprint(text: str) -> str:
    """The text without case and spacing, hashed: equal for repetitions, unreadable in a log."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()


def distinct(texts: Sequence[str]) -> float:
    """Share of different word pairs among all (distinct-2); low when the writer repeats itself."""
    pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def _distil(
    llm: Llm,
    twin: Twin,
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
    jury = np.concatenate([twin.jury(pool.texts), opinions]) if pool.texts else opinions
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
    loss = distil(
        twin,
        texts,
        soft.astype(np.float32),
        steps=cfg.distil_steps,
        batch=cfg.distil_batch,
        lr=cfg.distil_lr,
        seed=seed,
        weights=[*pool.scores, *[1.0] * len(public)],
    )
    return loss, agreement
