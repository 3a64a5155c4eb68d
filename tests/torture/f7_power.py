"""F7: the power is cut at every fsync of a recorded run.

Knows how to record a run, to rebuild the disk at each cut, and to open what is left. Does not know
what is right: the history checker judges.

strace records every write, fsync, resize, rename and removal of a coordinator and two devices, and
the lines of their history, in one order. At each fsync of a store's file (database, WAL, journal,
body or folder) three disks are made (`disk.py`): what is there once it returned; and, just before
it, without anything unsynced, and with a random part of it. The last two are made also whenever a
line of the history was written: from then on the world relies on it. Each time:

- the coordinator's store opens, passes SQLite's integrity check, every unused message in it can
  be read, and the checker finds in it whatever devices and coordinator had told by then;
- the store of the device that was synced opens, is intact, and every waiting message can be read;
- at some cuts all three go on from that disk to the end, and the checker judges the whole history.

Not covered: names that a disk reorders, sectors that are themselves half written, lying disks.
"""

import random
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coordinator.store import Store
from edge_sdk.errors import ConfigError, FleetError, StorageError
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire.messages import decode
from tests.torture.children import ROOT
from tests.torture.disk import Act, Disk, Kept, Step, run_traced, steps, write_out
from tests.torture.history import Did, Verdict, check, judge, read_lines
from tests.torture.parties import RUN, account
from tests.torture.power_child import NAMES, world
from tests.torture.result import Result, Scale, say

STEPS = {Scale.SHORT: 2, Scale.FULL: 44}
CONTINUED = {Scale.SHORT: 2, Scale.FULL: 40}
"""So many cuts are followed by a run to the end."""
SHORT_CUTS = 30
"""A short run looks at this many of its cuts, evenly chosen."""
GOAL = 1_000
LIMIT_S = 120.0
STORES = {"hq/coordinator.db": "", **{f"hq/devices/{name}.db": name for name in NAMES}}
Line = dict[str, Any]


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Record, cut everywhere, open, and judge."""
    if shutil.which("strace") is None:
        raise ConfigError("strace is not installed; apt-get install strace")
    command = [sys.executable, "-m", "tests.torture.power_child", str(folder / "world")]
    run_traced([*command, str(STEPS[scale]), str(seed)], folder / "trace", ROOT, LIMIT_S)
    recorded = list(steps(folder / "trace", folder / "world"))
    (folder / "trace").unlink()
    _check_model(recorded, folder / "world")
    cuts = [at for at, step in enumerate(recorded) if _is_fsync(step) or _is_told(step)]
    rng = random.Random(seed)
    chosen = cuts
    if scale is Scale.SHORT:
        chosen = sorted(rng.sample(cuts, min(SHORT_CUTS, len(cuts))))
    continued = set(rng.sample(chosen, CONTINUED[scale]))
    fsyncs = sum(_is_fsync(recorded[at]) for at in chosen)
    say("F7", f"{len(recorded)} calls recorded, {fsyncs} fsyncs, {len(chosen) - fsyncs} lines told")
    inspector = _Inspector(folder / "cut", rng)
    disk = Disk()
    last = 0
    for number, at in enumerate(chosen, 1):
        for step in recorded[last:at]:
            inspector.hear(step.path, step.data if step.act is Act.APPEND else b"")
            disk.take(step)
        last = at
        path = recorded[at].path
        told = _is_told(recorded[at])
        if told:  # the line itself is out in the world
            inspector.hear(path, recorded[at].data)
        where = f"cut {number}, {'after' if told else 'before'} {path}"
        inspector.look(disk, Kept.LAZY, path, where)
        inspector.look(disk, Kept.TORN, path, where)
        if at in continued:
            if told:
                disk.take(recorded[at])
            inspector.go_on(disk, rng.choice(list(Kept)), seed, where)
        if not told or at not in continued:
            disk.take(recorded[at])
        last = at + 1
        if not told:
            inspector.look(disk, Kept.ORDERED, path, f"cut {number}, after {path}")
        if number % 200 == 0:
            say("F7", f"{number} of {len(chosen)} cuts, {len(inspector.problems)} problems")
    enough = fsyncs >= GOAL or scale is Scale.SHORT
    return Result(
        code="F7",
        title="power cut at every fsync",
        value={"prefixes": fsyncs, "disks": inspector.disks, "continued": len(continued)},
        unit="prefixes",
        goal=">= 1,000 prefixes, each opens and passes the checker",
        passed=enough and not inspector.problems,
        lost=inspector.lost,
        doubled=inspector.doubled,
        notes={
            "updates": inspector.updates,
            "cuts_after_a_told_line": len(chosen) - fsyncs,
            "problem_count": len(inspector.problems),
            "problems": inspector.problems[:10],
        },
    )


def _is_fsync(step: Step) -> bool:
    return step.act is Act.SYNC and step.path.startswith("hq") and ".key" not in step.path


def _is_told(step: Step) -> bool:
    return step.act is Act.APPEND and step.path.startswith("history/") and len(step.data) > 1


def _check_model(recorded: list[Step], folder: Path) -> None:
    """The rebuilt disk must be the real one, byte for byte, or the figure means nothing."""
    disk = Disk()
    for step in recorded:
        disk.take(step)
    rebuilt = disk.left(Kept.ORDERED, random.Random(0), _kept_file)
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_file() and _kept_file(name) and rebuilt.pop(name, None) != path.read_bytes():
            raise StorageError(f"the trace does not explain {name}; is strace too old?")
    if rebuilt:
        raise StorageError(f"the trace tells of {min(rebuilt)}, which is not there")


def _kept_file(name: str) -> bool:
    return not name.endswith("-shm")  # SQLite builds it anew after a crash


class _Inspector:
    """Opens what a cut left and has it judged; `problems` are sentences."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.problems: list[str] = []
        self.disks = self.lost = self.doubled = self.updates = 0
        self._folder, self._rng = folder, rng
        self._told: dict[str, list[Line]] = defaultdict(list)

    def hear(self, path: str, data: bytes) -> None:
        """Take the lines of the history that were written by now."""
        if path.startswith("history/") and data:
            self._told[Path(path).stem] += read_lines(data)[0]

    def look(self, disk: Disk, kept: Kept, path: str, where: str) -> None:
        """Open the coordinator's store, and the device's that `path` belongs to."""
        self.disks += 1
        for name, device in STORES.items():
            if device and not path.startswith((name, f"history/{device}.")):
                continue
            self._lay(disk, kept, lambda file, name=name: file.startswith(name))  # type: ignore[misc]
            try:
                if device:
                    _open_device(self._folder / name)
                else:
                    self._judge(_open_coordinator(self._folder / name), where, kept)
            except FleetError as exc:
                self._problem(f"{where}, {kept}: {type(exc).__name__}: {exc}")

    def go_on(self, disk: Disk, kept: Kept, seed: int, where: str) -> None:
        """Let all three go on from what the cut left, to the end."""
        self._lay(disk, kept, lambda file: not file.startswith("history/"))
        history = disk.left(Kept.ORDERED, self._rng, lambda file: file.startswith("history/"))
        write_out(history, self._folder)
        try:
            world(self._folder, 0, seed)
        except FleetError as exc:
            self._problem(f"{where}, {kept}, going on: {type(exc).__name__}: {exc}")
            return
        verdict = check(self._folder / "history")
        self._count(verdict, f"{where}, {kept}, gone on")
        if verdict.waiting or verdict.held:
            self._problem(f"{where}, {kept}, gone on: {verdict}")

    def _judge(self, found: list[Line], where: str, kept: Kept) -> None:
        parties = {**self._told, "coordinator": [*self._told["coordinator"], *found]}
        verdict = judge(parties)
        self.updates = max(self.updates, verdict.sent)
        self._count(verdict, f"{where}, {kept}")

    def _count(self, verdict: Verdict, where: str) -> None:
        self.lost += len(verdict.lost)
        self.doubled += len(verdict.doubled)
        if not verdict.ok:
            self._problem(f"{where}: {verdict}")

    def _problem(self, text: str) -> None:
        self.problems.append(text.replace(str(self._folder), "FOLDER"))
        if len(self.problems) <= 3:
            say("F7", self.problems[-1])

    def _lay(self, disk: Disk, kept: Kept, which: Callable[[str], bool]) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        (self._folder / "hq" / "devices").mkdir(parents=True)
        files = disk.left(kept, self._rng, lambda file: _kept_file(file) and which(file))
        write_out(files, self._folder)


def _open_coordinator(path: Path) -> list[Line]:
    """Return as lines of a history what the store holds."""
    found: list[Line] = []

    def told(did: Did, **values: object) -> None:
        found.append({"did": did, **values})

    with Mailbox(path) as mailbox:
        store = Store(mailbox, time.time)
        _check_pages(mailbox)
        commit = store.last_commit(RUN)
        if commit is None:
            told(Did.RESUMED, run=RUN, step=-1, attempt="")
        else:
            attempt = commit.state["attempt"].decode()
            told(Did.RESUMED, run=RUN, step=commit.step, attempt=attempt)
        account(store, told)
    return found


def _open_device(path: Path) -> None:
    with Mailbox(path) as mailbox:
        _check_pages(mailbox)
        for letter in mailbox.unread():
            decode(letter.message)
        for stream in mailbox.waiting():
            item = mailbox.posted(stream)
            if item is not None:
                decode(item.message)


def _check_pages(mailbox: Mailbox) -> None:
    with mailbox.transaction() as db:
        said = db.execute("PRAGMA integrity_check").fetchall()
    if said != [("ok",)]:
        raise StorageError(f"integrity check: {said[0][0]}")
