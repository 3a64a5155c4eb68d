"""The coordinator's keys and tables, opened together, for the service and for the commands.

Knows the state folder's layout. Does not know links or programs, and loads no torch.

    keys/root.key, keys/coordinator.key     private keys, mode 0600
    coordinator.db                          mailbox and tables
    releases/                               the signed repository, see exporters/publisher.py
    bundles/<family>/<release>/             releases as they were exported
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from coordinator.config import CoordinatorConfig
from coordinator.fleet import Fleet
from coordinator.registry import Registry
from coordinator.store import Store
from edge_sdk.errors import StorageError
from edge_sdk.store.keys import load_or_create
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire.enrolment import EnrolmentCode, root_key_hash
from exporters.publisher import Publisher


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
        self.identity = load_or_create(self.folder / "keys" / "coordinator.key")
        self.mailbox = Mailbox(
            self.folder / "coordinator.db", max_bytes=config.service.store_mb * 1024**2
        )
        self.store = Store(self.mailbox, now)
        self.fleet = Fleet(self.store, tenant=config.service.tenant, now=now)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database."""
        self.mailbox.close()

    def token(self, device: str, *, lasts_s: float) -> EnrolmentCode:
        """Make a one-time enrolment code for `device`."""
        hashed = root_key_hash(self.root.public)
        return self.fleet.token(device, root_key_hash=hashed, lasts_s=lasts_s)

    def registry(self) -> Registry:
        """Return the releases; `prepare` makes their repository."""
        return Registry(self.store, Publisher(self.folder / "releases"), self.now)


def _private_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.parent.chmod(0o700)
    except OSError as exc:
        raise StorageError(f"cannot make {folder}: {exc.strerror}; check disk and rights") from exc
