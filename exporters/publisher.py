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

import logging
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from tuf.api._payload import Root, Snapshot, TargetFile, Targets, Timestamp
from tuf.api.metadata import Metadata

from edge_sdk.errors import ExportError
from edge_sdk.wire.manifest import MANIFEST_FILE, director_path
from exporters.bundle import check_release
from exporters.signing import (
    DIRECTOR,
    ONE_KEY,
    ROLES,
    KeyPlan,
    Lifetimes,
    SignedFolder,
    delegate,
)

__all__ = ["ROLES", "KeyPlan", "Lifetimes", "Publisher"]

logger = logging.getLogger(__name__)

_HASHED = re.compile(r"^[0-9a-f]{64}\.")


class Publisher(SignedFolder):
    """A TUF repository in `folder`; see `SignedFolder` for keys, locks and time."""

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
        delegate(targets, made[DIRECTOR], plans.get(DIRECTOR, ONE_KEY).threshold)
        with self._locked():
            self._sign("root", root, made["root"])
            self._sign("targets", targets, made["targets"])
            self._sign(DIRECTOR, Targets(), made[DIRECTOR])
            self._sign("snapshot", Snapshot(), made["snapshot"])
            self._sign("timestamp", Timestamp(), made["timestamp"])
        return self.root()

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
            self._give_director(metadata.signed)
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
            if self._give_director(metadata.signed):
                self._next("targets", metadata.signed)
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

    def _direct(self, change: Callable[[dict[str, TargetFile]], object]) -> bool:
        """Apply `change` to the director's entries; sign them if they differ."""
        directed: Targets = self._load(DIRECTOR).signed
        before = dict(directed.targets)
        change(directed.targets)
        if directed.targets == before:
            return False
        self._next(DIRECTOR, directed)
        return True

    def _give_director(self, targets: Targets) -> bool:
        """Add the director to a repository made before there was one; the caller signs targets."""
        if targets.delegations is not None:
            return False
        made = self._make_keys(DIRECTOR, ONE_KEY)
        delegate(targets, made, 1)
        self._sign(DIRECTOR, Targets(), made)
        return True

    def _close(self) -> None:
        """Snapshot and timestamp over what was signed before: from now on clients see it."""
        self._next("snapshot", self._load("snapshot").signed)
        self._next("timestamp", self._load("timestamp").signed)


def _entry(
    metadata: Metadata[Targets], family: str, device: str, release: str
) -> dict[str, TargetFile]:
    """The director's entry that lets `device` ("" for everyone) run `release`."""
    manifest = metadata.signed.targets.get(f"{family}/{release}/{MANIFEST_FILE}")
    if manifest is None:
        raise ExportError(f"{family}/{release} is not published, so it cannot be assigned")
    path = director_path(family, release, device)
    return {path: TargetFile(manifest.length, dict(manifest.hashes), path)}
