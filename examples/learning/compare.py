"""From rows to a table and to claims: what holds, and what does not.

Knows the result's rows and the names of arms. Does not know how they were measured.

A setting's small-model score is that of the model its devices end with: the shared one, or without
one the mean over the devices' own. A claim "ours is better than X" holds when the mean difference
over the seeds is above 0 and the two-sided paired t-test, corrected after Holm over the tasks,
gives p < 0.05. The exact sign-flip p is printed beside it. With few seeds a true but small gain
will not hold; that is the price of not claiming a false one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from examples.learning.results import Row
from examples.learning.statistics import Paired, deviation, holm, mean, paired

LEVEL = 0.05
MEASURES = ("accuracy", "rouge-l")

Key = tuple[str, str, str, str]
"""task, program, setting, ablation."""

ArmKey = tuple[str, str, str]
"""program, setting, ablation."""

Scores = dict[Key, dict[str, dict[int, float]]]
"""Key -> "small" or "LLM" -> seed -> score."""

SMALL, LARGE = "small", "LLM"
OVERALL = "all tasks"


@dataclass(frozen=True, slots=True)
class Claim:
    """`program` against `other` on one task (or on the mean of all) for one kind of model."""

    program: str
    other: str
    task: str
    kind: str
    test: Paired
    p: float

    @property
    def holds(self) -> bool:
        """Better, and hardly by chance."""
        return self.test.mean > 0 and self.p < LEVEL

    def line(self) -> str:
        """For people."""
        said = "holds" if self.holds else "does not hold"
        t = self.test
        return (
            f"{self.program} better than {self.other}, {self.kind} model, {self.task}: {said} "
            f"({100 * t.mean:+.1f} points, sd {100 * t.deviation:.1f}, n {t.n}, "
            f"p {self.p:.3f} corrected, t {t.p_t:.3f}, sign flips {t.p_flip:.3f})"
        )


def scores(rows: Iterable[Row]) -> Scores:
    """One score per arm, kind of model and seed; rows that say "not applicable" have none."""
    gathered: dict[tuple[Key, str, int], dict[str, float]] = {}
    for row in rows:
        if row.metric not in MEASURES or isinstance(row.value, str):
            continue
        program, task, setting, ablation, seed = row.unit
        kind = LARGE if row.model == "llm" else SMALL
        place = gathered.setdefault(((task, program, setting, ablation), kind, seed), {})
        place[row.role] = row.value
    result: Scores = {}
    for (key, kind, seed), roles in gathered.items():
        value = roles["shared"] if "shared" in roles else mean(list(roles.values()))
        result.setdefault(key, {}).setdefault(kind, {})[seed] = value
    return result


def table(found: Scores, tasks: Sequence[str], arms: Sequence[tuple[str, ArmKey]]) -> str:
    """Mean and standard deviation in per cent; `arms` come with their shown names."""
    names = [name for name, _ in arms]
    wide = max(map(len, names)) + 2
    lines = []
    for kind in (SMALL, LARGE):
        lines += [f"{kind} model, per cent, mean ± standard deviation over seeds", ""]
        lines.append("".ljust(wide) + "".join(task.rjust(13) for task in tasks))
        for name, arm in arms:
            cells = [_cell(found.get((task, *arm), {}).get(kind, {})) for task in tasks]
            lines.append(name.ljust(wide) + "".join(cell.rjust(13) for cell in cells))
        lines.append("")
    return "\n".join(lines)


def _cell(by_seed: Mapping[int, float]) -> str:
    values = [100 * value for value in by_seed.values()]
    return f"{mean(values):.1f} ± {deviation(values):.1f}" if values else "n/a"


def claims(
    found: Scores, program: str, tasks: Sequence[str], against: Sequence[tuple[str, ArmKey]]
) -> list[Claim]:
    """Ours against each arm of `against`: every task, corrected over tasks, and their mean."""
    result = []
    for name, arm in against:
        for kind in (SMALL, LARGE):
            pairs: dict[str, tuple[list[float], list[float]]] = {}
            for task in tasks:
                ours = found.get((task, program, "ours", "-"), {}).get(kind, {})
                theirs = found.get((task, *arm), {}).get(kind, {})
                seeds = sorted(set(ours) & set(theirs))
                if seeds:
                    pairs[task] = [ours[s] for s in seeds], [theirs[s] for s in seeds]
            if kind == LARGE and all(a == b for a, b in pairs.values()):
                continue
            tests = {task: paired(a, b) for task, (a, b) in pairs.items()}
            corrected = holm([test.p_t for test in tests.values()])
            result += [
                Claim(program, name, task, kind, test, p)
                for (task, test), p in zip(tests.items(), corrected, strict=True)
            ]
            if len({len(a) for a, _ in pairs.values()}) == 1 and len(pairs) > 1:
                a, b = (
                    [mean(x) for x in zip(*(pair[i] for pair in pairs.values()), strict=True)]
                    for i in (0, 1)
                )
                whole = paired(a, b)
                result.append(Claim(program, name, OVERALL, kind, whole, whole.p_t))
    return result
