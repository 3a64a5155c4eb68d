"""A disk rebuilt from a trace of system calls, as it is after a power cut at any point.

Knows strace's output and what a disk may have kept. Does not know SQLite or what the files mean.

A trace is a sequence of `Step`s: each changes a file, or makes one durable. After a cut at a step,
three disks are possible here:

- `ordered`: everything up to the cut is there;
- `lazy`: of each file only what was there at its last fsync; its later writes are gone;
- `torn`: as lazy, with a random part of the later writes, in sectors of 512 bytes.

Names (create, rename, remove) are taken to be kept in order, as journalling file systems do; what
is checked is therefore the data, and the order of data and names.
"""

import random
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

SECTOR = 512
CALLS = (
    "openat,write,pwrite64,fsync,fdatasync,ftruncate,rename,renameat,link,linkat,unlink,unlinkat"
)
_LINE = re.compile(r"^(\d+) +(\w+)\((.*)\) += (-?\d+)(.*)$", re.DOTALL)
_UNFINISHED = re.compile(r"^(\d+) +(\w+\(.*) <unfinished \.\.\.>$", re.DOTALL)
_RESUMED = re.compile(r"^(\d+) +<\.\.\. \w+ resumed>(.*)$", re.DOTALL)
_STRINGS = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_FILE = re.compile(r"^\d+<((?:\\x[0-9a-f]{2})*)>")
_ABOUT = re.compile(r"<((?:\\x[0-9a-f]{2})*)>")


class Act(StrEnum):
    """What a step does to a file."""

    WRITE = "write"
    APPEND = "append"
    RESIZE = "resize"
    SYNC = "sync"
    RENAME = "rename"
    LINK = "link"
    REMOVE = "remove"


class Kept(StrEnum):
    """What a disk kept of the writes that nobody had synced."""

    ORDERED = "ordered"
    LAZY = "lazy"
    TORN = "torn"


@dataclass(frozen=True, slots=True)
class Step:
    """One system call that changed `path`; `to` is the new name of a RENAME or LINK."""

    act: Act
    path: str
    data: bytes = b""
    offset: int = 0
    to: str = ""


def traced(command: Sequence[str], trace: Path) -> list[str]:
    """Return `command` so that its writes are recorded in `trace`, by it and all its threads."""
    options = ["-f", "-y", "-xx", "-s", str(1 << 24), "--seccomp-bpf", "-o", str(trace)]
    return ["strace", *options, "-e", f"trace={CALLS}", "-e", "signal=none", *command]


def steps(trace: Path, folder: Path) -> Iterator[Step]:
    """Yield what a trace did to files below `folder`, paths relative to it, in order of return."""
    prefix = f"{folder}/"
    begun: dict[str, str] = {}
    with open(trace, encoding="ascii") as lines:
        for line in lines:
            text = line.rstrip("\n")
            if half := _UNFINISHED.match(text):
                begun[half[1]] = half[2]
                continue
            if half := _RESUMED.match(text):
                text = f"{half[1]} {begun.pop(half[1])}{half[2]}"
            whole = _LINE.match(text)
            if whole and int(whole[4]) >= 0:
                yield from _steps_of(whole[2], whole[3], int(whole[4]), whole[5], prefix)


def _steps_of(call: str, arguments: str, result: int, tail: str, prefix: str) -> Iterator[Step]:
    if call == "openat":
        opened = _ABOUT.match(tail.strip())
        name = _text(opened[1]) if opened else ""
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            if "O_TRUNC" in arguments:
                yield Step(Act.RESIZE, name)
            elif "O_CREAT" in arguments:
                yield Step(Act.APPEND, name)
        return
    if call.startswith(("rename", "link", "unlink")):
        names = [_text(found) for found in _STRINGS.findall(arguments)]
        if all(name.startswith(prefix) for name in names):
            short = [name.removeprefix(prefix) for name in names]
            if call.startswith("unlink"):
                yield Step(Act.REMOVE, short[0])
            else:
                act = Act.RENAME if call.startswith("rename") else Act.LINK
                yield Step(act, short[0], to=short[1])
        return
    about = _FILE.match(arguments)
    if about is None or not (name := _text(about[1])).startswith(prefix):
        return
    name = name.removeprefix(prefix)
    if call in ("fsync", "fdatasync"):
        yield Step(Act.SYNC, name)
    elif call == "ftruncate":
        yield Step(Act.RESIZE, name, offset=int(arguments.rsplit(",", 1)[1]))
    else:
        (data,) = _STRINGS.findall(arguments)
        written = bytes.fromhex(data.replace("\\x", ""))[:result]
        if call == "write":
            yield Step(Act.APPEND, name, written)
        else:
            yield Step(Act.WRITE, name, written, int(arguments.rsplit(",", 1)[1]))


def _text(escaped: str) -> str:
    return bytes.fromhex(escaped.replace("\\x", "")).decode()


@dataclass(slots=True)
class _File:
    now: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    since: list[Step] = field(default_factory=list)


class Disk:
    """Files in memory; `take` steps, then ask what a cut would leave."""

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}

    def take(self, step: Step) -> None:
        """Carry out one step."""
        if step.act is Act.RENAME:
            if step.path in self._files:
                self._files[step.to] = self._files.pop(step.path)
            return
        if step.act is Act.LINK:
            if step.path in self._files:
                self._files[step.to] = self._files[step.path]
            return
        if step.act is Act.REMOVE:
            self._files.pop(step.path, None)
            return
        if step.act is Act.SYNC:
            file = self._files.get(step.path)
            if file is not None:  # else a folder
                file.synced, file.since = bytes(file.now), []
            return
        file = self._files.setdefault(step.path, _File())
        if step.act is Act.APPEND:
            step = Step(Act.WRITE, step.path, step.data, len(file.now))
        _apply(file.now, step)
        file.since.append(step)

    def left(
        self, kept: Kept, rng: random.Random, which: Callable[[str], bool]
    ) -> dict[str, bytes]:
        """Return the files that `which` names, as a cut now would leave them."""
        return {
            name: _after_cut(file, kept, rng) for name, file in self._files.items() if which(name)
        }


def _after_cut(file: _File, kept: Kept, rng: random.Random) -> bytes:
    if kept is Kept.ORDERED or not file.since:
        return bytes(file.now)
    disk = bytearray(file.synced)
    if kept is Kept.TORN:
        for step in file.since:
            for part in _sectors(step):
                if rng.random() < 0.5:
                    _apply(disk, part)
    return bytes(disk)


def _sectors(step: Step) -> Iterator[Step]:
    if step.act is Act.RESIZE:
        yield step
        return
    at = 0
    while at < len(step.data):
        size = SECTOR - (step.offset + at) % SECTOR
        yield Step(Act.WRITE, step.path, step.data[at : at + size], step.offset + at)
        at += size


def _apply(disk: bytearray, step: Step) -> None:
    if step.act is Act.RESIZE:
        del disk[step.offset :]
        disk.extend(bytes(step.offset - len(disk)))
        return
    disk.extend(bytes(max(0, step.offset - len(disk))))
    disk[step.offset : step.offset + len(step.data)] = step.data


def write_out(files: dict[str, bytes], folder: Path) -> None:
    """Put `files` into `folder`."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o600)


def run_traced(command: Sequence[str], trace: Path, cwd: Path, limit_s: float) -> None:
    """Run `command` under strace to its end.

    Raises:
        CalledProcessError: it failed.
        TimeoutExpired: it took too long.
    """
    subprocess.run(traced(command, trace), cwd=cwd, check=True, timeout=limit_s)
