"""What devices send: replies to keep until a Commit uses them, wishes for files, enrolments.

Knows letters, which task each reply answers and what is refused. Does not know programs; they take
what waits here through `runner.py`. Lock order: `changed` before the database, never after.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from coordinator.events import Events
from coordinator.fleet import DeviceState, Fleet
from coordinator.registry import Registry
from coordinator.replies import Expected, check_reply, figures
from coordinator.store import AskRow, Store
from edge_sdk.errors import RemoteProtocolError, StorageError
from edge_sdk.link.courier import Courier
from edge_sdk.wire.messages import (
    AnyMessage,
    Enrol,
    Enrolled,
    File,
    ModelReport,
    Refused,
    Renewed,
    RenewKeys,
    TextTask,
    WantFiles,
    decode,
)
from edge_sdk.wire.seal import Header
from edge_sdk.wire.transfer import Refusal

logger = logging.getLogger(__name__)

MAIL_WAIT_S = 1.0
"""The mail thread looks again after this long even if nobody called it."""
MOST_PATHS = 256
"""No release has more files, and a device asks for each once."""
REASON_CHARS = 300
"""A device's reason is kept this far; it is shown to people, and a device may send 64 KiB."""


Certify = Callable[[str, bytes], bytes]
"""(device, PKCS#10 request) -> certificate for the broker; raises RemoteProtocolError."""


@dataclass(slots=True)
class Waiting:
    """A reply that no Commit has used yet. `checked`: the program's own check has passed."""

    row: AskRow
    letter: int
    message: AnyMessage
    checked: bool = False


class Inbox:
    """The coordinator's side of the mail. `waiting` is read and changed with `changed` held.

    Attributes:
        waiting: letter id -> reply that no Commit has used yet.
        certify: issues certificates for the broker, None where none are issued.
        changed: notified when letters were taken.
    """

    def __init__(
        self, store: Store, fleet: Fleet, registry: Registry, events: Events, *, task: TextTask
    ) -> None:
        self._store, self._fleet, self._registry, self._events = store, fleet, registry, events
        self._task = task
        self._courier: Courier | None = None
        self._arrived = threading.Event()
        self._last_letter = 0
        self._closing = False
        self.certify: Certify | None = None
        self.changed = threading.Condition()
        self.waiting: dict[int, Waiting] = {}

    def accept(self, header: Header, message: AnyMessage) -> None:
        """Called inside the transaction that accepts a message: note who was heard of.

        Raises:
            RemoteProtocolError: new keys that the device may not have.
        """
        self._fleet.seen(header.sender)
        if isinstance(message, Enrol | ModelReport):
            self._fleet.abilities.learn(header.sender, message.reads)
        if isinstance(message, RenewKeys):
            self._fleet.renew(header.sender, message)
        self._arrived.set()

    def refused(self, header: Header, refusal: Refusal, reason: str) -> None:
        """Called by the courier for a message that its sender signed and nobody can read."""
        with self._store.transaction():
            self._store.refuse_ask(header.task, header.sender)
            quarantined = self._fleet.fault(header.sender, refusal.name.lower(), reason)
        self._tell_refusal(header.sender, header.kind, reason, quarantined=quarantined)
        self._arrived.set()

    def open(self, courier: Courier) -> None:
        """Take the letters that an earlier process left."""
        self._courier = courier
        self._take_letters()

    def close(self) -> None:
        """Make `serve` return."""
        self._closing = True
        self._arrived.set()

    def serve(self) -> None:
        """Take letters as they come, until `close`."""
        while not self._closing:
            self._arrived.wait(MAIL_WAIT_S)
            self._arrived.clear()
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
        with self.changed:
            self.changed.notify_all()

    def _take(self, letter: int, sender: str, data: bytes) -> None:
        message: AnyMessage | None = None
        try:
            message = decode(data)
            if isinstance(message, Enrol):
                self._welcome(letter, message)
            elif isinstance(message, RenewKeys):
                self._renewed(letter, sender, message)
            elif not self._fleet.is_active(sender):
                # Not a fault: nobody told it, and what it sent was asked for before.
                kind = type(message).__name__
                self._store.refuse(letter, sender, kind, "revoked or in quarantine")
            elif isinstance(message, WantFiles):
                self._serve_files(letter, sender, message)
            elif isinstance(message, Refused):
                self._note_refusal(letter, sender, message)
            else:
                self._keep_reply(letter, sender, message)
        except RemoteProtocolError as exc:
            self.refuse(letter, sender, message, str(exc), step="reply")

    def _welcome(self, letter: int, enrol: Enrol) -> None:
        assert self._courier is not None
        self._courier.forget(enrol.device)
        found = self._fleet.get(enrol.device)
        if found is not None and found.state == DeviceState.PENDING:
            # The letter stays unread: `device approve` answers it.
            self._events("pending", device=enrol.device)
            return
        certificate = self._certify(enrol.device, enrol.csr)
        answer = Enrolled(enrol.device, self._registry.root(), self._task, certificate)
        with self._store.transaction():
            self._courier.send(enrol.device, answer, task=enrol.token_id)
            self._store.mailbox.mark_read(letter)
        self._events(
            "enrolled",
            device=enrol.device,
            families=list(enrol.families),
            memory_mb=enrol.memory_mb,
        )

    def _certify(self, device: str, csr: bytes) -> bytes:
        return self.certify(device, csr) if self.certify is not None and csr else b""

    def _renewed(self, letter: int, sender: str, words: RenewKeys) -> None:
        assert self._courier is not None
        answer = Renewed(words.task_id, self._certify(sender, words.csr))
        with self._store.transaction():
            self._courier.send(sender, answer, task=words.task_id)
            self._store.mailbox.mark_read(letter)
        self._events("renewed", device=sender)

    def _serve_files(self, letter: int, sender: str, want: WantFiles) -> None:
        assert self._courier is not None
        if len(set(want.paths)) != len(want.paths) or len(want.paths) > MOST_PATHS:
            raise RemoteProtocolError(f"{len(want.paths)} files at once, or one of them twice")
        sources = {path: self._registry.file(path) for path in want.paths}
        with self._store.transaction():
            for path, source in sources.items():
                named = File(want.task_id, path, b"")
                self._courier.send_file(sender, named, source, task=want.task_id)
            self._store.mailbox.mark_read(letter)
        total = sum(source.stat().st_size for source in sources.values())
        self._events("files", device=sender, count=len(sources), bytes=total)

    def _note_refusal(self, letter: int, sender: str, refused: Refused) -> None:
        row = self._row_of(sender, refused.task_id)
        with self._store.transaction():
            self._store.refuse(
                letter, sender, row.kind, f"refused by the device: {refused.reason[:REASON_CHARS]}"
            )
            excused = "allowance" in refused.lacks
            self._store.set_ask_state(row.ask, "excused" if excused else "refused")
            self._fleet.abilities.lack(sender, row.round, refused.lacks)
        self._events("refused", device=sender, kind=row.kind, reason=refused.reason[:REASON_CHARS])

    def _keep_reply(self, letter: int, sender: str, message: AnyMessage) -> None:
        row = self._row_of(sender, getattr(message, "task_id", ""))
        check_reply(message, Expected.from_text(row.expected))
        if self._store.finished(row.run):
            self._store.refuse(letter, sender, row.kind, "too late to be of use")
            return
        with self.changed:
            self.waiting[letter] = Waiting(row, letter, message)
        self._events("reply", device=sender, kind=type(message).__name__, **figures(message))

    def _row_of(self, sender: str, task: str) -> AskRow:
        row = self._store.ask_of_task(task)
        if row is None or row.device != sender:
            raise RemoteProtocolError(
                f"{sender} answers task {task[:80]!r}, which it was not given"
            )
        if row.state != "open":
            raise RemoteProtocolError(f"{sender} answers task {task[:80]!r}, which is closed")
        return row

    def refuse(
        self, letter: int, device: str, message: AnyMessage | None, reason: str, *, step: str
    ) -> None:
        """Put a letter away unused, and count a fault of its sender found at `step`."""
        kind = type(message).__name__ if message is not None else "unreadable"
        with self._store.transaction():
            self._store.refuse(letter, device, kind, reason)
            self._store.refuse_ask(getattr(message, "task_id", ""), device)
            quarantined = self._fleet.fault(device, step, reason)
        self._tell_refusal(device, kind, reason, quarantined=quarantined)

    def blame(self, device: str, reason: str) -> None:
        """Count a fault that only the comparison with others has shown."""
        quarantined = self._fleet.fault(device, "proportion", reason)
        self._tell_refusal(device, "AdapterUpdate", reason, quarantined=quarantined)

    def put_away(self, waiting: Waiting, reason: str) -> None:
        """Take a reply out of those waiting, unused; its device's task stays unanswered."""
        with self._store.transaction():
            self._store.refuse(waiting.letter, waiting.row.device, waiting.row.kind, reason)
            self._store.set_ask_state(waiting.row.ask, "refused")
        del self.waiting[waiting.letter]

    def _tell_refusal(self, device: str, kind: str, reason: str, *, quarantined: bool) -> None:
        reason = reason[:REASON_CHARS]
        logger.warning("refused a %s of %s: %s", kind, device[:12], reason)
        self._events("reply_refused", device=device, kind=kind, reason=reason)
        if quarantined:
            logger.warning("%s is in quarantine; revoke it or approve it again", device[:12])
            self._events("quarantined", device=device)
