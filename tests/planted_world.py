"""A language with a rule, two small models that know it and a pupil that has seen a few texts.

Words follow one another by a fixed chain of four successors each, so what a teacher knows (the
chances) is more than a text shows (one draw of them). Models are random ones with an adapter; the
teachers have read many texts of the language, the pupil shares `PUBLIC` texts with them.
"""

from collections.abc import Sequence

import numpy as np
from learning_world import FILLERS, TASK, model
from mkt_world import model_of, reader_of

from coordinator.peers import (
    Bridge,
    Peer,
    joined_targets,
    shuffled,
)
from edge_sdk.algorithms.alignment import Targets
from edge_sdk.algorithms.selection import bits_per_byte, dual_min_ce
from edge_sdk.algorithms.vocabulary import NONE
from edge_sdk.train.lora import Adapter, Factors, LoraSpec
from edge_sdk.train.teaching import Lesson, target_bytes

SPEC = LoraSpec(
    8, 16.0, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
)
PUBLIC, PRIVATE, KEPT = 12, 300, 12
SHARES = (0.55, 0.25, 0.15, 0.05)

T_95 = 2.132
"""Student's t of four degrees of freedom that chance exceeds in one of twenty, one-sided."""

ARMS = ("labels only", "teachers", "teachers shuffled")


def _chain() -> np.ndarray:
    rng = np.random.default_rng(0)
    chances = np.zeros((len(FILLERS), len(FILLERS)))
    for word in range(len(FILLERS)):
        chances[word, rng.choice(len(FILLERS), 4, replace=False)] = SHARES
    return chances


CHAIN = _chain()


def corpus(n: int, *, seed: int) -> list[tuple[str, str]]:
    """Eight words each, drawn along the chain; the first decides the label."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        words = [int(rng.integers(len(FILLERS)))]
        for _ in range(7):
            words.append(int(rng.choice(len(FILLERS), p=CHAIN[words[-1]])))
        rows.append((" ".join(FILLERS[i] for i in words), TASK.labels[words[0] % 3]))
    return rows


HELD_OUT = corpus(40, seed=999)


def peer(kind: str, pairs: list[tuple[str, str]], *, seed: int) -> Peer:
    """A model that knows nothing: "llm", or one of the families; every token is to be predicted."""
    large = kind == "llm"
    made = model(width=48, seed=seed + 40) if large else model_of(kind)
    return Peer(
        Adapter(made, SPEC), reader_of("words" if large else kind), pairs, HELD_OUT, whole=True
    )


def read(one: Peer, how: Lesson, *, seed: int) -> None:
    """Learn the peer's own texts, without any teacher."""
    n = len(one.places.tokens)
    nobody = Targets(one.places, np.zeros((n, 1), np.int64), np.zeros((n, 1), np.float32))
    one.learn(nobody, np.zeros(len(one.rows), bool), how, seed=seed)


def taught_bits(
    pupil: Peer, start: Factors, teachers: Sequence[Peer], how: Lesson, *, seed: int
) -> dict[str, float]:
    """Held-out bits per byte of the pupil by arm: every arm begins at `start` with equal draws."""
    pupil.adapter.load(start)
    sizes = target_bytes(reader_of("words"), corpus(PUBLIC, seed=100 + seed), whole=True)
    tables = [one.table(KEPT) for one in teachers]
    bits = np.stack([bits_per_byte(table.losses(), sizes) for table in tables])
    best = dual_min_ce(bits_per_byte(pupil.losses(), sizes), bits)
    parts = [
        (best == i, Bridge(one, pupil).carry(table))
        for i, (one, table) in enumerate(zip(teachers, tables, strict=True))
    ]
    targets, chosen = joined_targets(pupil.places, parts), best != NONE
    mixed = shuffled(targets, chosen, np.random.default_rng(seed))
    alone = Lesson(1.0, how.steps, how.batch, how.lr)
    found = {}
    for arm, soft, lesson in zip(ARMS, (targets, targets, mixed), (alone, how, how), strict=True):
        pupil.adapter.load(start)
        pupil.learn(soft, chosen, lesson, seed=seed)
        figure = pupil.held_out_bits()
        assert figure is not None
        found[arm] = figure
    return found


def gain(rows: Sequence[dict[str, float]], *, over: str) -> float:
    """Paired t of the bits per byte that teachers save, one row a seed."""
    saved = np.array([row[over] - row["teachers"] for row in rows])
    return float(saved.mean() / (saved.std(ddof=1) / np.sqrt(len(saved))))
