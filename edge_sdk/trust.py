"""May these bytes be run? A memory of what the owner signed, kept by python-tuf's client.

Knows TUF metadata and hashes. Does not know models, messages, sockets or what a file is for.

Rules, all python-tuf's (its client workflow 5.3 to 5.7): every role signed by its threshold of the
keys in the trusted root; no role's version ever falls; timestamp, snapshot and targets agree with
one another; nothing past its expiry at `now`; a file's length and hashes are those of the signed
targets. What is trusted lives in its own folder, apart from the models, so that deleting models
never forgets a version.

Ours, beside them: where the owner's targets name a director, a release must be assigned to this
device or to everyone, by an entry that repeats the hash of the release's manifest.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from tuf.api import exceptions as tuf
from tuf.api._payload import Root, TargetFile, Targets
from tuf.api.metadata import Metadata
from tuf.ngclient.config import UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.updater import Updater

from edge_sdk.errors import (
    DigestError,
    FleetError,
    RollbackError,
    SignatureError,
    StorageError,
    TrustError,
)
from edge_sdk.plain_files import open_plain
from edge_sdk.wire.manifest import MANIFEST_FILE, director_path

__all__ = ["TargetFile", "TrustedRelease", "held_targets", "is_target"]

_HERE = "offer:/"  # URLs name places inside an offer; nothing is ever fetched from anywhere

Find = Callable[[TargetFile], Path | None]
"""Where this device may hold the bytes of a target, unchecked; None if nowhere."""


class TrustedRelease:
    """The signed view of one offer: which files it names, and a way to take only those.

    Raises:
        SignatureError: metadata not signed by the trusted keys.
        RollbackError: metadata older than what this device has already trusted.
        DigestError: metadata whose bytes are not those the signed snapshot names.
        TrustError: expired, incomplete or otherwise unusable metadata.
        StorageError: the trust folder cannot be written.
    """

    def __init__(
        self, folder: Path, *, root: bytes, metadata: Mapping[str, bytes], now: datetime
    ) -> None:
        """Check `metadata` (file name -> bytes) against the folder's memory, from `root` on.

        `now` must be aware (UTC); expiry is judged by it, since a device's clock may be wrong.
        """
        with _translated():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            began = time.time_ns() - 1_000_000_000  # python-tuf renames what it has not synced
            self._fetcher = _OfferFetcher(metadata)
            self._updater = Updater(
                str(folder),
                metadata_base_url=_HERE,
                target_base_url=_HERE,
                fetcher=self._fetcher,
                config=UpdaterConfig(prefix_targets_with_hash=False),
                bootstrap=root,
            )
            # python-tuf takes the time from this machine; ours is the caller's, often better known.
            self._updater._trusted_set.reference_time = now
            self._updater.refresh()
            for path in (*folder.glob("*.json"), *folder.glob("root_history/*"), folder):
                if path.stat().st_mtime_ns >= began:
                    _sync(path)

    def target(self, path: str) -> TargetFile:
        """Return length and hashes of target `path`.

        Raises:
            TrustError: the signed targets do not name it.
        """
        with _translated():
            found = self._updater.get_targetinfo(path)
        if found is None:
            raise TrustError(f"{path} is not among the files its owner signed")
        return found

    def check_assigned(self, family: str, release: str, device: str) -> None:
        """Check that the director lets `device` run `family`/`release`.

        A repository without a director assigns every release to everyone.

        Raises:
            TrustError: it is assigned to nobody, or to others; or the director names other bytes
                than those among the signed targets.
        """
        if self._updater._trusted_set.targets.delegations is None:
            return
        manifest = self.target(f"{family}/{release}/{MANIFEST_FILE}")
        with _translated():
            for who in (device, "") if device else ("",):
                entry = self._updater.get_targetinfo(director_path(family, release, who))
                if entry is None:
                    continue
                if (entry.length, entry.hashes) != (manifest.length, manifest.hashes):
                    raise TrustError(
                        f"{family}/{release} is assigned with other bytes than were signed"
                    )
                return
        raise TrustError(f"{family}/{release} is not assigned to this device")

    def take(self, target: TargetFile, source: Path, destination: Path) -> None:
        """Copy `source` to `destination` if and only if it is `target`'s very bytes.

        Raises:
            DigestError: other bytes.
            StorageError: the disk is full or refuses.
        """
        self._fetcher.sources[target.path] = source
        with _translated():
            self._updater.download_target(target, filepath=str(destination))
            _sync(destination)


def held_targets(folder: Path, root: bytes) -> Mapping[str, TargetFile]:
    """Return the targets last trusted, by path, from the memory in `folder` alone.

    For models that are here already: signatures are checked from `root` on, expiry is not, since a
    device that hears nothing from its owner keeps its model.

    Raises:
        SignatureError: the memory is not signed by the owner.
        TrustError: there is no such memory, or it cannot be read.
    """
    with _translated():
        try:
            trusted: Metadata[Root] = Metadata.from_bytes(root)
            while True:
                path = folder / "root_history" / f"{trusted.signed.version + 1}.root.json"
                if not path.is_file():
                    break
                following: Metadata[Root] = Metadata.from_bytes(path.read_bytes())
                for judge in (trusted.signed, following.signed):
                    judge.verify_delegate("root", following.signed_bytes, following.signatures)
                trusted = following
            kept: Metadata[Targets] = Metadata.from_bytes((folder / "targets.json").read_bytes())
        except FileNotFoundError as exc:
            raise TrustError("this device has not trusted any release yet") from exc
        trusted.signed.verify_delegate("targets", kept.signed_bytes, kept.signatures)
    return kept.signed.targets


def is_target(path: Path, target: TargetFile) -> bool:
    """Return whether the file at `path` is one plain file that holds `target`'s very bytes."""
    try:
        with open_plain(path) as file:
            if os.fstat(file.fileno()).st_size != target.length:
                return False
            target.verify_length_and_hashes(file)
    except (OSError, tuf.LengthOrHashMismatchError):
        return False
    return True


class _OfferFetcher(FetcherInterface):
    """Answers python-tuf's downloads from an offer's metadata and from files already here."""

    def __init__(self, metadata: Mapping[str, bytes]) -> None:
        self.sources: dict[str, Path] = {}
        self._metadata = metadata

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.removeprefix(_HERE)
        if name in self.sources:
            return _pieces(self.sources[name])
        # A repository with consistent snapshots prefixes versions; python-tuf checks the version.
        _, _, plain = name.partition(".")
        for known in (name, plain):
            if known in self._metadata and not (known == plain and plain == "root.json"):
                return iter([self._metadata[known]])
        raise tuf.DownloadHTTPError(f"the offer lacks {name}", 404)


def _pieces(path: Path) -> Iterator[bytes]:
    with open_plain(path) as file:
        while piece := file.read(1 << 20):
            yield piece


@contextmanager
def _translated() -> Iterator[None]:
    """Turn python-tuf's errors into ours; the order is from narrow to wide."""
    try:
        yield
    except FleetError:
        raise
    except tuf.UnsignedMetadataError as exc:
        raise SignatureError(f"the release is not signed by its owner: {exc}") from exc
    except tuf.BadVersionNumberError as exc:
        raise RollbackError(f"the release is older than one already trusted: {exc}") from exc
    except tuf.ExpiredMetadataError as exc:
        raise TrustError(
            f"the release's metadata has expired ({exc}); its owner must sign it again"
        ) from exc
    except (tuf.LengthOrHashMismatchError, tuf.DownloadLengthMismatchError) as exc:
        raise DigestError(f"a file's bytes are not those that were signed: {exc}") from exc
    except (tuf.RepositoryError, tuf.DownloadError) as exc:
        raise TrustError(f"the release's metadata cannot be used: {exc}") from exc
    except OSError as exc:
        raise StorageError(f"cannot keep the release: {exc}; free space and try again") from exc


def _sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
