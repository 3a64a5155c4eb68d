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

import msgspec

from coordinator.events import Events
from coordinator.fleet import Fleet
from coordinator.inbox import Certify, Inbox, Waiting
from coordinator.programs import (
    Ask,
    Blame,
    Commit,
    Note,
    Program,
    ProgramFactory,
    Publish,
    Release,
    Reply,
    Request,
    Tell,
    Withdraw,
)
from coordinator.progress import ProgressEvents
from coordinator.quorum import Quorum, late_limit
from coordinator.registry import Registry
from coordinator.replies import Expected
from coordinator.store import AskRow, Store
from edge_sdk.errors import FleetError, LocalProtocolError, QuorumMissed
from edge_sdk.link.courier import Courier
from edge_sdk.link.sending import Progress
from edge_sdk.wire.messages import AnyMessage, TextTask, encode
from edge_sdk.wire.seal import Header
from edge_sdk.wire.transfer import Refusal

logger = logging.getLogger(__name__)


class Stopped(FleetError):  # noqa: N818 - an event, not a fault
    """The coordinator is closing; raised inside an Ask, and the program ends where it is."""


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
        self._clock = clock
        self._inbox = Inbox(store, fleet, registry, events, task=task)
        self._courier: Courier | None = None
        self._stopping = False
        self._delivered: list[Waiting] = []  # used since the last Commit
        self._blamed: list[Blame] = []  # since the last Commit
        self._asked: frozenset[str] = frozenset()
        self._last_progress = 0.0
        self._show = ProgressEvents(events, clock)
        self._threads: list[threading.Thread] = []
        self.failure: BaseException | None = None

    # --- for the courier ----------------------------------------------------------------------

    def accept(self, header: Header, message: AnyMessage) -> None:
        """Called inside the transaction that accepts a message."""
        self._inbox.accept(header, message)

    def refused(self, header: Header, refusal: Refusal, reason: str) -> None:
        """Called for a message that its sender signed and that is malformed."""
        self._inbox.refused(header, refusal, reason)

    def certify_with(self, issue: Certify) -> None:
        """Answer devices that ask for a broker certificate with one of `issue`."""
        self._inbox.certify = issue

    def progress(self, progress: Progress) -> None:
        """Called as bytes move: a transfer with a device that was asked renews the deadline."""
        if progress.peer in self._asked:
            with self._inbox.changed:
                self._last_progress = self._clock()
        self._show(progress)

    # --- life ---------------------------------------------------------------------------------

    def start_mail(self, courier: Courier) -> None:
        """Take letters from now on, those of an earlier process first."""
        self._courier = courier
        self._inbox.open(courier)
        self._spawn(self._inbox.serve, "coordinator-mail")

    def start(self, factory: ProgramFactory, *, run: str) -> threading.Thread:
        """Run the program in its own thread; `failure` tells how it ended."""
        return self._spawn(lambda: self._guarded(factory, run), "coordinator-program")

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop waiting and end the threads; a program amid training is left, it resumes later."""
        with self._inbox.changed:
            self._stopping = True
            self._inbox.changed.notify_all()
        self._inbox.close()
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
        except BaseException as exc:
            if self._stopping:  # it was amid something when the store was closed; it resumes
                logger.info("the program %s was left where it was", run)
                return
            logger.exception("the program %s ended", run)
            self.failure = exc  # for the thread that waits

    # --- beside the program -------------------------------------------------------------------

    @property
    def inbox(self) -> Inbox:
        """Where replies wait, also those to what was posted."""
        return self._inbox

    def post(self, device: str, message: AnyMessage, *, run: str) -> AskRow:
        """Send a task that belongs to no program; who posted it takes the reply from `inbox`.

        `run` must be the name of no program; the reply's row carries it.
        """
        return self._send(device, message, run=run, step=0, state="open")

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
        self._delivered, self._blamed = [], []
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
        self._sweep(run)

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
                return self._publish(request)
            case Withdraw():
                return self._withdraw(request)
            case Blame():
                self._blamed.append(request)
            case Note():
                self._events("note", **{**request.values, "run": run, "step": step})
            case _:
                raise LocalProtocolError(f"a program yielded {type(request).__name__}")
        return None

    def _publish(self, wish: Publish) -> Release:
        if self._registry.is_withdrawn(wish.family, wish.release):
            return Release(wish.family, wish.release, (), withdrawn=True)
        release = self._registry.publish(wish)
        self._events("published", family=release.family, release=release.release)
        return release

    def _withdraw(self, wish: Withdraw) -> Release:
        former = self._registry.take_back(
            wish.family, wish.release, instead=wish.instead, reason=wish.reason
        )
        self._events(
            "rolled_back",
            family=wish.family,
            release=wish.release,
            instead=wish.instead,
            reason=wish.reason,
        )
        return former

    def _commit(self, commit: Commit, run: str) -> None:
        used = [(waiting.letter, waiting.row.ask) for waiting in self._delivered]
        with self._store.transaction():
            self._store.commit(run, commit, used)
            for blame in self._blamed:
                self._inbox.blame(blame.device, blame.reason)
        with self._inbox.changed:
            for waiting in self._delivered:
                self._inbox.waiting.pop(waiting.letter, None)
        self._delivered, self._blamed = [], []
        self._events("committed", run=run, step=commit.step, replies=len(used))
        self._sweep(run)

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
        kind = type(message).__name__
        self._events("asked", run=run, step=step, kind=kind, devices=sorted(rows), need=ask.need)
        try:
            quorum = Quorum(ask, rows, self._inbox, self._store, self._fleet)
            taken = self._wait(quorum, lambda: self._send_anew(ask, rows))
        finally:
            self._asked = frozenset()
        self._delivered += [waiting for waiting, _ in taken if waiting not in self._delivered]
        seconds = round(self._clock() - started, 3)
        self._events("answered", run=run, step=step, kind=kind, replies=len(taken), seconds=seconds)
        return tuple(
            Reply(waiting.row.device, waiting.message, staleness, (waiting.letter,))
            for waiting, staleness in taken
        )

    def _send_anew(self, ask: Ask, rows: dict[str, AskRow]) -> bool:
        """Send refused tasks that now have other words: with what their device said it lacked.

        Whether there were any.
        """
        sent = False
        for device, row in list(rows.items()):
            now = self._store.ask_of_task(row.task)
            if now is None or now.state != "refused":
                continue
            if self._fleet.abilities.lacked(device, row.round):
                message = ask.message(device)
                rows[device] = self._send(device, message, run=row.run, step=row.step, state="open")
                sent = True
        return sent

    def _wait(self, quorum: Quorum, send_anew: Callable[[], bool]) -> list[tuple[Waiting, int]]:
        used = frozenset(waiting.letter for waiting in self._delivered)
        with self._inbox.changed:
            while not self._stopping:
                send_anew()
                try:
                    taken = quorum.met(used)
                except QuorumMissed:
                    if send_anew():  # the refusal came between the two lines
                        continue
                    raise
                if taken is not None:
                    return taken
                left_s = self._last_progress + quorum.ask.within_s - self._clock()
                if left_s <= 0:
                    raise QuorumMissed(
                        f"{quorum.found} and no progress for {quorum.ask.within_s:.0f} s; "
                        "retry, skip the step or ask others",
                        quorum.answered,
                    )
                self._inbox.changed.wait(left_s)
        raise Stopped("the coordinator is closing")

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

    def _sweep(self, run: str) -> None:
        """Put away waiting replies that no later Ask can take."""
        with self._inbox.changed:
            for letter, waiting in list(self._inbox.waiting.items()):
                row = waiting.row
                late = self._store.commits_since(row.run, row.step)
                over = row.run == run and late > late_limit(row.kind)
                if over or self._store.finished(row.run):
                    self._store.refuse(letter, row.device, row.kind, "too late to be of use")
                    self._store.set_ask_state(row.ask, "closed")
                    del self._inbox.waiting[letter]
