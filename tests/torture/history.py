"""The history that clients and the coordinator write down, and the checker that judges it.

Knows lines of JSON, one file per party. Does not know any store, broker or process: a verdict
rests on nothing but what was written down.

A party writes *before* it does a thing (`SENT`, `ATTEMPT`) and *after* it saw it done (`DONE`,
`COMMITTED`), each line with one write, so a killed party leaves at most one torn line, its last.
A commit whose `COMMITTED` is missing because its process was killed is told by the next process:
`RESUMED` names the attempt that its store holds.

The checker asserts (PROTOCOL.md 6.2):

- (a) each acknowledged update is in exactly one aggregate, or in a recorded reject;
- (b) no aggregate has an update twice, and no update is in two;
- (c) the model version of a device never falls;
- (d) every running sum is the integer sum of the parts of all aggregates up to it;
- and that no committed aggregate is forgotten or changed, and none has an update nobody sent.

Source: the shape of the check is Jepsen's (operations with an unknown outcome stay open until a
later read tells).
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

SHOWN = 5
"""How many offenders a verdict's sentence names."""


class Did(StrEnum):
    """What a party wrote down."""

    SENT = "sent"
    """A client is about to hand over `update` of integer `value`."""
    DONE = "done"
    """A client saw `update` acknowledged by the coordinator's signed Done."""
    PARKED = "parked"
    """A client was told that `update` is refused for good, with `reason`."""
    MODEL = "model"
    """A device runs model `version` (an integer) from now on."""
    ATTEMPT = "attempt"
    """The coordinator is about to commit `step` of `run` as `attempt`, with `parts`, a list of
    [update, value], and perhaps the running `total` of all steps so far."""
    COMMITTED = "committed"
    """The commit of `attempt` returned."""
    RESUMED = "resumed"
    """A new process found `attempt` as the newest commit, at `step`; step -1 for none."""
    REJECTED = "rejected"
    """The coordinator's store holds `update` as refused, with `reason`."""
    HELD = "held"
    """The coordinator's store holds `update`, accepted but not yet used."""


class History:
    """Appends what one party did to `path`; a party's next process may go on with its file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(self._file, b"\n")  # ends the line that a killed process may have left torn

    def __enter__(self) -> "History":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, did: Did, **values: object) -> None:
        """Write one line; what was written survives the death of this process."""
        line = json.dumps({"did": did, **values}, separators=(",", ":"))
        os.write(self._file, line.encode() + b"\n")

    def aggregate(self, run: str, step: int, parts: Iterable[tuple[str, int]]) -> None:
        """Write an aggregate that needs no second look: one that no kill can interrupt."""
        self(Did.ATTEMPT, run=run, step=step, attempt=f"{run}-{step}", parts=list(parts))
        self(Did.COMMITTED, run=run, step=step, attempt=f"{run}-{step}")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


@dataclass(slots=True)
class Verdict:
    """What the checker found; `ok` when no promise was broken.

    `waiting` are updates that were sent and not acknowledged (nothing was promised), `held` those
    that the coordinator has accepted and no aggregate has used; both are for the caller to judge.
    """

    sent: int = 0
    acknowledged: int = 0
    aggregated: int = 0
    rejected: int = 0
    steps: int = 0
    torn: int = 0
    waiting: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """Every other broken promise, a sentence each."""

    @property
    def ok(self) -> bool:
        """Whether every promise was kept."""
        return not (self.lost or self.doubled or self.broken)

    def __str__(self) -> str:
        counts = f"{self.sent} sent, {self.acknowledged} acknowledged, {self.aggregated} aggregated"
        faults = [
            f"{len(items)} {name} ({', '.join(items[:SHOWN])})"
            for name in ("lost", "doubled", "broken", "waiting", "held")
            if (items := getattr(self, name))
        ]
        return "; ".join([f"{counts}, {self.rejected} rejected in {self.steps} steps", *faults])


Line = dict[str, Any]


def read(folder: Path) -> tuple[dict[str, list[Line]], int]:
    """Return the lines of each `*.jsonl` file in `folder` by party, and how many were torn."""
    parties: dict[str, list[Line]] = {}
    torn = 0
    for path in sorted(folder.glob("*.jsonl")):
        parties[path.stem], bad = read_lines(path.read_bytes())
        torn += bad
    return parties, torn


def read_lines(data: bytes) -> tuple[list[Line], int]:
    """Return the lines of one party in `data`, and how many were torn."""
    lines = list(_parsed(data.split(b"\n")))
    return [line for line in lines if line is not None], lines.count(None)


def check(folder: Path) -> Verdict:
    """Judge the history in `folder`."""
    parties, torn = read(folder)
    return judge(parties, torn=torn)


def judge(parties: Mapping[str, Iterable[Line]], *, torn: int = 0) -> Verdict:
    """Judge histories: the lines of each party, in its own order; parties have no common clock."""
    verdict = Verdict(torn=torn)
    sent: dict[str, int | None] = {}
    done: set[str] = set()
    parked: set[str] = set()
    rejected: set[str] = set()
    held: set[str] = set()
    books: list[_Book] = []
    for party, lines in parties.items():
        book = _Book()
        version = None
        for line in lines:
            match Did(line["did"]):
                case Did.SENT:
                    sent[line["update"]] = line.get("value")
                case Did.DONE:
                    done.add(line["update"])
                case Did.PARKED:
                    parked.add(line["update"])
                case Did.REJECTED:
                    rejected.add(line["update"])
                case Did.HELD:
                    held.add(line["update"])
                case Did.MODEL:
                    if version is not None and line["version"] < version:
                        fell = f"{party} went from model {version} to {line['version']}"
                        verdict.broken.append(fell)
                    version = line["version"]
                case Did.ATTEMPT | Did.COMMITTED | Did.RESUMED:
                    book.take(line)
        books.append(book)
        verdict.broken += book.broken
    places: Counter[str] = Counter()
    for book in books:
        verdict.steps += len(book.effective)
        verdict.broken += book.wrong_sums(sent)
        for attempt in book.effective.values():
            places.update(update for update, _ in book.attempts[attempt]["parts"])
    used = set(places)
    verdict.sent, verdict.acknowledged = len(sent), len(done)
    verdict.aggregated, verdict.rejected = len(used), len(rejected | parked)
    verdict.waiting = sorted(sent.keys() - done - parked)
    verdict.held = sorted(held - used - rejected)
    verdict.lost = sorted(done - used - rejected - held)
    verdict.doubled = sorted(update for update, times in places.items() if times > 1)
    verdict.broken += [f"{u} was aggregated and never sent" for u in sorted(used - sent.keys())]
    verdict.broken += [f"{u} is in an aggregate and rejected" for u in sorted(used & rejected)]
    verdict.broken += [f"{u} was parked, and aggregated" for u in sorted(used & parked)]
    verdict.broken += [f"{u} was parked, and acknowledged" for u in sorted(done & parked - used)]
    return verdict


class _Book:
    """One coordinator's aggregates: which attempt of each step is the one its store holds."""

    def __init__(self) -> None:
        self.attempts: dict[str, Line] = {}
        self.effective: dict[tuple[str, int], str] = {}
        self.broken: list[str] = []
        self._newest: dict[str, int] = defaultdict(lambda: -1)

    def take(self, line: Line) -> None:
        run, step, attempt = line["run"], int(line["step"]), line["attempt"]
        if line["did"] == Did.ATTEMPT:
            self.attempts[attempt] = line
            return
        if line["did"] == Did.RESUMED and step < self._newest[run]:
            forgot = f"{run} went on after step {step}, {self._newest[run]} was committed"
            self.broken.append(forgot)
        if step < 0:
            return
        if attempt not in self.attempts:
            self.broken.append(f"{run} step {step} holds an attempt that nobody made")
            return
        if self.effective.setdefault((run, step), attempt) != attempt:
            self.broken.append(f"{run} step {step} was changed after its commit")
        if line["did"] == Did.COMMITTED and step <= self._newest[run]:
            self.broken.append(f"{run} step {step} was committed again")
        self._newest[run] = max(self._newest[run], step)

    def wrong_sums(self, sent: Mapping[str, int | None]) -> Iterator[str]:
        totals: Counter[str] = Counter()
        for (run, step), attempt in sorted(self.effective.items()):
            line = self.attempts[attempt]
            for update, value in line["parts"]:
                if sent.get(update) is not None and sent[update] != value:
                    yield f"{update} was sent as {sent[update]} and counted as {value}"
            totals[run] += sum(value for _, value in line["parts"])
            if "total" in line and line["total"] != totals[run]:
                yield f"{run} step {step} says {line['total']}, its parts give {totals[run]}"


def _parsed(lines: Iterable[bytes]) -> Iterator[Line | None]:
    for text in lines:
        if not text:
            continue
        try:
            yield json.loads(text)
        except ValueError:
            yield None
