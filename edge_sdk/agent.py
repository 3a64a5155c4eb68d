"""The device: examples in, answers out, and mail worked through in between.

Knows how the device's rooms fit together and the order of its life: enrol, receive a model, train,
report. Does not know how any of these is done.

    with EdgeDevice.from_config("edge.toml") as device:
        device.enrol(code)                        # once
        device.add_examples([Example("what is the capital of France?", "question")])
        device.run_in_background()
        print(device.classify("name three rivers"), device.generate("Request: hello"))
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdk.collect import Example, ExampleStore, read_examples
from edge_sdk.config import EdgeConfig
from edge_sdk.connection import Connection
from edge_sdk.errors import (
    EnrolmentError,
    FleetError,
    LinkError,
    RuntimeFailure,
    StorageError,
)
from edge_sdk.graphs import OPERATORS
from edge_sdk.leaving import Leaving, explain_all
from edge_sdk.link.base import Link
from edge_sdk.link.passwords import COORDINATOR
from edge_sdk.measure import peak_mb
from edge_sdk.membership import Member, Membership
from edge_sdk.memory import DeviceMemory
from edge_sdk.models import ModelStore, child_probe
from edge_sdk.store.ledger import Ledger
from edge_sdk.store.mailbox import Letter, Mailbox
from edge_sdk.store.outbox import OutboxRules
from edge_sdk.tasks import Event, Handled, TaskDesk
from edge_sdk.train.policy import Policy
from edge_sdk.wire.enrolment import EnrolmentCode
from edge_sdk.wire.messages import Enrolled, Renewed, decode, encode

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edge_sdk.cloud_drafts import CloudDrafts
    from edge_sdk.encoders import EncoderSession
    from edge_sdk.runtime import SlmSession

logger = logging.getLogger(__name__)

RETRY_S = 5.0
"""Pause after this machine's disk refused; an operator frees space in minutes, not milliseconds."""
UPKEEP_S = 60.0
"""How often keys are looked at; they last days."""


class EdgeDevice:
    """One device; also a context manager. Several threads may ask its model.

    Raises:
        ConfigError: the settings name files that cannot be used.
        DataError: the examples named in the settings cannot be read.
        StorageError: the state folder refuses.
    """

    def __init__(
        self,
        config: EdgeConfig,
        *,
        link: Link | None = None,
        on_event: Event | None = None,
        policy: Policy | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Open the device's state; nothing is sent or loaded yet.

        `link` replaces the MQTT link of the settings, e.g. by `edge_sdk.link.memory.MemoryLink`.
        `on_event` is called with a plain dict at each step worth showing. `policy` is asked before
        each step of a training whether it may go on (`edge_sdk.train.policy`); it takes the place
        of `train.min_charge` and `train.max_load`, which decide without it. `now` is this machine's
        clock in seconds since 1970; it is shown and written down, and nothing is judged by it.
        """
        self.config, self._now, self._policy = config, now, policy
        self._tell: Event = on_event or (lambda event: None)
        self._state = Path(config.device.state_dir)
        try:
            self._state.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise StorageError(f"cannot make the state folder {self._state}: {exc}") from exc
        device = config.device
        self._mailbox = Mailbox(
            self._state / "mailbox.db",
            max_bytes=device.store_mb * 1024 * 1024,
            outbox=OutboxRules(
                device.outbox_mb * 1024 * 1024, device.outbox_days * 86_400.0, device.when_full
            ),
        )
        self._memory = DeviceMemory(self._mailbox)
        self.ledger = Ledger(self._mailbox, now)
        self._member = Member(config, self._mailbox, self._memory, self._state)
        self._wire = Connection(
            config, self._state, self._mailbox, self._member, self.ledger, link=link
        )
        data = config.data
        self._examples = ExampleStore(
            self._state / "examples.db", held_out=data.held_out, limit=data.max_examples
        )
        if data.examples:
            found = read_examples(
                data.examples, text_column=data.text_column, label_column=data.label_column
            )
            self._examples.add(found)
        self._desk: TaskDesk | None = None
        self._upkeep_due = 0.0
        self._closing = threading.Event()
        self._background: threading.Thread | None = None
        self._opening = threading.Lock()

    @classmethod
    def from_config(
        cls,
        path: str | Path,
        *,
        link: Link | None = None,
        on_event: Event | None = None,
        policy: Policy | None = None,
        **overrides: object,
    ) -> "EdgeDevice":
        """Open the device that the TOML file `path` describes.

        `overrides` win over the file: `train__threads=2`, or `**{"train.threads": 2}`. The rest is
        `EdgeDevice`'s own.

        Raises:
            ConfigError: the file or an override is wrong.
            DataError: the examples it names cannot be read.
            StorageError: the state folder refuses.
        """
        dotted = {key.replace("__", "."): value for key, value in overrides.items()}
        return cls(EdgeConfig.load(path, dotted), link=link, on_event=on_event, policy=policy)

    def __enter__(self) -> "EdgeDevice":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop working and close everything; what is unfinished goes on at the next start."""
        self._closing.set()
        if self._background is not None and self._background is not threading.current_thread():
            self._background.join()
        self._wire.close()
        if self._desk is not None:
            self._desk.close()
        self._examples.close()
        self._mailbox.close()
        self._wire.release()

    # --- becoming a member --------------------------------------------------------------------

    @property
    def membership(self) -> Membership | None:
        """To whom this device belongs; None before `enrol`."""
        return self._member.membership

    def enrol(self, code: str, *, timeout_s: float = 60.0) -> None:
        """Join the tenant that issued the one-time `code`; returns once the coordinator agreed.

        Raises:
            EnrolmentError: the code is malformed, expired, used, or for another device.
            LinkError: the broker or the coordinator did not answer in time; try again.
            StorageError: the state folder refuses, or another process runs this device.
        """
        known = self.membership
        if known is not None and known.complete:
            raise EnrolmentError(
                f"this device is enrolled as {known.device} of {known.tenant}; "
                f"to enrol anew use another device.state_dir"
            )
        ticket = EnrolmentCode.from_text(code)
        self._member.begin(ticket)
        try:
            self._join(ticket, timeout_s)
        except EnrolmentError:
            self._wire.hang_up()
            self._member.forget()
            raise
        self._tell({"event": "enrolled", "device": ticket.device, "tenant": ticket.tenant})

    def _join(self, ticket: EnrolmentCode, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        courier = self._wire.open()
        self._member.keys.wait(timeout_s)
        courier.wait_until_done(self._member.request(ticket, courier), timeout_s)
        while not self._member.complete:
            left = deadline - time.monotonic()
            if left <= 0:
                raise LinkError(
                    "the coordinator has the enrolment and has not answered it yet; if devices "
                    f"are approved there by hand, have {ticket.device} approved, then try again"
                )
            courier.wait_for_mail(min(left, 1.0))
            self._work_through()
        if self.config.link.mutual_tls and self._member.certificate.held:
            self._wire.hang_up()  # the next connection shows the certificate

    def renew_keys(self, *, identity: bool = False) -> None:
        """Change this device's receive keys now, with `identity` its identity key as well.

        Receive keys change by themselves every week; the identity key only here.

        Raises:
            EnrolmentError: the device is not enrolled.
            StorageError: the disk refuses, or another process runs this device.
        """
        self._member.require()
        self._member.renew(self._wire.open(), identity=identity)

    # --- examples and answers -----------------------------------------------------------------

    def add_examples(self, examples: Iterable[Example]) -> int:
        """Keep labelled texts for training and measuring; return how many were new. They stay here.

        Raises:
            DataError: an empty or overlong text.
            StorageError: the disk refuses; none was kept.
        """
        return self._examples.add(examples)

    def generate(self, prompt: str, **options: Any) -> str:
        """Return what the device's model writes after `prompt` (see `SlmSession.generate`).

        Raises:
            RuntimeFailure: no model yet, or a prompt it cannot serve.
        """
        return self._writer().generate(prompt, **options)

    def stream(self, prompt: str, **options: Any) -> Iterator[str]:
        """Return `generate`'s answer piece by piece.

        Raises:
            RuntimeFailure: no model yet, or a prompt it cannot serve.
        """
        return self._writer().stream(prompt, **options)

    def cloud_drafts(self, **options: Any) -> "CloudDrafts":
        """Return the way to answers of the coordinator's model, drafted here; `options` are its.

        Raises:
            RuntimeFailure: switched off on this device, or no model yet.
            EnrolmentError: the device is not enrolled.
        """
        from edge_sdk.cloud_drafts import CloudDrafts

        if not self.config.runtime.cloud_drafts:
            raise RuntimeFailure(
                "cloud drafts are off: prompts would leave this device, as token ids sealed for "
                "the coordinator; set runtime.cloud_drafts = true to allow it"
            )
        self._member.require()
        calls = self._wire.open().calls
        return CloudDrafts(
            self._writer(),
            lambda question, timeout_s: calls.ask(COORDINATOR, question, timeout_s=timeout_s),
            **options,
        )

    def classify(self, text: str) -> str:
        """Return the label of the device's task that fits `text` best.

        Raises:
            RuntimeFailure: no model yet, or an empty text.
        """
        return self.session.classify(text)

    def embed(self, texts: Sequence[str]) -> "npt.NDArray[np.float32]":
        """Return each text's embedding, (n, d) float32 of unit length, if the model is an encoder.

        Raises:
            RuntimeFailure: no model yet, a model that writes text, or an empty text.
        """
        from edge_sdk.encoders import EncoderSession

        session = self.session
        if not isinstance(session, EncoderSession):
            raise RuntimeFailure("this device's model writes text and has no embeddings")
        return session.embed(texts)

    def _writer(self) -> "SlmSession":
        from edge_sdk.runtime import SlmSession

        session = self.session
        if not isinstance(session, SlmSession):
            raise RuntimeFailure(
                f"release {session.release} is an encoder, which labels and embeds texts and "
                "writes none; use classify or embed"
            )
        return session

    @property
    def session(self) -> "SlmSession | EncoderSession":
        """The model that runs now, opened on first use.

        Raises:
            RuntimeFailure: the device has received none yet.
        """
        with self._opening:
            desk = self._desked()
            if desk.session is None:
                desk.open_current()
            if desk.session is None:
                raise RuntimeFailure("no model has arrived yet; run the device to receive one")
            return desk.session

    def refresh(self) -> "SlmSession | EncoderSession":
        """Return the model that runs now, also where another process of this device changed it.

        Raises:
            RuntimeFailure: the device has received none yet.
        """
        with self._opening:
            self._desked().open_current()
        return self.session

    # --- mail ---------------------------------------------------------------------------------

    def step(self, timeout_s: float = 0.0) -> int:
        """Work through the mail that is here, after waiting up to `timeout_s` for some.

        Returns how many messages were handled.

        Raises:
            EnrolmentError: the device is not enrolled.
            StorageError: the disk refuses, or another process runs this device.
        """
        if self.membership is None:
            raise EnrolmentError("this device is not enrolled; call enrol(code) first")
        courier = self._wire.open()
        if timeout_s > 0:
            courier.wait_for_mail(timeout_s)
        if time.monotonic() >= self._upkeep_due:
            self._upkeep_due = time.monotonic() + UPKEEP_S
            self._member.upkeep(courier)
        return self._work_through()

    def run(self) -> None:
        """Work through mail until `close` is called from another thread.

        A full disk pauses the work and loses nothing.

        Raises:
            EnrolmentError: the device is not enrolled.
            StorageError: another process runs this device.
        """
        self._member.require()
        self._wire.open()
        while not self._closing.is_set():
            try:
                self.step(timeout_s=0.5)
            except StorageError as exc:
                logger.error("%s", exc)
                self._tell({"event": "paused", "reason": str(exc)})
                self._closing.wait(RETRY_S)

    def run_in_background(self) -> threading.Thread:
        """Start `run` in a thread that ends with `close`; return the thread.

        Raises:
            EnrolmentError: the device is not enrolled.
            StorageError: another process runs this device.
        """
        self._member.require()
        self._wire.open()
        if self._background is None:
            self._background = threading.Thread(target=self.run, name="edge-device", daemon=True)
            self._background.start()
        return self._background

    def _work_through(self) -> int:
        done = 0
        for letter in self._mailbox.unread():
            if self._closing.is_set():
                break
            self._handle(letter)
            done += 1
        return done

    def _handle(self, letter: Letter) -> None:
        try:
            message = decode(letter.message)
        except FleetError as exc:
            logger.warning("a letter of kind %s was not understood: %s", letter.kind[:20], exc)
            self._mailbox.mark_read(letter.id)
            return
        # The coordinator's signed time: this device's clock may be years off (PROTOCOL.md 1.3).
        self._member.time.heard(letter.header.created_s)
        if isinstance(message, Enrolled | Renewed):
            self._take(letter, message)
            return
        now = datetime.fromtimestamp(self._member.time(), UTC)
        handled = self._desked().handle(message, now=now)
        self._settle(letter, handled)

    def _take(self, letter: Letter, answer: Enrolled | Renewed) -> None:
        with self._mailbox.transaction():
            if isinstance(answer, Enrolled):
                self._member.take(answer)
            elif self._member.renewed(answer):
                self._tell({"event": "renewed"})
            self._mailbox.mark_read(letter.id)
        if self._wire.courier is not None:
            self._wire.courier.nudge()

    def _settle(self, letter: Letter, handled: Handled) -> None:
        """Replies, what they changed, and the letter's end: all or none."""
        with self._mailbox.transaction():
            for reply in handled.replies:
                kind = type(reply).__name__
                task = getattr(reply, "task_id", letter.task)
                self._mailbox.put(COORDINATOR, kind, task, encode(reply))
            for name, value in handled.remember.items():
                self._memory.remember(name, value)
            self._mailbox.mark_read(letter.id)
        if self._wire.courier is not None:
            self._wire.courier.nudge()
        for reply in handled.replies:
            self._tell({"event": "reply", "kind": type(reply).__name__, "task": letter.task})

    # --- what others may see ------------------------------------------------------------------

    def explain(self) -> list[Leaving]:
        """Return, field by field, what waits to leave, what last left, and what ever could.

        Which device this is, message kinds, sizes and times travel in clear besides
        (`edge_sdk.leaving.IN_CLEAR`).
        """
        member = self.membership
        coordinator = self._member.known_keys(member).lookup(COORDINATOR) if member else None
        key = coordinator.receive_id.hex() if coordinator else ""
        with self._mailbox.transaction() as rows:
            streams = rows.execute("SELECT stream FROM outbox ORDER BY rowid").fetchall()
            found = [self._mailbox.posted(stream) for (stream,) in streams]
        items = [item for item in found if item is not None]
        return explain_all(items, self.ledger.entries(), to=COORDINATOR, key=key)

    def status(self) -> dict[str, object]:
        """Return figures about this device, without any text of its examples."""
        member, courier = self.membership, self._wire.courier
        models = self._models() if member is not None and member.complete else None
        current = models.current if models else None
        previous = models.previous if models else None
        own = self._examples.held_out()
        return {
            "device": member.device if member else "",
            "tenant": member.tenant if member else "",
            "enrolled": bool(member and member.complete),
            "broker": self.config.link.broker,
            "connected": self._wire.connected,
            "release": current.release if current else "",
            "previous_release": previous.release if previous else "",
            "adapter": bool(current and current.adapter),
            "examples": len(self._examples),
            "held_out": len(own),
            "waiting": len(self._mailbox.waiting()),
            "parked": [f"{item.kind}: {item.parked}" for item in self._mailbox.parked()],
            "bytes_up": sum(courier.bytes_up.values()) if courier else 0,
            "bytes_down": sum(courier.bytes_down.values()) if courier else 0,
            "peak_mb": round(peak_mb(), 1),
        }

    # --- parts, made when first needed --------------------------------------------------------

    def _models(self) -> ModelStore:
        runtime = self.config.runtime
        probe = child_probe(
            timeout_s=runtime.probe_s, memory_mb=runtime.probe_mb, threads=runtime.threads
        )
        member = self._member.require()
        return ModelStore(
            self._state / "models",
            root=member.tuf_root,
            probe=probe,
            device=member.device,
            operators=OPERATORS | frozenset(runtime.operators),
        )

    def _desked(self) -> TaskDesk:
        if self._desk is None:
            task = self._member.require().task
            assert task is not None
            self._desk = TaskDesk(
                self.config,
                task=task,
                examples=self._examples,
                models=self._models(),
                recall=self._memory.recall,
                on_event=self._tell,
                policy=self._policy,
            )
        return self._desk
