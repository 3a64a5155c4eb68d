"""Signs releases as a TUF repository: who vouches for which bytes, in which order, until when.

Knows TUF's four roles, their keys and files. Does not know ONNX, devices or how bytes travel.

    folder/keys/<role>.pem          Ed25519 private keys, mode 0600
    folder/metadata/<v>.root.json, <v>.targets.json, <v>.snapshot.json, timestamp.json
    folder/targets/<family>/<release>/<file>

Target files and versioned metadata are written first and timestamp.json last, by renaming: a
client sees the old state or the new one, and a publisher that was killed publishes again.
A device needs `metadata()`, and for a target path the bytes of `read(path)`; it believes nothing
that `tuf.ngclient` has not checked against the root it was enrolled with.

Source: The Update Framework specification 1.0, sections 4 (roles) and 6.2 (consistent snapshots).
"""

import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner
from tuf.api._payload import (
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata
from tuf.api.serialization.json import JSONSerializer

from edge_sdk.errors import ExportError
from edge_sdk.wire.manifest import MANIFEST_FILE
from exporters.bundle import check_release

logger = logging.getLogger(__name__)

ROLES = ("root", "targets", "snapshot", "timestamp")

_HASHED = re.compile(r"^[0-9a-f]{64}\.")


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long a signature is good for, in days; a device refuses older metadata (freeze).

    The online roles are short, since they are renewed with every offer; root and targets are long,
    since a device may be away for months and their keys can be kept offline.
    """

    root: int = 365
    targets: int = 180
    snapshot: int = 30
    timestamp: int = 7

    def of(self, role: str) -> timedelta:
        """The lifetime of one role's signature."""
        days: int = getattr(self, role)
        return timedelta(days=days)


class Publisher:
    """A TUF repository in `folder`; `now()` gives the time as an aware datetime in UTC.

    Only one process may write a folder at a time.
    """

    def __init__(
        self,
        folder: Path,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        *,
        lifetimes: Lifetimes | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._keys = self.folder / "keys"
        self._metadata = self.folder / "metadata"
        self._targets = self.folder / "targets"
        self._now = now
        self._lifetimes = lifetimes or Lifetimes()

    @property
    def exists(self) -> bool:
        """Whether `init` has been done in this folder."""
        return (self._metadata / "timestamp.json").is_file()

    def init(self) -> bytes:
        """Create the four keys and the first metadata; return the root to enrol devices with.

        Raises:
            ExportError: the folder already holds a repository; its keys are never overwritten.
        """
        if self.exists or self._keys.exists():
            raise ExportError(f"{self.folder} already holds a release repository; use it as it is")
        for path in (self._metadata, self._targets):
            path.mkdir(parents=True, exist_ok=True)
        self._keys.mkdir(mode=0o700)
        root = Root(consistent_snapshot=True)
        for role in ROLES:
            signer = CryptoSigner.generate_ed25519()
            _write(self._keys / f"{role}.pem", signer.private_bytes, mode=0o600)
            root.add_key(signer.public_key, role)
        self._sign("root", root)
        self._sign("targets", Targets())
        self._sign("snapshot", Snapshot())
        self._sign("timestamp", Timestamp())
        return self.root()

    def root(self) -> bytes:
        """The newest root metadata; a device is enrolled with it and follows from there.

        Raises:
            ExportError: `init` has not been done.
        """
        return self._newest("root").read_bytes()

    def publish(self, family: str, release: str, bundle_dir: Path) -> tuple[str, ...]:
        """Add the release folder's files as targets `<family>/<release>/<file>`, signed.

        Returns the target paths, the manifest's first.

        Raises:
            ExportError: the folder is not that release or was changed since its export, or the
                release is already published; a published release never changes.
        """
        manifest = check_release(bundle_dir, family=family, release=release)
        metadata: Metadata[Targets] = self._load("targets")
        prefix = f"{family}/{release}/"
        if any(path.startswith(prefix) for path in metadata.signed.targets):
            raise ExportError(f"{family}/{release} is already published; give it a new name")
        paths = [prefix + name for name in (MANIFEST_FILE, *sorted(manifest.files))]
        custom = {"family": family, "release": release, "kind": manifest.kind}
        for path in paths:
            stored = self._targets / path
            stored.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle_dir / path.removeprefix(prefix), stored)
            target = TargetFile.from_file(path, str(stored), ["sha256"])
            target.unrecognized_fields["custom"] = custom
            metadata.signed.targets[path] = target
        self._next("targets", metadata.signed)
        self._next("snapshot", self._load("snapshot").signed)
        self._next("timestamp", self._load("timestamp").signed)
        logger.info("published %s/%s: %d files", family, release, len(paths))
        return tuple(paths)

    def metadata(self) -> dict[str, bytes]:
        """All that a client has to fetch, by TUF file name, renewed where it is half expired.

        Raises:
            ExportError: `init` has not been done.
        """
        self.refresh()
        names = [path.name for path in self._metadata.glob("*.root.json")]
        names += [self._newest(role).name for role in ROLES if role != "root"]
        return {name: (self._metadata / name).read_bytes() for name in sorted(names)}

    def refresh(self) -> bool:
        """Sign again every role past half of its lifetime; return whether anything was signed.

        Raises:
            ExportError: `init` has not been done.
        """
        changed = False
        for role in ROLES:
            signed = self._load(role).signed
            left = signed.expires - self._now()
            if changed and role in ("snapshot", "timestamp"):
                self._next(role, signed)
            elif left < self._lifetimes.of(role) / 2:
                self._next(role, signed)
                changed = True
        return changed

    def read(self, path: str) -> bytes:
        """The bytes of a target by its path, with or without the hash before the file's name.

        Raises:
            ExportError: no such target.
        """
        folder, _, name = path.rpartition("/")
        plain = f"{folder}/{_HASHED.sub('', name)}"
        targets: Targets = self._load("targets").signed
        if plain not in targets.targets:
            raise ExportError(f"{path} is not a published target")
        return (self._targets / plain).read_bytes()

    def releases(self) -> dict[str, tuple[str, ...]]:
        """Target paths of each published release, by "<family>/<release>"."""
        found: dict[str, list[str]] = {}
        for path in self._load("targets").signed.targets:
            found.setdefault("/".join(path.split("/")[:2]), []).append(path)
        return {name: tuple(paths) for name, paths in found.items()}

    def _next(self, role: str, signed: Any) -> None:
        signed.version += 1
        self._sign(role, signed)

    def _sign(self, role: str, signed: Any) -> None:
        # Each role names the version of the one before it: that is what stops mix-and-match.
        if role == "snapshot":
            signed.meta = {"targets.json": MetaFile(self._load("targets").signed.version)}
        if role == "timestamp":
            signed.snapshot_meta = MetaFile(self._load("snapshot").signed.version)
        signed.expires = self._now().replace(microsecond=0) + self._lifetimes.of(role)
        metadata: Metadata[Any] = Metadata(signed)
        metadata.sign(self._signer(role))
        name = "timestamp.json" if role == "timestamp" else f"{signed.version}.{role}.json"
        _write(self._metadata / name, metadata.to_bytes(JSONSerializer(compact=True)), mode=0o644)

    def _signer(self, role: str) -> CryptoSigner:
        path = self._keys / f"{role}.pem"
        try:
            key = load_pem_private_key(path.read_bytes(), password=None)
        except (OSError, ValueError) as exc:
            raise ExportError(f"the {role} key {path} cannot be read: {exc}") from exc
        if not isinstance(key, Ed25519PrivateKey):
            raise ExportError(f"the {role} key {path} is not an Ed25519 key")
        return CryptoSigner(key)

    def _load(self, role: str) -> Metadata[Any]:
        path = self._newest(role)
        try:
            return Metadata.from_bytes(path.read_bytes())
        except (OSError, RepositoryError) as exc:
            raise ExportError(f"{path} is not TUF metadata: {exc}") from exc

    def _newest(self, role: str) -> Path:
        if role == "timestamp":
            paths = list(self._metadata.glob("timestamp.json"))
        else:
            paths = list(self._metadata.glob(f"*.{role}.json"))
        if not paths:
            raise ExportError(f"{self.folder} holds no release repository; create it with init()")
        return max(paths, key=lambda path: int(re.sub(r"\D.*", "", path.name) or 0))


def _write(path: Path, data: bytes, *, mode: int) -> None:
    # A rename is atomic, and the file is private from its first byte on.
    scratch = path.with_name(f".{path.name}.new")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
