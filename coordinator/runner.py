"""Carries a program out: sends its tasks, collects replies, commits, survives a kill at any point.

Knows the courier, the store and the clock. Does not know any algorithm: it sees requests and
answers (`programs.py`).

Two threads. The *program* thread trains inside `send` and waits inside `Ask`; the *mail* thread
takes letters as they come and serves files, so a device is answered while the LLM trains. What is
waited for is in the database before it is in memory:

- a task and its place in the outbox are one transaction; its words (a digest without the task id)
  are remembered, so a program that is built again and asks the same is not sent twice;
- a reply stays an unread letter until the Commit that used it, and that Commit is one transaction;
- so after a kill the program starts from its last Commit and finds the replies that had come.
"""

import hashlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from coordinator.events import Events
from coordinator.fleet import Fleet
from coordinator.programs import (
    LATE_STEPS,
    Ask,
    Commit,
    Note,
    Program,
    ProgramFactory,
    Publish,
    Reply,
    Request,
    Tell,
)
from coordinator.registry import Registry
from coordinator.replies import Expected, check_reply
from coordinator.store import AskRow, Store
from edge_sdk.errors import (
    FleetError,
    LocalProtocolError,
    QuorumMissed,
    RemoteProtocolError,
    StorageError,
)
from edge_sdk.link.courier import Courier, part
from edge_sdk.link.sending import Progress
from edge_sdk.wire.messages import (
    AnyMessage,
    Enrol,
    Enrolled,
    File,
    Refused,
    TextTask,
    WantFiles,
    decode,
    encode,
)
from edge_sdk.wire.seal import Header

logger = logging.getLogger(__name__)

MAIL_WAIT_S = 1.0
"""The mail thread looks again after this long even if nobody called it."""
PROGRESS_EVENTS_S = 0.25
"""At most one progress event per stream in this time; a terminal shows no more."""

REASON_CHARS = 300
"""A device's reason is kept this far; it is shown to people, and a device may send 64 KiB."""


class Stopped(FleetError):  # noqa: N818 - an event, not a fault
    """The coordinator is closing; raised inside an Ask, and the program ends where it is."""


@dataclass(slots=True)
class _Waiting:
    """A reply that no Commit has used yet. `checked`: the program's own check has passed."""

    row: AskRow
    letter: int
    message: AnyMessage
    checked: bool = False


class Runner:
    """Runs programs one after the other over one courier.

    Pass `accept` and `progress` to the courier as its callbacks before it starts.

    Attributes:
        failure: what ended the program thread, if it did not end well.
    """

    def __init__(
        self,
        store: Store,
        fleet: Fleet,
        registry: Registry,
        events: Events,
        *,
        task: TextTask,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._fleet, self._registry, self._events = store, fleet, registry, events
        self._task, self._clock = task, clock
        self._courier: Courier | None = None
        self._changed = threading.Condition()
        self._mail = threading.Event()
        self._stopping = False
        self._waiting: dict[int, _Waiting] = {}  # letter id -> reply
        self._delivered: list[_Waiting] = []
        self._last_letter = 0
        self._asked: frozenset[str] = frozenset()
        self._last_progress = 0.0
        self._shown: dict[bytes, float] = {}
        self._threads: list[threading.Thread] = []
        self.failure: BaseException | None = None

    # --- for the courier ----------------------------------------------------------------------

    def accept(self, header: Header, message: AnyMessage) -> None:
        """Called inside the transaction that accepts a message: note who was heard of."""
        self._fleet.seen(header.sender)
        self._mail.set()

    def progress(self, progress: Progress) -> None:
        """Called as bytes move: a transfer with a device that was asked renews the deadline."""
        now = self._clock()
        if progress.peer in self._asked:
            with self._changed:
                self._last_progress = now
        whole = progress.done_bytes >= progress.total_bytes
        if not whole and now - self._shown.get(progress.stream, 0.0) < PROGRESS_EVENTS_S:
            return
        self._shown[progress.stream] = now
        if whole:
            self._shown.pop(progress.stream, None)
        self._events(
            "progress",
            device=progress.peer,
            kind=progress.kind,
            outgoing=progress.outgoing,
            fraction=round(progress.done_bytes / max(1, progress.total_bytes), 4),
            total_bytes=progress.total_bytes,
        )

    # --- life ---------------------------------------------------------------------------------

    def start_mail(self, courier: Courier) -> None:
        """Take letters from now on, those of an earlier process first."""
        self._courier = courier
        self._take_letters()
        self._spawn(self._serve_mail, "coordinator-mail")

    def start(self, factory: ProgramFactory, *, run: str) -> threading.Thread:
        """Run the program in its own thread; `failure` tells how it ended."""
        return self._spawn(lambda: self._guarded(factory, run), "coordinator-program")

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop waiting and end the threads; a program amid training is left, it resumes later."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._mail.set()
        for thread in self._threads:
            thread.join(timeout_s)

    def _spawn(self, target: Callable[[], None], name: str) -> threading.Thread:
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def _guarded(self, factory: ProgramFactory, run: str) -> None:
        try:
            self.run(factory, run=run)
        except Stopped:
            return
        except BaseException as exc:  # handed to the thread that waits
            logger.exception("the program %s ended", run)
            self.failure = exc

    # --- the program --------------------------------------------------------------------------

    def run(self, factory: ProgramFactory, *, run: str) -> None:
        """Carry the program out from its last Commit to its end, in this thread.

        Raises:
            Stopped: `close` was called.
            FleetError: whatever the program did not catch.
        """
        if self._store.finished(run):
            return
        self._store.start_run(run)
        resume = self._store.last_commit(run)
        self._delivered = []
        logger.info("run %s starts after %s", run, "nothing" if resume is None else resume.step)
        program = factory(resume)
        step = 0 if resume is None else resume.step + 1
        try:
            self._drive(program, run, step)
        except Stopped:
            raise
        except Exception as exc:
            self._store.finish_run(run, f"{type(exc).__name__}: {exc}")
            raise
        finally:
            program.close()
        self._store.finish_run(run)
        self._sweep(run, self._last_step(run))

    def _drive(self, program: Program, run: str, step: int) -> None:
        answer: object = None
        missed: QuorumMissed | None = None
        while True:
            try:
                request = program.send(answer) if missed is None else program.throw(missed)
            except StopIteration:
                return
            if self._stopping:
                raise Stopped("the coordinator is closing")
            answer, missed = None, None
            try:
                answer = self._answer(request, run, step)
            except QuorumMissed as exc:
                missed = exc
                self._store.close_refused(run)
                self._events("quorum_missed", run=run, step=step, reason=str(exc))
            if isinstance(request, Commit):
                step = request.step + 1

    def _answer(self, request: Request, run: str, step: int) -> object:
        match request:
            case Ask():
                return self._ask(request, run, step)
            case Tell():
                for device in request.to:
                    told = request.message
                    message = told(device) if callable(told) else told
                    self._send(device, message, run=run, step=step, state="told")
            case Commit():
                self._commit(request, run)
            case Publish():
                release = self._registry.publish(request)
                self._events("published", family=release.family, release=release.release)
                return release
            case Note():
                self._events("note", **{**request.values, "run": run, "step": step})
            case _:
                raise LocalProtocolError(f"a program yielded {type(request).__name__}")
        return None

    def _commit(self, commit: Commit, run: str) -> None:
        used = [(waiting.letter, waiting.row.ask) for waiting in self._delivered]
        self._store.commit(run, commit, used)
        with self._changed:
            for waiting in self._delivered:
                self._waiting.pop(waiting.letter, None)
        self._delivered = []
        self._events("committed", run=run, step=commit.step, replies=len(used))
        self._sweep(run, commit.step)

    # --- asking -------------------------------------------------------------------------------

    def _ask(self, ask: Ask, run: str, step: int) -> tuple[Reply, ...]:
        if not 1 <= ask.need <= len(set(ask.to)):
            raise LocalProtocolError(
                f"need={ask.need} of {len(set(ask.to))} devices; allowed: 1 to all of them"
            )
        started = self._last_progress = self._clock()
        self._asked = frozenset(ask.to)
        rows = {}
        for device in sorted(set(ask.to)):
            message = ask.message(device)
            rows[device] = self._send(device, message, run=run, step=step, state="open")
        kind = next(iter(rows.values())).kind
        self._events("asked", run=run, step=step, kind=kind, devices=sorted(rows), need=ask.need)
        try:
            with self._changed:
                taken = self._collect(ask, rows, run, step)
        finally:
            self._asked = frozenset()
        self._delivered += [waiting for waiting, _ in taken if waiting not in self._delivered]
        seconds = round(self._clock() - started, 3)
        self._events("answered", run=run, step=step, kind=kind, replies=len(taken), seconds=seconds)
        return tuple(
            Reply(waiting.row.device, waiting.message, staleness, (waiting.letter,))
            for waiting, staleness in taken
        )

    def _send(self, device: str, message: AnyMessage, *, run: str, step: int, state: str) -> AskRow:
        kind = type(message).__name__
        words = encode(msgspec.structs.replace(message, task_id="t"))
        with self._store.transaction():
            row, new = self._store.ask(
                run,
                device,
                kind=kind,
                digest=hashlib.sha256(words).digest(),
                expected=Expected.of(message).to_text(),
                step=step,
                state=state,
            )
            if new:
                named = msgspec.structs.replace(message, task_id=row.task)
                assert self._courier is not None, "start_mail comes first"
                self._courier.send(device, named, task=row.task)
        return row

    def _collect(
        self, ask: Ask, rows: dict[str, AskRow], run: str, step: int
    ) -> list[tuple[_Waiting, int]]:
        """Wait, with `_changed` held, until the Ask is met."""
        sync = ask.need == len(rows)
        while True:
            if self._stopping:
                raise Stopped("the coordinator is closing")
            fresh, late = self._candidates(ask, rows, run, step)
            # With need = everyone the round is synchronous: a late reply stands for nobody else's.
            count = len(fresh) if sync else len({w.row.device for w, _ in fresh + late})
            if count >= ask.need:
                return sorted(fresh + late, key=lambda pair: (pair[0].row.device, pair[0].letter))
            answered = {w.row.device for w, _ in fresh} | self._refusers(rows)
            if answered >= rows.keys():
                raise QuorumMissed(
                    f"{len(fresh)} of {ask.need} useful replies to {_kind(rows)}: every device "
                    "answered, the others refused; retry, skip the step or ask others"
                )
            left_s = self._last_progress + ask.within_s - self._clock()
            if left_s <= 0:
                raise QuorumMissed(
                    f"{count} of {ask.need} useful replies to {_kind(rows)} and no progress for "
                    f"{ask.within_s:.0f} s; retry, skip the step or ask others"
                )
            self._changed.wait(left_s)

    def _candidates(
        self, ask: Ask, rows: dict[str, AskRow], run: str, step: int
    ) -> tuple[list[tuple[_Waiting, int]], list[tuple[_Waiting, int]]]:
        numbers = {row.ask for row in rows.values()}
        kind = _kind(rows)
        limit = _late_limit(kind) if ask.max_staleness is None else ask.max_staleness
        used = {waiting.letter for waiting in self._delivered}
        fresh: list[tuple[_Waiting, int]] = []
        late: list[tuple[_Waiting, int]] = []
        for waiting in list(self._waiting.values()):
            row = waiting.row
            staleness = self._store.commits_since(run, row.step)
            if row.ask in numbers:
                target, staleness = fresh, 0
            elif waiting.letter not in used and (row.run, row.kind) == (run, kind):
                if limit == 0 or staleness > limit:
                    continue
                target = late
            else:
                continue
            if self._passes(ask, waiting):
                target.append((waiting, staleness))
        return fresh, late

    def _passes(self, ask: Ask, waiting: _Waiting) -> bool:
        if waiting.checked or ask.check is None:
            return True
        try:
            ask.check(waiting.row.device, waiting.message)
        except (FleetError, ValueError) as exc:
            self._refuse(waiting.letter, waiting.row.device, waiting.message, str(exc))
            self._store.set_ask_state(waiting.row.ask, "refused")
            del self._waiting[waiting.letter]
            return False
        waiting.checked = True
        return True

    def _refusers(self, rows: dict[str, AskRow]) -> set[str]:
        """Devices that refused, or that may not take part any more."""
        found = set()
        for device, row in rows.items():
            now = self._store.ask_of_task(row.task)
            if now is None or now.state != "open" or not self._fleet.is_active(device):
                found.add(device)
        return found

    def _sweep(self, run: str, step: int) -> None:
        """Give up waiting replies that no later Ask can take."""
        with self._changed:
            for letter, waiting in list(self._waiting.items()):
                row = waiting.row
                late = self._store.commits_since(row.run, row.step)
                over = row.run == run and late > 0 and late > _late_limit(row.kind)
                if over or self._store.finished(row.run):
                    self._store.refuse(letter, row.device, row.kind, "too late to be of use")
                    self._store.set_ask_state(row.ask, "closed")
                    del self._waiting[letter]

    def _last_step(self, run: str) -> int:
        commit = self._store.last_commit(run)
        return -1 if commit is None else commit.step

    # --- the mail -----------------------------------------------------------------------------

    def _serve_mail(self) -> None:
        while not self._stopping:
            self._mail.wait(MAIL_WAIT_S)
            self._mail.clear()
            try:
                self._take_letters()
            except StorageError as exc:
                logger.warning("the mail waits: %s", exc)

    def _take_letters(self) -> None:
        for letter, sender, data in self._store.letters(after=self._last_letter):
            try:
                self._take(letter, sender, data)
            except StorageError:
                raise  # the letter is tried again when there is room
            except Exception:
                logger.exception("a letter of %s failed unexpectedly; it stays unread", sender[:12])
            self._last_letter = letter
        with self._changed:
            self._changed.notify_all()

    def _take(self, letter: int, sender: str, data: bytes) -> None:
        message: AnyMessage | None = None
        try:
            message = decode(data)
            if isinstance(message, Enrol):
                self._welcome(letter, message)
            elif not self._fleet.is_active(sender):
                raise RemoteProtocolError(f"{sender} is revoked or in quarantine")
            elif isinstance(message, WantFiles):
                self._serve_files(letter, sender, message)
            elif isinstance(message, Refused):
                self._note_refusal(letter, sender, message)
            else:
                self._keep_reply(letter, sender, message)
        except RemoteProtocolError as exc:
            self._refuse(letter, sender, message, str(exc))

    def _welcome(self, letter: int, enrol: Enrol) -> None:
        assert self._courier is not None
        self._courier.forget(enrol.device)
        answer = Enrolled(enrol.device, self._registry.root(), self._task)
        with self._store.transaction():
            self._courier.send(enrol.device, answer, task=enrol.token_id)
            self._store.mailbox.mark_read(letter)
        self._events(
            "enrolled",
            device=enrol.device,
            families=list(enrol.families),
            memory_mb=enrol.memory_mb,
        )

    def _serve_files(self, letter: int, sender: str, want: WantFiles) -> None:
        assert self._courier is not None
        files = [File(want.task_id, path, self._registry.read(path)) for path in want.paths]
        with self._store.transaction():
            for file in files:
                task = part(want.task_id, file.path)
                self._courier.send(sender, file, task=task)
            self._store.mailbox.mark_read(letter)
        self._events(
            "files", device=sender, count=len(files), bytes=sum(len(f.data) for f in files)
        )

    def _note_refusal(self, letter: int, sender: str, refused: Refused) -> None:
        row = self._row_of(sender, refused.task_id)
        with self._store.transaction():
            self._store.refuse(
                letter, sender, row.kind, f"refused by the device: {refused.reason[:REASON_CHARS]}"
            )
            self._store.set_ask_state(row.ask, "refused")
        self._events("refused", device=sender, kind=row.kind, reason=refused.reason[:REASON_CHARS])

    def _keep_reply(self, letter: int, sender: str, message: AnyMessage) -> None:
        row = self._row_of(sender, getattr(message, "task_id", ""))
        check_reply(message, Expected.from_text(row.expected))
        if self._store.finished(row.run):
            self._store.refuse(letter, sender, row.kind, "too late to be of use")
            return
        with self._changed:
            self._waiting[letter] = _Waiting(row, letter, message)
        self._events("reply", device=sender, kind=type(message).__name__, **_figures(message))

    def _row_of(self, sender: str, task: str) -> AskRow:
        row = self._store.ask_of_task(task)
        if row is None or row.device != sender:
            raise RemoteProtocolError(
                f"{sender} answers task {task[:80]!r}, which it was not given"
            )
        if row.state != "open":
            raise RemoteProtocolError(f"{sender} answers task {task[:80]!r}, which is closed")
        return row

    def _refuse(self, letter: int, device: str, message: AnyMessage | None, reason: str) -> None:
        kind = type(message).__name__ if message is not None else "unreadable"
        self._store.refuse(letter, device, kind, reason)
        quarantined = self._fleet.fault(device)
        logger.warning("refused a %s of %s: %s", kind, device[:12], reason)
        self._events("reply_refused", device=device, kind=kind, reason=reason)
        if quarantined:
            logger.warning("%s is in quarantine; revoke it or enrol it again", device[:12])
            self._events("quarantined", device=device)


def _kind(rows: dict[str, AskRow]) -> str:
    return next(iter(rows.values())).kind


def _late_limit(kind: str) -> int:
    return LATE_STEPS if kind == "TrainAdapter" else 0


def _figures(message: AnyMessage) -> dict[str, object]:
    """The figures of a reply that an event may show: no codes, no texts, no scores."""
    shown = {}
    for name in ("release", "round", "accuracy", "examples", "raw_bytes", "cosine", "seconds"):
        if hasattr(message, name):
            shown[name] = getattr(message, name)
    for name in ("tokens_per_s", "peak_mb"):
        if hasattr(message, name):
            shown[name] = round(getattr(message, name), 2)
    if hasattr(message, "codes"):
        shown["sent_bytes"] = len(message.codes)
    return shown
