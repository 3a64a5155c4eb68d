"""Signs releases as a TUF repository: who vouches for which bytes, for whom, until when.

Knows TUF's roles, their keys and files. Does not know ONNX, devices or how bytes travel.

    folder/keys/<role>.pem          Ed25519 private keys, mode 0600
    folder/metadata/<v>.root.json, <v>.targets.json, <v>.director.json, <v>.snapshot.json,
                    timestamp.json
    folder/targets/<family>/<release>/<file>

Five roles. `root` names the keys of the others, `targets` the files of every release; both may be
kept offline and need several keys (`KeyPlan`). `snapshot`, `timestamp` and `director` are online:
the service signs them. The director is a role that `targets` delegates to for paths
`director/<family>/<who>/<release>` alone: each entry repeats the hash of that release's manifest,
and a device runs a release only if it is assigned to it or to everyone. So whoever holds the online
keys can choose among releases that were signed offline, and can sign none.

Offline root and targets: `init({"root": KeyPlan(3, 2, folders), "targets": KeyPlan(1, 1, (usb,))})`
writes their keys into those folders; take them away, and give them again as `keys=` to publish,
withdraw or rotate. Without them the service goes on renewing what is online.

Target files and versioned metadata are written first and timestamp.json last, by renaming: a
client sees the old state or the new one, and what a kill left half done `refresh` completes.
A device needs `metadata()`, and for a target path the bytes of `read(path)`; it believes nothing
that `tuf.ngclient` has not checked against the root it was enrolled with.

Source: The Update Framework specification 1.0, sections 4 (roles), 6.1 (key management) and 6.2
(consistent snapshots); the director is Uptane's idea, as one delegated role.
"""

import fcntl
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner
from tuf.api._payload import (
    DelegatedRole,
    Delegations,
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
from edge_sdk.wire.manifest import MANIFEST_FILE, director_path
from exporters.bundle import check_release

logger = logging.getLogger(__name__)

DIRECTOR = "director"
ROLES = ("root", "targets", DIRECTOR, "snapshot", "timestamp")
"""In the order in which they are signed: each names versions of those before it."""
OFFLINE = ("root", "targets")
"""Roles whose keys may be elsewhere; without them their signatures are not renewed."""

_HASHED = re.compile(r"^[0-9a-f]{64}\.")


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


class Publisher:
    """A TUF repository in `folder`; `now()` gives the time as an aware datetime in UTC.

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

    @property
    def exists(self) -> bool:
        """Whether `init` has been done in this folder."""
        return (self._metadata / "timestamp.json").is_file()

    def init(self, plans: Mapping[str, KeyPlan] | None = None) -> bytes:
        """Create the keys and the first metadata; return the root to enrol devices with.

        `plans`: by role, the keys it gets; the roles left out get one key in `keys/`.

        Raises:
            ExportError: the folder already holds a repository; its keys are never overwritten.
        """
        plans = plans or {}
        if self.exists or self._keys.exists():
            raise ExportError(f"{self.folder} already holds a release repository; use it as it is")
        for path in (self._metadata, self._targets):
            path.mkdir(parents=True, exist_ok=True)
        self._keys.mkdir(mode=0o700)
        root, targets = Root(consistent_snapshot=True), Targets()
        made = {role: self._make_keys(role, plans.get(role, ONE_KEY)) for role in ROLES}
        for role in ROLES:
            if role != DIRECTOR:
                for signer in made[role]:
                    root.add_key(signer.public_key, role)
                root.roles[role].threshold = plans.get(role, ONE_KEY).threshold
        _delegate(targets, made[DIRECTOR], plans.get(DIRECTOR, ONE_KEY).threshold)
        with self._locked():
            self._sign("root", root, made["root"])
            self._sign("targets", targets, made["targets"])
            self._sign(DIRECTOR, Targets(), made[DIRECTOR])
            self._sign("snapshot", Snapshot(), made["snapshot"])
            self._sign("timestamp", Timestamp(), made["timestamp"])
        return self.root()

    def root(self) -> bytes:
        """The newest root metadata; a device is enrolled with it and follows from there.

        Raises:
            ExportError: `init` has not been done.
        """
        return self._newest("root").read_bytes()

    # --- releases -----------------------------------------------------------------------------

    def publish(
        self, family: str, release: str, bundle_dir: Path, *, everyone: bool = True
    ) -> tuple[str, ...]:
        """Add the release folder's files as targets `<family>/<release>/<file>`, signed.

        `everyone`: assign it to all devices at once; otherwise `assign` says later who may run it.
        Returns the target paths, the manifest's first.

        Raises:
            ExportError: the folder is not that release or was changed since its export, the
                release is already published (a published release never changes), or the targets
                key is not here.
        """
        manifest = check_release(bundle_dir, family=family, release=release)
        with self._locked():
            metadata: Metadata[Targets] = self._load("targets")
            prefix = f"{family}/{release}/"
            if any(path.startswith(prefix) for path in metadata.signed.targets):
                raise ExportError(f"{family}/{release} is already published; give it a new name")
            self._signers("targets")  # before any file is copied
            paths = [prefix + name for name in (MANIFEST_FILE, *sorted(manifest.files))]
            custom = {"family": family, "release": release, "kind": manifest.kind}
            for path in paths:
                stored = self._targets / path
                stored.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(bundle_dir / path.removeprefix(prefix), stored)
                target = TargetFile.from_file(path, str(stored), ["sha256"])
                target.unrecognized_fields["custom"] = custom
                metadata.signed.targets[path] = target
            if metadata.signed.delegations is None:  # a repository older than the director
                _delegate(metadata.signed, self._make_keys(DIRECTOR, ONE_KEY), 1)
                self._next("targets", metadata.signed)
                self._sign(DIRECTOR, Targets())
            else:
                self._next("targets", metadata.signed)
            if everyone:
                self._direct(lambda entries: entries.update(_entry(metadata, family, "", release)))
            self._close()
        logger.info("published %s/%s: %d files", family, release, len(paths))
        return tuple(paths)

    def assign(
        self,
        family: str,
        everyone: Iterable[str],
        devices: Mapping[str, Iterable[str]] | None = None,
    ) -> bool:
        """Sign anew who may run which release of `family`; return whether anything changed.

        `everyone` names releases for all devices, `devices` further ones by device id. Going back
        to an earlier release is done by this statement, in newer metadata than any device has.

        Raises:
            ExportError: a release is not published; nothing but published files can be assigned.
        """
        wanted = {("", release) for release in everyone}
        for device, releases in (devices or {}).items():
            wanted |= {(device, release) for release in releases}
        with self._locked():
            metadata: Metadata[Targets] = self._load("targets")
            entries: dict[str, TargetFile] = {}
            for device, release in sorted(wanted):
                entries |= _entry(metadata, family, device, release)

            def replace(known: dict[str, TargetFile]) -> None:
                for path in [path for path in known if path.startswith(f"{DIRECTOR}/{family}/")]:
                    del known[path]
                known.update(entries)

            changed = self._direct(replace)
            if changed:
                self._close()
        return changed

    def withdraw(self, family: str, release: str) -> None:
        """Take a release out of the signed targets for good; no device installs or loads it again.

        Raises:
            ExportError: it is not published, or the targets key is not here.
        """
        with self._locked():
            targets: Targets = self._load("targets").signed
            prefix = f"{family}/{release}/"
            paths = [path for path in targets.targets if path.startswith(prefix)]
            if not paths:
                raise ExportError(f"{family}/{release} is not a published release")
            for path in paths:
                del targets.targets[path]
            self._next("targets", targets)

            def forget(known: dict[str, TargetFile]) -> None:
                for path in [path for path in known if path.endswith(f"/{release}")]:
                    if path.startswith(f"{DIRECTOR}/{family}/"):
                        del known[path]

            self._direct(forget)
            self._close()
        shutil.rmtree(self._targets / family / release, ignore_errors=True)
        logger.info("withdrew %s/%s", family, release)

    def read(self, path: str) -> bytes:
        """The bytes of a target by its path, with or without the hash before the file's name.

        Raises:
            ExportError: no such target.
        """
        return self.file(path).read_bytes()

    def file(self, path: str) -> Path:
        """Where the bytes of a target lie, for those who send them piece by piece.

        Raises:
            ExportError: no such target.
        """
        folder, _, name = path.rpartition("/")
        plain = f"{folder}/{_HASHED.sub('', name)}"
        targets: Targets = self._load("targets").signed
        if plain not in targets.targets:
            raise ExportError(f"{path} is not a published target")
        return self._targets / plain

    def releases(self) -> dict[str, tuple[str, ...]]:
        """Target paths of each published release, by "<family>/<release>"."""
        found: dict[str, list[str]] = {}
        for path in self._load("targets").signed.targets:
            found.setdefault("/".join(path.split("/")[:2]), []).append(path)
        return {name: tuple(paths) for name, paths in found.items()}

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
                _delegate(targets, made, plan.threshold)
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

    def _direct(self, change: Callable[[dict[str, TargetFile]], object]) -> bool:
        """Apply `change` to the director's entries; sign them if they differ."""
        if not self._has(DIRECTOR):
            raise ExportError(
                f"{self.folder} was made without a director; publish a release to give it one"
            )
        directed: Targets = self._load(DIRECTOR).signed
        before = dict(directed.targets)
        change(directed.targets)
        if directed.targets == before:
            return False
        self._next(DIRECTOR, directed)
        return True

    def _close(self) -> None:
        """Snapshot and timestamp over what was signed before: from now on clients see it."""
        self._next("snapshot", self._load("snapshot").signed)
        self._next("timestamp", self._load("timestamp").signed)

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


def _entry(
    metadata: Metadata[Targets], family: str, device: str, release: str
) -> dict[str, TargetFile]:
    """The director's entry that lets `device` ("" for everyone) run `release`."""
    manifest = metadata.signed.targets.get(f"{family}/{release}/{MANIFEST_FILE}")
    if manifest is None:
        raise ExportError(f"{family}/{release} is not published, so it cannot be assigned")
    path = director_path(family, release, device)
    return {path: TargetFile(manifest.length, dict(manifest.hashes), path)}


def _delegate(targets: Targets, signers: Sequence[CryptoSigner], threshold: int) -> None:
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
