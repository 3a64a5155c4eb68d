"""Deals a task's rows out: devices by a Dirichlet draw, public texts, rows to be measured on.

Knows rows and labels. Does not know models. Everything follows from the rows and the seed.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edge_sdk.errors import DataError
from examples.learning.tasks import BenchTask, Example, rows_of


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many rows: per device, unlabelled public texts, measured on; and Dirichlet's alpha."""

    devices: int = 4
    device_rows: int = 200
    public: int = 128
    measured: int = 250
    alpha: float = 0.5


@dataclass(frozen=True, slots=True)
class Dealt:
    """Who holds what. No text occurs in two of the three places.

    Attributes:
        public_labels: of the public texts, in their order; only FedMKT's arms are given them.
    """

    devices: dict[str, list[Example]]
    public: list[str]
    measured: list[Example]
    public_labels: list[str] = field(default_factory=list)


def dirichlet(
    groups: Mapping[str, Sequence[int]],
    *,
    devices: int,
    each: int,
    alpha: float,
    rng: np.random.Generator,
) -> list[list[int]]:
    """`each` rows for every device, its share of each group drawn from Dirichlet(alpha).

    `groups`: label -> row numbers. No row is dealt twice; a group that has run out is replaced by
    the others in proportion. Small alpha: few labels a device.

    Raises:
        DataError: fewer rows than the devices are to hold.

    Source: Hsu, Qi, Brown 2019 (arXiv 1909.06335), section 3, with an even prior.
    """
    left = {name: rng.permutation(rows).tolist() for name, rows in sorted(groups.items())}
    if sum(map(len, left.values())) < devices * each:
        raise DataError(
            f"{sum(map(len, left.values()))} rows are too few for {devices} devices of {each}"
        )
    result = []
    for _ in range(devices):
        shares = rng.dirichlet(np.full(len(left), alpha))
        held: list[int] = []
        while len(held) < each:
            open_ = np.array(
                [
                    share + 1e-9 if rows else 0.0
                    for share, rows in zip(shares, left.values(), strict=True)
                ]
            )
            wanted = rng.multinomial(each - len(held), open_ / open_.sum())
            for name, n in zip(left, wanted, strict=True):
                held += left[name][:n]
                left[name] = left[name][n:]
        result.append(held)
    return result


def deal(
    task: BenchTask,
    folder: Path,
    sizes: Sizes,
    *,
    seed: int,
    held_back: bool = False,
    verified: bool = True,
) -> Dealt:
    """The data of one (task, seed). `held_back` measures on training rows instead of test rows,
    dealt to nobody else: for choosing settings.

    Raises:
        CorpusError: a file is missing, altered or lacks a column.
        DataError: too few rows.
    """
    train, test = _examples(task, folder, verified)
    rng = np.random.default_rng([seed, *task.name.encode()])
    order = rng.permutation(len(train)).tolist()
    spare = min(sizes.measured, len(train) - sizes.devices * sizes.device_rows)
    back = [train[i] for i in order[:spare]][: sizes.measured if held_back else 0]
    rest = [train[i] for i in order[len(back) :]]
    groups: dict[str, list[int]] = {}
    for i, (_, label, group) in enumerate(rest):
        groups.setdefault(group if task.is_open else label, []).append(i)
    held = dirichlet(
        groups, devices=sizes.devices, each=sizes.device_rows, alpha=sizes.alpha, rng=rng
    )
    taken = {i for rows in held for i in rows}
    shared = [rest[i] for i in range(len(rest)) if i not in taken][: sizes.public]
    public, labels = [row[0] for row in shared], [row[1] for row in shared]
    chosen = rng.permutation(len(test))[: sizes.measured].tolist()
    measured = [row[:2] for row in back] if held_back else [test[i][:2] for i in chosen]
    if not measured:
        raise DataError(f"task {task.name} has no rows left to measure on")
    return Dealt(
        {f"device-{k}": [rest[i][:2] for i in rows] for k, rows in enumerate(held)},
        [] if task.is_open else public,
        measured,
        [] if task.is_open else labels,
    )


def shares(examples: Sequence[Example], labels: Sequence[str]) -> np.ndarray:
    """The share of each label among `examples`, (labels,)."""
    found = [label for _, label in examples]
    return np.array([found.count(label) for label in labels]) / max(1, len(found))


def _examples(
    task: BenchTask, folder: Path, verified: bool = True
) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """Train and test as (text, label, group); no text twice, none of test's in train."""
    seen: set[str] = set()
    parts: dict[str, list[tuple[str, str, str]]] = {"test": [], "train": []}
    for part, file in (("test", task.test), ("train", task.train)):
        for row in rows_of(folder, file, verified):
            read = task.read(row)
            if read is None:
                continue
            text, label = read
            name = " ".join(text.lower().split())
            is_test = _share(name) < task.test_share
            wrong_part = task.test_share > 0 and is_test != (part == "test")
            if name in seen or wrong_part:
                continue
            if not task.is_open and label not in task.labels:
                raise DataError(
                    f"{file.path} holds the label {label!r}; "
                    f"task {task.name} has {', '.join(task.labels)}"
                )
            seen.add(name)
            parts[part].append((text, label, str(row.get(task.group, ""))))
    return parts["train"], parts["test"]


def _share(name: str) -> float:
    """A number in [0, 1) that a text always gets."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
