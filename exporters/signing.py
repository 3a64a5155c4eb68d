"""Signs TUF metadata in a folder: keys, thresholds, lifetimes, rotation.

Knows the five roles, their keys and the order in which they are signed. Does not know releases;
`publisher.py` says what stands in the targets and the director's entries.
"""

import fcntl
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner
from tuf.api._payload import DelegatedRole, Delegations, MetaFile, Root, Targets
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata
from tuf.api.serialization.json import JSONSerializer

from edge_sdk.errors import ExportError

logger = logging.getLogger(__name__)

DIRECTOR = "director"
ROLES = ("root", "targets", DIRECTOR, "snapshot", "timestamp")
"""In the order in which they are signed: each names versions of those before it."""
OFFLINE = ("root", "targets")
"""Roles whose keys may be elsewhere; without them their signatures are not renewed."""


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long a signature is good for, in days; a device refuses older metadata (freeze).

    The online roles are short, since they are renewed with every offer; root and targets are long,
    since a device may be away for months and their keys can be kept offline.
    """

    root: int = 365
    targets: int = 180
    director: int = 30
    snapshot: int = 30
    timestamp: int = 7

    def of(self, role: str) -> timedelta:
        """The lifetime of one role's signature."""
        days: int = getattr(self, role)
        return timedelta(days=days)


@dataclass(frozen=True, slots=True)
class KeyPlan:
    """How many keys a role has, how many must sign, and where they go (default: `keys/`).

    Key i is written to `folders[i % len(folders)]`, so three folders take one key each.
    """

    keys: int = 1
    threshold: int = 1
    folders: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.threshold <= self.keys <= 64:
            raise ExportError(
                f"{self.threshold} of {self.keys} keys must sign; allowed: 1 to all of 1 to 64"
            )


ONE_KEY = KeyPlan()


class SignedFolder:
    """Keys and metadata of a TUF repository in `folder`; `now()` is an aware datetime in UTC.

    Several threads and processes may use one folder; a lock file orders their writes.
    """

    def __init__(
        self,
        folder: Path,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        *,
        lifetimes: Lifetimes | None = None,
        keys: Sequence[Path] = (),
    ) -> None:
        """`keys`: further folders with private keys, of offline roles for example."""
        self.folder = Path(folder)
        self._keys = self.folder / "keys"
        self._key_folders = (self._keys, *keys)
        self._metadata = self.folder / "metadata"
        self._targets = self.folder / "targets"
        self._now = now
        self._lifetimes = lifetimes or Lifetimes()

    def root(self) -> bytes:
        """The newest root metadata; a device is enrolled with it and follows from there.

        Raises:
            ExportError: `init` has not been done.
        """
        return self._newest("root").read_bytes()

    # --- metadata -----------------------------------------------------------------------------

    def metadata(self) -> dict[str, bytes]:
        """All that a client has to fetch, by TUF file name, renewed where it is half expired.

        Raises:
            ExportError: `init` has not been done.
        """
        with self._locked():
            self._refresh()
            names = [path.name for path in self._metadata.glob("*.root.json")]
            names += [self._newest(role).name for role in ROLES if self._has(role)]
            return {name: (self._metadata / name).read_bytes() for name in sorted(set(names))}

    def refresh(self) -> bool:
        """Sign again every role past half of its lifetime; return whether anything was signed.

        What a killed publisher left half done is completed. A role whose keys are offline is left
        as it is, with a warning; `expires` tells until when it is good.

        Raises:
            ExportError: `init` has not been done.
        """
        with self._locked():
            return self._refresh()

    def expires(self) -> dict[str, datetime]:
        """Until when each role's newest signature is good."""
        return {role: self._load(role).signed.expires for role in ROLES if self._has(role)}

    def rotate(self, role: str, plan: KeyPlan = ONE_KEY) -> bytes:
        """Give `role` new keys, so that the old ones vouch for nothing; return the new root.

        The new root is signed by a threshold of the old root's keys and, if `role` is root, of the
        new ones too: devices follow from any earlier root. Metadata signed by a stolen online key
        is of no more use, and versions it ran up are forgotten by the devices.

        Raises:
            ExportError: an unknown role, or too few root keys are here.
        """
        if role not in ROLES:
            raise ExportError(f"{role!r} is no role; the roles are {', '.join(ROLES)}")
        with self._locked():
            old = self._signers("root" if role != DIRECTOR else "targets")
            root: Root = self._load("root").signed
            retired = [path for path, _ in self._key_files(role)]
            made = self._make_keys(role, plan, mark=f"-v{root.version + 1}")
            self._key_folders += plan.folders
            if role == DIRECTOR:
                targets: Targets = self._load("targets").signed
                delegate(targets, made, plan.threshold)
                self._next("targets", targets)
            else:
                for keyid in list(root.roles[role].keyids):
                    root.revoke_key(keyid, role)
                for signer in made:
                    root.add_key(signer.public_key, role)
                root.roles[role].threshold = plan.threshold
                root.version += 1
                self._sign("root", root, [*old, *(made if role == "root" else [])])
            self._refresh()
            for path in retired:
                if path.parent == self._keys:
                    path.unlink()
        logger.warning("the keys of %s were replaced", role)
        return self.root()

    def _refresh(self) -> bool:
        changed = False
        for role in ROLES:
            if not self._has(role):
                continue
            metadata = self._load(role)
            left = metadata.signed.expires - self._now()
            sound = self._is_sound(role, metadata)
            if sound and left >= self._lifetimes.of(role) / 2:
                continue
            try:
                self._next(role, metadata.signed)
                changed = True
            except _KeysAbsent as exc:
                logger.warning("%s is good for %s more and cannot be renewed: %s", role, left, exc)
        return changed

    def _is_sound(self, role: str, metadata: Metadata[Any]) -> bool:
        """Signed by the keys that count now, and naming the newest versions of the others."""
        try:
            self._delegator(role).verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        except RepositoryError:
            return False
        if role == "snapshot":
            return bool(metadata.signed.meta == self._named())
        if role == "timestamp":
            newest: int = self._load("snapshot").signed.version
            return bool(metadata.signed.snapshot_meta.version == newest)
        return True

    def _named(self) -> dict[str, MetaFile]:
        roles = [role for role in ("targets", DIRECTOR) if self._has(role)]
        return {f"{role}.json": MetaFile(self._load(role).signed.version) for role in roles}

    def _next(self, role: str, signed: Any) -> None:
        signers = self._signers(role)
        signed.version += 1
        self._sign(role, signed, signers)

    def _sign(self, role: str, signed: Any, signers: Sequence[CryptoSigner] = ()) -> None:
        # Each role names the version of the one before it: that is what stops mix-and-match.
        if role == "snapshot":
            signed.meta = self._named()
        if role == "timestamp":
            signed.snapshot_meta = MetaFile(self._load("snapshot").signed.version)
        signed.expires = self._now().replace(microsecond=0) + self._lifetimes.of(role)
        metadata: Metadata[Any] = Metadata(signed)
        for signer in signers or self._signers(role):
            metadata.sign(signer, append=True)
        name = "timestamp.json" if role == "timestamp" else f"{signed.version}.{role}.json"
        _write(self._metadata / name, metadata.to_bytes(JSONSerializer(compact=True)), mode=0o644)

    # --- keys ---------------------------------------------------------------------------------

    def _make_keys(self, role: str, plan: KeyPlan, *, mark: str = "") -> list[CryptoSigner]:
        made = []
        for i in range(plan.keys):
            folder = plan.folders[i % len(plan.folders)] if plan.folders else self._keys
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            name = role + mark + (f"-{i + 1}" if plan.keys > 1 else "") + ".pem"
            signer = CryptoSigner.generate_ed25519()
            _write(folder / name, signer.private_bytes, mode=0o600)
            made.append(signer)
        return made

    def _signers(self, role: str) -> list[CryptoSigner]:
        """The private keys of `role` that are here, at least as many as must sign."""
        found = [signer for _, signer in self._key_files(role)]
        needed = self._delegator(role).get_delegated_role(role).threshold
        if len(found) < needed:
            raise _KeysAbsent(
                f"{needed} {role} keys must sign and {len(found)} are in "
                f"{', '.join(map(str, self._key_folders))}; name the folder that holds them"
            )
        return found

    def _key_files(self, role: str) -> list[tuple[Path, CryptoSigner]]:
        wanted = set(self._delegator(role).get_delegated_role(role).keyids)
        found: dict[str, tuple[Path, CryptoSigner]] = {}
        for folder in self._key_folders:
            for path in sorted(Path(folder).glob(f"{role}*.pem")):
                signer = _read_key(path)
                keyid = signer.public_key.keyid
                if keyid in wanted:
                    found.setdefault(keyid, (path, signer))
        return list(found.values())

    def _delegator(self, role: str) -> Any:
        return self._load("targets" if role == DIRECTOR else "root").signed

    # --- files --------------------------------------------------------------------------------

    def _load(self, role: str) -> Metadata[Any]:
        path = self._newest(role)
        try:
            return Metadata.from_bytes(path.read_bytes())
        except (OSError, RepositoryError) as exc:
            raise ExportError(f"{path} is not TUF metadata: {exc}") from exc

    def _has(self, role: str) -> bool:
        return role != DIRECTOR or any(self._metadata.glob(f"*.{DIRECTOR}.json"))

    def _newest(self, role: str) -> Path:
        if role == "timestamp":
            paths = list(self._metadata.glob("timestamp.json"))
        else:
            paths = list(self._metadata.glob(f"*.{role}.json"))
        if not paths:
            raise ExportError(f"{self.folder} holds no release repository; create it with init()")
        return max(paths, key=lambda path: int(re.sub(r"\D.*", "", path.name) or 0))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time, among threads and processes."""
        try:
            file = (self.folder / ".lock").open("w")
        except OSError as exc:
            raise ExportError(
                f"{self.folder} holds no release repository; create it with init() ({exc.strerror})"
            ) from exc
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class _KeysAbsent(ExportError):  # noqa: N818 - a state, not a fault
    """Too few private keys of a role are here to sign for it."""


def delegate(targets: Targets, signers: Sequence[CryptoSigner], threshold: int) -> None:
    """Let the director's keys, and only for its own paths, speak beside the targets role."""
    keys = {signer.public_key.keyid: signer.public_key for signer in signers}
    role = DelegatedRole(
        DIRECTOR, list(keys), threshold, terminating=True, paths=[f"{DIRECTOR}/*/*/*"]
    )
    targets.delegations = Delegations(keys, {DIRECTOR: role})


def _read_key(path: Path) -> CryptoSigner:
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError) as exc:
        raise ExportError(f"the key {path} cannot be read: {exc}") from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise ExportError(f"the key {path} is not an Ed25519 key")
    return CryptoSigner(key)


def _write(path: Path, data: bytes, *, mode: int) -> None:
    # A rename is atomic, and the file is private from its first byte on.
    scratch = path.with_name(f".{path.name}.new")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
