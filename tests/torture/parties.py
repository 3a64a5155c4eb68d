"""A light coordinator and devices that keep a history: real stores, couriers and runner, no torch.

Knows how the product's parts are put together, and a program that adds integers up. Does not know
which faults are made, nor judges anything: it writes down what happens (`history.py`).

An update is named `<device>/<task>`; its value is an integer made from a hash of its bytes, so a
changed byte or a lost or repeated update makes another sum.
"""

import hashlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from coordinator.events import Events
from coordinator.fleet import Fleet
from coordinator.programs import Ask, Commit, Program, ProgramFactory
from coordinator.registry import Registry
from coordinator.runner import Runner
from coordinator.store import Store
from edge_sdk.errors import LinkError, LocalProtocolError, QuorumMissed, StorageError
from edge_sdk.link.base import Link
from edge_sdk.link.courier import Courier
from edge_sdk.link.keys import CoordinatorKeys
from edge_sdk.store.keys import load_or_create
from edge_sdk.store.mailbox import Letter, Mailbox
from edge_sdk.wire.enrolment import root_key_hash, sign_bundle
from edge_sdk.wire.messages import AdapterUpdate, Enrol, TextTask, TrainAdapter, decode
from exporters.publisher import Publisher
from tests.torture.history import Did, History, read

TENANT = "home"
RUN = "sum"
TASK = TextTask(
    name="kinds",
    prompt="Request: {text}\nKind:",
    generation_prompt="Kind: {label}\nRequest:",
    labels=("sum", "story"),
    words=(" sum", " story"),
)
KEYS_LAST_S = 86_400
LOOK_S = 0.1
"""A device looks at its mailbox this often even if its courier did not call."""

Told = Callable[[str], None]


def task_of(step: int) -> TrainAdapter:
    """Return the task of one step; its words are the same whenever it is asked again."""
    return TrainAdapter(
        task_id="any",
        round=step,
        family="slm",
        release="base",
        adapter=b"",
        adapter_seed=1,
        rank=2,
        alpha=4.0,
        targets=("q_proj",),
        codec_id="identity",
        codec=b"",
        steps=1,
        batch=1,
        lr=0.01,
        synthetic_weight=0.5,
        bytes_target=0,
        seed=step,
    )


def update_of(task: TrainAdapter, codes: bytes) -> AdapterUpdate:
    """Return the update that carries `codes`."""
    return AdapterUpdate(
        task_id=task.task_id,
        round=task.round,
        release=task.release,
        codec_id=task.codec_id,
        codes=codes,
        examples=3,
        raw_bytes=100,
        cosine=0.9,
        seconds={"train": 0.1},
        peak_mb=10.0,
    )


def value_of(codes: bytes) -> int:
    """Return the integer that an update of these bytes adds to the sum."""
    return int.from_bytes(hashlib.sha256(codes).digest()[:5], "big")


def counting(
    devices: tuple[str, ...],
    history: History,
    *,
    need: int,
    within_s: float,
    over: Callable[[int], bool],
    told: Told = lambda _text: None,
) -> ProgramFactory:
    """Return a program that adds up updates, step after step, until `over(step)`."""

    def build(resume: Commit | None) -> Program:
        total, step, attempt = 0, -1, ""
        if resume is not None:
            step, total = resume.step, int(resume.state["total"])
            attempt = resume.state["attempt"].decode()
        history(Did.RESUMED, run=RUN, step=step, attempt=attempt)
        told(f"resumed {step}")
        step += 1
        while not over(step):
            try:
                replies = yield Ask(task_of(step), devices, need=need, within_s=within_s)
            except QuorumMissed:
                continue
            parts = [
                (f"{reply.device}/{reply.message.task_id}", value_of(reply.message.codes))
                for reply in replies
            ]
            total += sum(value for _, value in parts)
            attempt = os.urandom(8).hex()
            history(Did.ATTEMPT, run=RUN, step=step, attempt=attempt, parts=parts, total=total)
            yield Commit(step, {"total": str(total).encode(), "attempt": attempt.encode()})
            history(Did.COMMITTED, run=RUN, step=step, attempt=attempt)
            told(f"committed {step}")
            step += 1

    return build


def account(store: Store, told: Callable[..., None]) -> None:
    """Call `told` as a History is called, with each refused and each unused update of `store`."""
    with store.transaction() as db:
        refused = db.execute(
            "SELECT letters.sender, letters.task, refused.reason FROM refused"
            " JOIN letters ON letters.id = refused.letter"
            " WHERE letters.kind = 'AdapterUpdate' ORDER BY letters.id"
        ).fetchall()
    for sender, task, reason in refused:
        told(Did.REJECTED, update=f"{sender}/{task}", reason=reason)
    for letter in store.mailbox.unread():
        if isinstance(decode(letter.message), AdapterUpdate):
            told(Did.HELD, update=f"{letter.sender}/{letter.task}")


class Headquarters:
    """The coordinator: `folder` holds its keys and stores, so that another process goes on.

    Every name in `devices` is enrolled; their keys are made in `folder`/devices where missing.
    """

    def __init__(
        self, folder: Path, link: Link, devices: Iterable[str], *, patience_s: float = 0.5
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.devices = tuple(devices)
        self.identity = load_or_create(folder / "coordinator.key")
        self.root = load_or_create(folder / "root.key")
        self.mailbox = Mailbox(folder / "coordinator.db")
        self.store = Store(self.mailbox, time.time)
        self.fleet = Fleet(self.store, tenant=TENANT, now=time.time)
        registry = Registry(self.store, Publisher(folder / "releases"), time.time)
        registry.prepare()
        self.runner = Runner(
            self.store, self.fleet, registry, Events(time.time, store=self.store), task=TASK
        )
        for name in self.devices:
            if self.fleet.get(name) is None:
                self._enrol(name, folder / "devices")
        self.courier = Courier(
            link,
            self.mailbox,
            self.identity,
            tenant=TENANT,
            me="coordinator",
            lookup=self.fleet.lookup,
            now=time.time,
            rng=random.Random(0),
            accept=self.runner.accept,
            admit=self.fleet.admit,
            progress=self.runner.progress,
            patience_s=patience_s,
        )

    def start(self) -> None:
        """Connect, tell the devices our keys, and take mail from now on."""
        self.courier.start()
        self.runner.start_mail(self.courier)
        self.announce()

    def announce(self) -> None:
        """Tell the devices our keys."""
        now_s = time.time()
        self.courier.announce_keys(
            sign_bundle(
                self.root,
                self.identity.public,
                tenant=TENANT,
                version=int(now_s),
                expires_s=int(now_s) + KEYS_LAST_S,
            )
        )

    def wait_until_delivered(self, timeout_s: float) -> None:
        """Return once every task is confirmed by its device: no device gets more to do then.

        Raises:
            LinkError: that took longer than `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        with self.courier.mail:
            while left := self.mailbox.waiting():
                if time.monotonic() > deadline:
                    raise LinkError(f"{len(left)} tasks still wait after {timeout_s:.0f} s")
                self.courier.mail.wait(LOOK_S)

    def account(self, history: History) -> None:
        """Write down what the store holds besides aggregates: refused and unused updates."""
        account(self.store, history)

    def close(self) -> None:
        """End the threads and close the store."""
        self.runner.close()
        self.courier.close()
        self.mailbox.close()

    def _enrol(self, name: str, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        public = load_or_create(folder / f"{name}.key").public
        code = self.fleet.token(name, root_key_hash=root_key_hash(self.root.public))
        wish = Enrol(code.token_id, code.secret, name, public.sign, public.receive, (), 512)
        self.fleet.admit(wish, public)


class Device:
    """One device that answers every task with `size(task id)` random bytes, and keeps a history.

    `folder` is the coordinator's: the device's key is in `folder`/devices, its store there too
    unless `store` names another folder. What an earlier process of it left open in `history` is
    looked up in the store: an item leaves the outbox by the coordinator's Done only.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        link: Link,
        history: Path,
        *,
        size: Callable[[random.Random], int],
        seed: int,
        store: Path | None = None,
        patience_s: float = 0.5,
    ) -> None:
        self.name, self._size, self._seed = name, size, seed
        self.refused = threading.Event()
        """Set when the store refused a write, as a StorageError; it is tried again."""
        keys = folder / "devices"
        root = load_or_create(folder / "root.key").public
        self.keys = CoordinatorKeys(TENANT, root_key_hash(root), now=time.time)
        self.mailbox = Mailbox((store or keys) / f"{name}.db")
        self._before = read(history)[0].get(name, [])
        self.history = History(history / f"{name}.jsonl")
        self._open: dict[bytes, str] = {}
        self.courier = Courier(
            link,
            self.mailbox,
            load_or_create(keys / f"{name}.key"),
            tenant=TENANT,
            me=name,
            lookup=self.keys.lookup,
            now=time.time,
            rng=random.Random(seed),
            keys=self.keys.receive,
            patience_s=patience_s,
        )
        self._closing = False
        self._thread = threading.Thread(target=self._live, name=f"{name}-life", daemon=True)

    def start(self) -> None:
        """Go on with what is in the store, then answer what comes."""
        self._recover()
        self.courier.start()
        self._thread.start()

    def close(self) -> None:
        """End the threads and close the store; what is unfinished stays in it."""
        self._closing = True
        with self.courier.mail:
            self.courier.mail.notify_all()
        if self._thread.ident is not None:
            self._thread.join()
        self.courier.close()
        self.mailbox.close()
        self.history.close()

    @property
    def idle(self) -> bool:
        """Whether everything that was sent is acknowledged and written down so."""
        return not self._open and not self.mailbox.pending() and not self.mailbox.unread()

    def wait_until_idle(self, timeout_s: float) -> None:
        """Return once `idle`.

        Raises:
            LinkError: that took longer than `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        with self.courier.mail:
            while not self.idle:
                if time.monotonic() > deadline:
                    raise LinkError(f"{self.name} still waits after {timeout_s:.0f} s")
                self.courier.mail.wait(LOOK_S)

    def _live(self) -> None:
        while not self._closing:
            try:
                self._settle()
                for letter in self.mailbox.unread():
                    self._answer(letter)
                self._settle()
            except StorageError:
                self.refused.set()
            with self.courier.mail:
                if not self._closing:
                    self.courier.mail.wait(LOOK_S)

    def _answer(self, letter: Letter) -> None:
        message = decode(letter.message)
        if not isinstance(message, TrainAdapter):
            self.mailbox.mark_read(letter.id)
            return
        rng = random.Random(f"{self._seed} {self.name} {message.task_id}")
        codes = rng.randbytes(self._size(rng))
        update = f"{self.name}/{message.task_id}"
        self.history(Did.SENT, update=update, value=value_of(codes))
        try:
            with self.mailbox.transaction():
                stream = self.courier.send(
                    "coordinator", update_of(message, codes), task=letter.task
                )
                self.mailbox.mark_read(letter.id)
        except LocalProtocolError as exc:
            self.history(Did.PARKED, update=update, reason=str(exc))
            self.mailbox.mark_read(letter.id)
            return
        self._open[stream] = update

    def _settle(self) -> None:
        if not self._open:
            return
        waiting = set(self.mailbox.waiting())
        gone = [stream for stream in self._open if stream not in waiting]
        if not gone:
            return
        parked = {item.stream: item.parked for item in self.mailbox.parked()}
        for stream in gone:
            update = self._open.pop(stream)
            if stream in parked:
                self.history(Did.PARKED, update=update, reason=parked[stream])
            else:
                self.history(Did.DONE, update=update)

    def _recover(self) -> None:
        for stream in self.mailbox.waiting():
            item = self.mailbox.posted(stream)
            if item is not None:
                self._open[stream] = f"{self.name}/{item.task}"
        unread = {f"{self.name}/{letter.task}" for letter in self.mailbox.unread()}
        parked = {f"{self.name}/{item.task}": item.parked for item in self.mailbox.parked()}
        settled = {line["update"] for line in self._before if line["did"] in (Did.DONE, Did.PARKED)}
        sent = {line["update"] for line in self._before if line["did"] == Did.SENT}
        for update in sorted(sent - settled - unread - set(self._open.values())):
            if update in parked:
                self.history(Did.PARKED, update=update, reason=parked[update])
            else:
                self.history(Did.DONE, update=update)
