"""Release folders: checks one before it is published, and makes the small one of an adapter.

Knows `symbiont.json` and which files it must name. Does not know signatures, nor how graphs and
factors are made.

A release is either whole (a model bundle) or only an adapter for a whole one, which its manifest
names as `base_release`; that folder holds two files and weighs kilobytes.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy.typing as npt

from edge_sdk.adapter_file import write_release
from edge_sdk.errors import ExportError, RemoteProtocolError
from edge_sdk.wire.manifest import MANIFEST_FILE, FileEntry, ReleaseManifest, decode_manifest
from edge_sdk.wire.messages import Name


def check_names(*names: str) -> None:
    """Check that family and release names can be published.

    Raises:
        ExportError: a name has other characters than letters, digits, ".", "_" and "-", begins
            with a sign, or is longer than 128.
    """
    for name in names:
        try:
            msgspec.convert(name, Name)
        except msgspec.ValidationError as exc:
            raise ExportError(
                f"{name!r} is not a name for a family or release: use 1 to 128 letters, digits, "
                '".", "_" and "-", beginning with a letter or digit'
            ) from exc


def file_entries(folder: Path) -> dict[str, FileEntry]:
    """SHA-256 and size of every file below a release folder except its manifest, by POSIX path.

    Raises:
        ExportError: something in the folder is a link or no plain file.
    """
    entries = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ExportError(f"{path} is not a plain file; a release holds only plain files")
        if path.is_file() and path != folder / MANIFEST_FILE:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            name = path.relative_to(folder).as_posix()
            entries[name] = FileEntry(sha256=digest, bytes=path.stat().st_size)
    return entries


def read_manifest(folder: Path) -> ReleaseManifest:
    """The manifest of a release folder.

    Raises:
        ExportError: missing or malformed.
    """
    path = folder / MANIFEST_FILE
    try:
        return decode_manifest(path.read_bytes())
    except (OSError, RemoteProtocolError) as exc:
        raise ExportError(f"{path} is not a release manifest ({exc}); export it again") from exc


def check_release(folder: Path, *, family: str, release: str) -> ReleaseManifest:
    """Return the folder's manifest if it is `family`/`release` and names exactly its files.

    Raises:
        ExportError: another name, or a file missing, added or changed since the export.
    """
    manifest = read_manifest(folder)
    if (manifest.family, manifest.release) != (family, release):
        raise ExportError(
            f"{folder} holds {manifest.family}/{manifest.release}, not {family}/{release}"
        )
    found = file_entries(folder)
    for name in sorted(found.keys() | manifest.files.keys()):
        if found.get(name) != manifest.files.get(name):
            raise ExportError(f"{folder / name} was changed since the export; export again")
    return manifest


def write_adapter_release(
    out: Path,
    base: ReleaseManifest,
    factors: Mapping[str, npt.ArrayLike],
    *,
    release: str,
    rank: int,
    alpha: float,
    lineage: Mapping[str, str] | None = None,
) -> ReleaseManifest:
    """Write the adapter-only release `release` for the whole release `base` and return its claims.

    `out` is created and must not exist; `factors` are those of `write_adapter`.

    Raises:
        ExportError: `base` is itself an adapter, `out` exists, `release` is no fit name, or the
            factors do not fit `base`.
    """
    if base.kind == "adapter" or not base.adapter_slots:
        raise ExportError(
            f"{base.family}/{base.release} has no adapter slots; name a whole release"
        )
    check_names(release)
    try:
        out.mkdir(parents=True)
    except FileExistsError as exc:
        raise ExportError(f"{out} exists; choose another folder or remove it") from exc
    return write_release(
        out, base, factors, release=release, rank=rank, alpha=alpha, lineage=lineage
    )
