"""A federated algorithm as a generator: what it may ask for, and what it gets back.

Knows the requests a program yields and the answers it is sent. Does not know how any of them is
carried out: MQTT, seals, deadlines, storage and publishing belong to `runner.py`.

A program is written top to bottom like the paper's algorithm box:

    def program(resume: Commit | None) -> Program:
        state = start() if resume is None else restore(resume.state)
        for step in range(0 if resume is None else resume.step + 1, rounds):
            replies = yield Ask(train(step), cohort, need=2, within_s=60.0)
            state = aggregate(state, replies)
            yield Note({"round": step, "devices": len(replies)})
            yield Commit(step, state.to_bytes())

and is tested by plain `send`, without a network: `ask = next(p); ask = p.send((reply, reply))`.
After a crash the runner builds it again from its last `Commit`. What it asks again in the same
words is not sent again: answers that had arrived are delivered, tasks still open are waited for.
So a program draws its randomness from seeds in its state, never from the clock.
"""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_sdk.wire.messages import AdapterSource, AnyMessage, OfferModel

TaskFor = Callable[[str], AnyMessage]
"""Builds the task of one device from its id, for tasks that differ between devices."""

Check = Callable[[str, AnyMessage], None]
"""Looks at one device's reply; raises FleetError or ValueError to have it refused and logged."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Send a task to devices and wait for the first `need` useful replies.

    The answer is a tuple of `Reply` sorted by device id, at least `need` long. A `Refused` is an
    answer but not a useful one. The runner overwrites the task's `task_id`, so any valid name will
    do there; it refuses replies to other tasks, of the wrong type, or failing `check`.

    Attributes:
        task: the message for all, or a function from device id to message.
        to: device ids.
        need: useful replies to wait for, 1 to len(to).
        within_s: seconds *without progress* after which `QuorumMissed` is thrown into the program;
            a transfer that advances starts them anew.
        check: called on every reply before it counts.
        max_staleness: oldest late reply to deliver, in commits since it was asked; 0 for tasks
            whose replies fit only this Ask. None: 0, but LATE_STEPS for TrainAdapter and TopLogits.
    """

    task: AnyMessage | TaskFor
    to: tuple[str, ...]
    need: int
    within_s: float
    check: Check | None = None
    max_staleness: int | None = None

    def message(self, device: str) -> AnyMessage:
        """Return the task of `device`."""
        return self.task(device) if callable(self.task) else self.task


LATE_STEPS = 8
"""Updates and rows are delivered up to this many commits late; older ones teach an old model."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One device's useful reply; `staleness` counts the commits since its task was asked.

    `letter_ids` name the stored letters that the next Commit marks as consumed.
    """

    device: str
    message: AnyMessage
    staleness: int = 0
    letter_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a message that awaits no reply, for example OfferData. The answer is None."""

    message: AnyMessage | TaskFor
    to: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Commit:
    """Keep `state` as the result of `step`, together with every reply used since the last Commit.

    One transaction: state, step number and consumed replies are stored all or not at all. Steps
    count up. The answer is None.
    """

    step: int
    state: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Publish:
    """Sign the files of `folder` and make them the promoted release of `family`.

    `base` names an earlier release of the family whose files this one builds on (an adapter over
    its model). Publishing a release name a second time returns the first. The answer is a
    `Release`.
    """

    family: str
    release: str
    folder: Path
    base: str | None = None
    lineage: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Release:
    """A published release: its TUF target paths and the signed metadata files by name.

    `withdrawn`: it was taken back before (by this program before a crash, or by the operator); it
    can be offered to nobody.
    """

    family: str
    release: str
    targets: tuple[str, ...]
    metadata: Mapping[str, bytes] = field(default_factory=dict)
    withdrawn: bool = False

    def offer(self, task_id: str = "offer", *, source: AdapterSource | None = None) -> OfferModel:
        """Return the message that offers this release to a device; `source`: how to make it."""
        return OfferModel(
            task_id=task_id,
            family=self.family,
            release=self.release,
            metadata=dict(self.metadata),
            targets=self.targets,
            source=source,
        )


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Take `release` back, for `reason`, and promote `instead` again; the answer is its `Release`.

    Doing it twice is doing it once.
    """

    family: str
    release: str
    instead: str
    reason: str


@dataclass(frozen=True, slots=True)
class Blame:
    """Count a fault of `device` that only the comparison with others has shown.

    It is counted by the next Commit, so a round that is repeated after a crash blames once. The
    answer is None.
    """

    device: str
    reason: str


@dataclass(frozen=True, slots=True)
class Note:
    """Numbers worth telling: they become one event line. The answer is None."""

    values: Mapping[str, Any]


Request = Ask | Tell | Commit | Publish | Withdraw | Blame | Note

Program = Generator[Request, Any, None]
"""Sent: tuple[Reply, ...] for Ask, Release for Publish and Withdraw, None else (`Any`: one type
cannot say so).

`QuorumMissed` is thrown at an Ask whose deadline passed; replies that had arrived are kept and
answer the next Ask in the same words."""

ProgramFactory = Callable[[Commit | None], Program]
"""Builds the program from its last Commit, or from nothing."""
