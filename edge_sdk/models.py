"""Which model this device runs: fetched whole, verified, tried, switched at once, the old one kept.

Knows folders and the order of safe steps. Does not know messages, training, or the signatures
themselves (trust.py decides those).

    models/trust/            what the owner has signed so far; never falls back
    models/incoming/         files received for the present offer, not yet believed
    models/bundles/RELEASE/  verified files of a release; made complete under another name first
    models/current.json      the release that runs and the one before it; replaced by rename

A new release is tried in a child process, switched to, and proven by its first answers. Until then
each start of it is counted before it happens: a model that takes the process down with it is given
up after MAX_STARTS, and the one before it runs again. Files are checked against the signed hashes
whenever a model is opened.
"""

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import msgspec
from msgspec import Struct

from edge_sdk.errors import (
    DigestError,
    RemoteProtocolError,
    RuntimeFailure,
    StorageError,
    TrustError,
)
from edge_sdk.graphs import GRAPH_FOLDER, OPERATORS, check_bundle, check_files
from edge_sdk.plain_files import copy_plain, replace_bytes, sync_folder
from edge_sdk.trial import Held, Probe, child_probe
from edge_sdk.trust import TargetFile, TrustedRelease, held_targets, is_target
from edge_sdk.wire.manifest import ADAPTER_FILE, MANIFEST_FILE, ReleaseManifest, decode_manifest
from edge_sdk.wire.messages import Name, OfferModel

__all__ = ["MAX_STARTS", "Held", "ModelStore", "Probe", "child_probe"]

logger = logging.getLogger(__name__)

MAX_STARTS = 5
"""Starts without one answer after which a release is given up: crashes, or unlucky power cuts."""
_CRASHED_KEPT = 16
_NAME = msgspec.json.Decoder(Name)


class _Pointer(Struct, frozen=True, forbid_unknown_fields=True):
    """`starts` counts those of `current` until it is `proven`; `crashed` were given up."""

    current: Held | None = None
    previous: Held | None = None
    proven: bool = True
    starts: int = 0
    crashed: tuple[str, ...] = ()


class ModelStore:
    """The releases of one device under `folder`; one process at a time."""

    def __init__(
        self,
        folder: Path,
        *,
        root: bytes,
        probe: Probe,
        device: str = "",
        operators: frozenset[str] = OPERATORS,
    ) -> None:
        """Open the store; `root` is the TUF root received at enrolment.

        `device` is the name under which releases are assigned to this device, `operators` what
        graphs may use.

        Raises:
            StorageError: the folder cannot be made or its pointer is damaged.
        """
        self._folder, self._root, self._probe = folder, root, probe
        self._device, self._operators = device, operators
        self._trust, self._incoming = folder / "trust", folder / "incoming"
        self._bundles = folder / "bundles"
        with _stored("make"):
            for part in (self._incoming, self._bundles):
                part.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._hashed: dict[tuple[object, ...], bool] = {}
        self._pointer = self._read_pointer()

    @property
    def current(self) -> Held | None:
        """The release that runs, None before the first."""
        return self._pointer.current

    @property
    def previous(self) -> Held | None:
        """The release that ran before, kept for `roll_back`."""
        return self._pointer.previous

    def missing(
        self, offer: OfferModel, *, now: datetime, made: Path | None = None
    ) -> tuple[str, ...]:
        """Return the offer's target paths whose bytes this device does not hold.

        `made`: a folder with files of the release that were made here; those with exactly the
        signed bytes are taken out of it and held.

        Raises:
            TrustError: the offer is not to be trusted (SignatureError, RollbackError, DigestError).
            StorageError: the disk refuses.
        """
        trusted = self._believe(offer, now)
        lacking = []
        for path in _sound_paths(offer):
            target = trusted.target(path)
            if made is not None and is_target(made / _inside(path), target):
                self.put_file(path, made / _inside(path))
            if self._find(target) is None:
                lacking.append(path)
        return tuple(lacking)

    def put(self, path: str, data: bytes) -> None:
        """Keep a received file of the present offer; it is believed only by `install`.

        Raises:
            StorageError: the disk refuses.
        """
        with _stored("keep a received file in"):
            replace_bytes(self._incoming / _flat(path), data)

    def put_piece(self, path: str, data: bytes, *, offset: int, size: int) -> bool:
        """Keep a part of a received file of `size` bytes; return whether all of it is here now.

        Parts come in any order, and the same one twice after a crash.

        Raises:
            TrustError: a part beyond the end of the file.
            StorageError: the disk refuses.
        """
        if offset + len(data) > size:
            raise TrustError(f"a part of {path} lies beyond its {size} bytes")
        kept = self._incoming / _flat(path)
        noted = kept.with_suffix(".parts")
        with _stored("keep a part of a received file in"):
            parts: dict[str, int] = (
                msgspec.json.decode(noted.read_bytes(), type=dict[str, int])
                if noted.exists()
                else {}
            )
            handle = os.open(kept, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            with os.fdopen(handle, "wb") as file:
                if not parts:
                    file.truncate(0)
                file.seek(offset)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            parts[str(offset)] = len(data)
            replace_bytes(noted, msgspec.json.encode(parts))
        return sum(parts.values()) == size

    def put_file(self, path: str, source: Path) -> None:
        """As `put`, for bytes that are in the file `source`, which is moved, not read.

        A `source` that is gone because it was moved before a crash is no error, so a message may
        be handled twice.

        Raises:
            TrustError: `source` is a link, has a second name (hard link), or is no plain file.
            StorageError: the disk refuses, or there is no such file.
        """
        kept = self._incoming / _flat(path)
        with _stored("keep a received file in"):
            try:
                seen = os.lstat(source)
            except FileNotFoundError:
                if kept.is_file():
                    return
                raise
            if not stat.S_ISREG(seen.st_mode) or seen.st_nlink != 1:
                raise TrustError(f"the received file for {path} is not one plain file")
            try:
                os.replace(source, kept)
            except OSError as exc:
                if exc.errno != errno.EXDEV:
                    raise
                copy_plain(source, kept)
                source.unlink()
            sync_folder(self._incoming)

    @contextmanager
    def draft(self) -> Iterator[Path]:
        """A fresh private folder to write in, gone afterwards, or with the next release installed.

        No name in it can be a link that somebody placed before.

        Raises:
            StorageError: the disk refuses.
        """
        with _stored("write to"):
            folder = Path(tempfile.mkdtemp(prefix=".new-", dir=self._bundles))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def install(self, offer: OfferModel, *, now: datetime) -> Held:
        """Verify every file, complete the release under its name, try it, and run it from now on.

        Installing the release that runs already changes nothing. On any error the release that ran
        before still runs.

        Raises:
            TrustError: not to be trusted, or a file is lacking.
            RuntimeFailure: it did not load or answer in its trial.
            StorageError: the disk refuses.
        """
        trusted = self._believe(offer, now)
        targets = [trusted.target(path) for path in _sound_paths(offer)]
        if offer.release in self._pointer.crashed:
            raise RuntimeFailure(
                f"release {offer.release} ended this process {MAX_STARTS} times before it answered "
                "once; it is not tried again under this name"
            )
        final = self._bundles / offer.release
        if not self._complete(final, targets):
            self._assemble(trusted, targets, final)
        held = self._held(offer, final)
        if held == self.current:
            return held
        self._check(held)
        self._probe(held)
        before = self.current or self.previous
        self._change(current=held, previous=before, proven=False, starts=0)
        logger.info("model %s now runs", held.release)
        self._tidy()
        return held

    @property
    def proven(self) -> bool:
        """Whether the release that runs has answered in this process or an earlier one."""
        return self._pointer.proven

    def ready(self) -> Held | None:
        """Return the release to open now, its files checked and this start of it counted.

        Altered files are repaired from equal ones on this disk. A release that cannot be repaired,
        was withdrawn, or was started MAX_STARTS times without an answer gives way to the one
        before it; what is lacking is fetched again when it is next offered. None: none is held.

        Raises:
            TrustError: no release that is held may be run; names the file and says why.
            StorageError: the disk refuses.
        """
        self._pointer = pointer = self._read_pointer()  # another process may have moved on
        held = pointer.current
        if held is None:
            return None
        if not pointer.proven and pointer.starts >= MAX_STARTS:
            crashed = (*pointer.crashed, held.release)[-_CRASHED_KEPT:]
            self._change(current=self.previous, previous=None, proven=True, crashed=crashed)
            logger.error("release %s never answered in %d starts", held.release, MAX_STARTS)
            return self.ready()
        try:
            self._check(held)
        except TrustError:
            if self.previous is None:
                raise
            logger.exception("release %s may not run; returning to the one before", held.release)
            self.roll_back()
            return self.ready()
        if not pointer.proven:
            self._change(starts=pointer.starts + 1)
        return held

    def prove(self) -> None:
        """Note that the release that runs has answered.

        Raises:
            StorageError: the disk refuses.
        """
        before, self._pointer = self._pointer, self._read_pointer()
        if self.current == before.current and not self.proven:
            self._change(proven=True, starts=0)

    def roll_back(self) -> Held:
        """Run the previous release again, because the present one fails.

        Raises:
            RuntimeFailure: there is no previous release.
            StorageError: the disk refuses.
        """
        if self.previous is None:
            raise RuntimeFailure("there is no earlier model to return to")
        failed = self.current
        self._change(current=self.previous, previous=None, proven=True, starts=0)
        logger.warning("rolled back from %s", failed.release if failed else "nothing")
        return self._pointer.current or self.roll_back()

    def _believe(self, offer: OfferModel, now: datetime) -> TrustedRelease:
        trusted = TrustedRelease(self._trust, root=self._root, metadata=offer.metadata, now=now)
        for path in _sound_paths(offer):
            trusted.target(path)
        trusted.check_assigned(offer.family, offer.release, self._device)
        return trusted

    def _check(self, held: Held) -> None:
        """Check a release on disk against the hashes last signed, and its graphs by the rules."""
        signed = held_targets(self._trust, self._root)
        folders = {Path(held.bundle)}
        if held.adapter_path is not None:
            folders.add(held.adapter_path.parent)
        for folder in sorted(folders):
            prefix = f"{held.family}/{folder.name}/"
            targets = [target for path, target in signed.items() if path.startswith(prefix)]
            if not targets:
                raise TrustError(f"release {folder.name} was withdrawn by its owner")
            if not self._complete(folder, targets):
                self._mend(folder, targets)
            check_bundle(folder, operators=self._operators)

    def _mend(self, folder: Path, targets: list[TargetFile]) -> None:
        """Make a release folder whole again from equal files on this disk."""
        sources = {target.path: self._find(target) for target in targets}
        lacking = sorted(path for path, source in sources.items() if source is None)
        if lacking:
            raise DigestError(
                f"{lacking[0]} was altered or lost on this disk since it was installed; "
                "it is fetched again when the release is next offered"
            )
        with _stored("repair"), self.draft() as draft:
            for target in targets:
                copied = draft / _inside(target.path)
                copied.parent.mkdir(mode=0o700, exist_ok=True)
                copy_plain(sources[target.path] or draft, copied)
                if not is_target(copied, target):
                    raise DigestError(f"{target.path} changed while it was repaired")
            self._put_in_place(draft, folder)
        logger.warning("repaired release %s: its files had been altered", folder.name)

    def _put_in_place(self, draft: Path, final: Path) -> None:
        for inner in (draft / GRAPH_FOLDER, draft):
            if inner.is_dir():
                sync_folder(inner)
        if final.is_symlink() or final.is_file():
            final.unlink()
        elif final.exists():
            shutil.rmtree(final)
        os.rename(draft, final)
        sync_folder(self._bundles)

    def _complete(self, folder: Path, targets: list[TargetFile]) -> bool:
        """Whether the folder holds exactly the targets, each one plain file of the signed bytes."""
        wanted = {_inside(target.path): target for target in targets}
        try:
            if not folder.is_dir() or check_files(folder).keys() != wanted.keys():
                return False
        except TrustError:
            return False
        return all(self._is(folder / name, target) for name, target in wanted.items())

    def _find(self, target: TargetFile) -> Path | None:
        """A file with exactly the target's bytes, received or of a release already here."""
        name = _inside(target.path)
        candidates = [self._incoming / _flat(target.path)]
        candidates += sorted(self._bundles.glob(f"*/{name}"))
        return next((path for path in candidates if self._is(path, target)), None)

    def _is(self, path: Path, target: TargetFile) -> bool:
        """`is_target`, remembered while the file is untouched, so that a model is hashed once."""
        try:
            seen = path.lstat()
        except OSError:
            return False
        marks = (seen.st_ino, seen.st_nlink, seen.st_mode, seen.st_size)
        # Whoever writes can set the modification time back, but not the time of change.
        key = (str(path), *marks, seen.st_mtime_ns, seen.st_ctime_ns, str(target.hashes))
        if key not in self._hashed:
            self._hashed[key] = is_target(path, target)
        return self._hashed[key]

    def _assemble(self, trusted: TrustedRelease, targets: list[TargetFile], final: Path) -> None:
        with self.draft() as draft:
            for target in targets:
                source = self._find(target)
                if source is None:
                    received = self._incoming / _flat(target.path)
                    if received.exists():
                        received.unlink()
                        raise DigestError(f"{target.path} is not the file that was signed")
                    raise TrustError(f"{target.path} has not been received")
                placed = draft / _inside(target.path)
                with _stored("write to"):
                    placed.parent.mkdir(mode=0o700, exist_ok=True)
                trusted.take(target, source, placed)
            check_bundle(draft, operators=self._operators)
            with _stored("write to"):
                self._put_in_place(draft, final)

    def _held(self, offer: OfferModel, folder: Path) -> Held:
        """A folder with a graph is a bundle; one with only an adapter goes over its base."""
        manifest = _read_manifest(folder)
        if manifest is None:
            raise TrustError(f"release {offer.release} has no readable {MANIFEST_FILE}")
        if (manifest.family, manifest.release) != (offer.family, offer.release):
            raise TrustError(
                f"the offer {offer.family} {offer.release} holds the manifest of "
                f"{manifest.family} {manifest.release}"
            )
        adapter = folder / ADAPTER_FILE
        if manifest.kind != "adapter":
            over = str(adapter) if adapter.is_file() else ""
            return Held(offer.family, offer.release, str(folder), over)
        base = self._bundles / (manifest.base_release or "")
        held = _read_manifest(base) if manifest.base_release else None
        if held is None or held.kind == "adapter" or not adapter.is_file():
            raise TrustError(
                f"release {offer.release} is an adapter of {manifest.base_release}, "
                f"which this device does not hold; send that bundle first"
            )
        return Held(offer.family, offer.release, str(base), str(adapter))

    def _change(self, **changes: object) -> None:
        pointer = msgspec.structs.replace(self._pointer, **changes)
        with _stored("switch models in"):
            replace_bytes(self._folder / "current.json", msgspec.json.encode(pointer))
        self._pointer = pointer

    def _read_pointer(self) -> _Pointer:
        path = self._folder / "current.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=_Pointer)
        except FileNotFoundError:
            return _Pointer()
        except (OSError, msgspec.DecodeError) as exc:
            raise StorageError(
                f"{path} is damaged ({exc}); delete it to fetch the model again"
            ) from exc

    def _tidy(self) -> None:
        """Forget received files and every release that is neither current nor previous."""
        kept: set[str] = set()
        for held in (self.current, self.previous):
            if held is not None:
                kept |= {held.bundle, str(Path(held.adapter).parent)}
        with contextlib.suppress(OSError):
            for folder in self._bundles.iterdir():
                if str(folder) not in kept:
                    shutil.rmtree(folder, ignore_errors=True)
            for file in self._incoming.iterdir():
                file.unlink()


def _sound_paths(offer: OfferModel) -> tuple[str, ...]:
    """The offer's target paths, refused unless each is FAMILY/RELEASE/FILE of plain names; a FILE
    may be in the folder "onnx"."""
    names: set[str] = set()
    for path in offer.targets:
        parts = path.split("/")
        deeper = len(parts) == 4 and parts[2] == GRAPH_FOLDER
        if not (len(parts) == 3 or deeper) or not all(_is_name(part) for part in parts):
            raise TrustError(f"target path {path!r} is not FAMILY/RELEASE/FILE")
        if parts[0] != offer.family:
            raise TrustError(f"target path {path!r} is not of family {offer.family}")
        if _inside(path) in names:
            raise TrustError(f"release {offer.release} has two files named {_inside(path)!r}")
        names.add(_inside(path))
    if not names:
        raise TrustError(f"release {offer.release} has no files")
    return offer.targets


def _inside(path: str) -> str:
    """Where a target is within its release's folder."""
    return path.split("/", 2)[2]


def _is_name(part: str) -> bool:
    try:
        _NAME.decode(msgspec.json.encode(part))
    except msgspec.DecodeError:
        return False
    return True


def _read_manifest(folder: Path) -> ReleaseManifest | None:
    try:
        return decode_manifest((folder / MANIFEST_FILE).read_bytes())
    except (OSError, RemoteProtocolError):
        return None


def _flat(path: str) -> str:
    """A file name for a target path that cannot leave its folder."""
    return hashlib.sha256(path.encode()).hexdigest()


@contextmanager
def _stored(doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise StorageError(
            f"cannot {doing} the model folder: {exc}; free space or fix its permissions"
        ) from exc
