"""One device's end of the wire: which process may use it, how it dials, and the courier at work.

Knows the lock in the state folder and the link settings. Does not know what is sent.
"""

import fcntl
import os
import random
import threading
from pathlib import Path
from typing import IO

from edge_sdk.config import EdgeConfig
from edge_sdk.errors import StorageError
from edge_sdk.link.base import Link
from edge_sdk.link.courier import Courier
from edge_sdk.membership import Member, Membership
from edge_sdk.store.ledger import Ledger
from edge_sdk.store.mailbox import Mailbox


class Connection:
    """Opens on first use and stays open; `link` replaces the MQTT link of the settings.

    Attributes:
        courier: the courier at work, None before `open`.
    """

    def __init__(
        self,
        config: EdgeConfig,
        folder: Path,
        mailbox: Mailbox,
        member: Member,
        ledger: Ledger,
        *,
        link: Link | None = None,
    ) -> None:
        self._config, self._folder, self._mailbox = config, folder, mailbox
        self._member, self._ledger, self._link = member, ledger, link
        self._claimed: IO[str] | None = None
        self._opening = threading.Lock()
        self.courier: Courier | None = None

    @property
    def connected(self) -> bool:
        """Whether the broker has taken us in."""
        return self._link is not None and self._link.connected

    def open(self) -> Courier:
        """Return the courier, at work; claims the state folder for this process first.

        Raises:
            ConfigError: the link settings or the key file cannot be used.
            StorageError: another process runs this device, or the disk refuses.
        """
        with self._opening:  # two threads of an application may ask at once
            return self.courier or self._open()

    def _open(self) -> Courier:
        member, found = self._member, self._member.membership
        assert found is not None, "a code comes first"
        self._claim()
        member.open()
        self._link = self._link or self._dial(found)
        courier = Courier(
            self._link,
            self._mailbox,
            member.ring,
            tenant=found.tenant,
            me=found.device,
            lookup=member.keys.announced,
            now=member.time,
            rng=random.Random(),
            accept=lambda header, _: member.time.heard(header.created_s),
            keys=member.keys.receive,
            window_bytes=self._config.link.window_kb * 1024,
            ledger=self._ledger,
        )
        courier.start()
        self.courier = courier
        return courier

    def hang_up(self) -> None:
        """End the connection; the next `open` dials anew. The folder stays claimed."""
        if self.courier is not None:
            self.courier.close()
        self.courier, self._link = None, None

    def close(self) -> None:
        """End the connection; the folder stays claimed until `release`."""
        if self.courier is not None:
            self.courier.close()
            self._ledger.close()

    def release(self) -> None:
        """Let another process run this device; call when its stores are closed."""
        if self._claimed is not None:
            self._claimed.close()
            self._claimed = None

    def _claim(self) -> None:
        if self._claimed is not None:
            return
        file = (self._folder / "lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            file.close()
            raise StorageError(
                f"another process already runs the device in {self._folder}; stop it first"
            ) from exc
        file.write(str(os.getpid()))
        file.flush()
        self._claimed = file

    def _dial(self, found: Membership) -> Link:
        from edge_sdk.link.dial import dial

        link, certificate = self._config.link, self._member.certificate
        known = link.mutual_tls and certificate.held
        return dial(
            link.broker if known else link.enrol_broker or link.broker,
            user=found.device if known else link.username or found.device,
            client_id=found.device,
            password_file="" if known else link.password_file,
            ca_file=link.ca_file,
            cert_file=str(certificate.cert_file) if known else "",
            key_file=str(certificate.key_file) if known else "",
            mqtt_version=link.mqtt_version,
            now=self._member.time,
        )
