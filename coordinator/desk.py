"""The coordinator's keys and tables, opened together, for the service and for the commands.

Knows the state folder's layout. Does not know links or programs, and loads no torch.

    keys/root.key, keys/coordinator.key     private keys, mode 0600
    keys/coordinator.key.ring               the epoch keys before, until their grace ends
    coordinator.db                          mailbox and tables
    releases/                               the signed repository, see exporters/publisher.py
    bundles/<family>/<release>/             releases as they were exported
"""

import os
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Self

from coordinator.authority import Authority
from coordinator.config import CoordinatorConfig
from coordinator.door import Door
from coordinator.fleet import DeviceState, Fleet
from coordinator.quarantine import FaultRule
from coordinator.registry import Registry
from coordinator.store import Store
from edge_sdk.errors import StorageError
from edge_sdk.store.keyring import Keyring
from edge_sdk.store.keys import load_or_create
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire.enrolment import EnrolmentCode, root_key_hash, sign_bundle
from edge_sdk.wire.messages import Enrol, Enrolled, decode, encode
from edge_sdk.wire.seal import Identity
from exporters.publisher import Publisher

_CONTROL = "CREATE TABLE IF NOT EXISTS control (name TEXT PRIMARY KEY, value INTEGER NOT NULL)"


class Desk:
    """Keys and tables of a coordinator, which may be running in another process meanwhile.

    Raises:
        StorageError: the folder cannot be made, or the database opened.
        ConfigError: others may read the keys.
    """

    def __init__(self, config: CoordinatorConfig, *, now: Callable[[], float] = time.time) -> None:
        self.config, self.now = config, now
        self.folder = Path(config.service.state_dir)
        _private_folder(self.folder / "keys")
        self.root = load_or_create(self.folder / "keys" / "root.key")
        self.ring = Keyring(self.folder / "keys" / "coordinator.key", hybrid=config.service.hybrid)
        self.mailbox = Mailbox(
            self.folder / "coordinator.db", max_bytes=config.service.store_mb * 1024**2
        )
        self.store = Store(self.mailbox, now)
        self.mailbox.create(_CONTROL)
        self.fleet = Fleet(
            self.store,
            tenant=config.service.tenant,
            now=now,
            approve=config.service.enrolment == "approve",
            rule=FaultRule(
                config.defence.faults,
                within_s=config.defence.fault_days * 86_400,
                lasts_s=config.defence.quarantine_hours * 3600,
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def identity(self) -> Identity:
        """The coordinator's keys in use."""
        return self.ring.identity

    def close(self) -> None:
        """Close the database."""
        self.mailbox.close()

    def token(self, device: str, *, lasts_s: float) -> EnrolmentCode:
        """Make a one-time enrolment code for `device`."""
        hashed = root_key_hash(self.root.public)
        return self.fleet.token(device, root_key_hash=hashed, lasts_s=lasts_s)

    def approve(self, device: str) -> None:
        """Let a pending device in and send it its answer; a running service delivers it.

        Raises:
            EnrolmentError: there is no such device, or it is not pending.
        """
        registry = self.registry()
        with self.store.transaction():
            waited = self.fleet.get(device)
            self.fleet.approve(device)
            if waited is None or waited.state != DeviceState.PENDING:
                return
            certificate = b""
            for letter in self.mailbox.unread():
                if letter.kind == "Enrol" and letter.sender == device:
                    words = decode(bytes(letter.message))
                    if isinstance(words, Enrol) and words.csr:
                        certificate = self.authority.certify(device, words.csr)
                    self.mailbox.mark_read(letter.id)
            answer = Enrolled(device, registry.root(), self.config.task, certificate)
            task = f"approved-{os.urandom(8).hex()}"
            self.mailbox.put(device, type(answer).__name__, task, encode(answer))

    def revoke(self, device: str) -> str:
        """Refuse everything from `device` from now on, and send it nothing that still waits.

        Returns what became of its session with the broker, in a few words.

        Raises:
            EnrolmentError: there is no such device.
        """
        with self.store.transaction():
            self.fleet.revoke(device)
            for stream in self.mailbox.pending(device):
                self.mailbox.mark_done(stream)
        if not self.config.service.broker_dir:
            return "open until the broker's operator ends it (service.broker_dir is not set)"
        return self.door.throw_out(device)

    @cached_property
    def authority(self) -> Authority:
        """The tenant's certificate authority, made when first asked for."""
        service = self.config.service
        return Authority(
            self.folder / "keys",
            self.store,
            tenant=service.tenant,
            days=service.certificate_days,
            now=self.now,
        )

    @cached_property
    def door(self) -> Door:
        """The broker that runs on this machine from `service.broker_dir`."""
        return Door(Path(self.config.service.broker_dir), self.authority)

    def recall(self, name: str) -> int:
        """Return a number that services and commands share, 0 before `note`."""
        with self.store.transaction() as db:
            row = db.execute("SELECT value FROM control WHERE name = ?", (name,)).fetchone()
        return int(row[0]) if row else 0

    def note(self, name: str, value: int) -> None:
        """Keep a number under `name`."""
        with self.store.transaction() as db:
            db.execute("INSERT OR REPLACE INTO control VALUES (?, ?)", (name, value))

    def bundle(self, *, lasts_s: float) -> bytes:
        """Return the present public keys, signed by the root under a version of their own."""
        now_s = int(self.now())
        with self.store.transaction():
            # Grows with the clock, and also when the clock was set back.
            version = max(self.recall("bundle_version") + 1, now_s)
            self.note("bundle_version", version)
        return sign_bundle(
            self.root,
            self.identity.public,
            tenant=self.config.service.tenant,
            version=version,
            expires_s=now_s + int(lasts_s),
            issued_s=now_s,
        )

    def registry(self) -> Registry:
        """Return the releases; `prepare` makes their repository."""
        return Registry(self.store, Publisher(self.folder / "releases"), self.now)


def _private_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.parent.chmod(0o700)
    except OSError as exc:
        raise StorageError(f"cannot make {folder}: {exc.strerror}; check disk and rights") from exc
