"""exporters: python-tuf's own client accepts what was published and nothing else."""

import hashlib
import json
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tuf.api import exceptions as tuf
from tuf.ngclient import Updater
from tuf.ngclient.fetcher import FetcherInterface

from edge_sdk.errors import ExportError
from edge_sdk.wire.manifest import MANIFEST_FILE, ReleaseManifest, encode_manifest
from exporters.bundle import file_entries
from exporters.publisher import Lifetimes, Publisher

NOW = datetime(2026, 11, 1, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.time = NOW

    def __call__(self) -> datetime:
        return self.time


class Local(FetcherInterface):
    """Serves a publisher's metadata, or a copy of it that a test has bent."""

    def __init__(self, publisher: Publisher) -> None:
        self.publisher = publisher
        self.metadata = publisher.metadata()
        self.bend: dict[str, bytes] = {}

    def _fetch(self, url: str) -> Iterator[bytes]:
        kind, _, name = url.removeprefix("local://").partition("/")
        if name in self.bend:
            return iter([self.bend[name]])
        if kind == "targets":
            return iter([self.publisher.read(name)])
        if name not in self.metadata:
            raise tuf.DownloadHTTPError(name, 404)
        return iter([self.metadata[name]])


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def publisher(tmp_path: Path, clock: Clock) -> Publisher:
    made = Publisher(tmp_path / "releases", clock)
    made.init()
    return made


def _release(folder: Path, release: str, content: bytes = b"weights") -> Path:
    folder.mkdir()
    (folder / "model.onnx").write_bytes(content)
    manifest = ReleaseManifest(
        family="tiny",
        release=release,
        kind="decoder",
        base_model="m",
        architecture="LlamaForCausalLM",
        context=8,
        tokenizer_sha256=hashlib.sha256(b"").hexdigest(),
        files=file_entries(folder),
    )
    (folder / MANIFEST_FILE).write_bytes(encode_manifest(manifest))
    return folder


def _client(folder: Path, fetcher: Local, root: bytes, now: datetime = NOW) -> Updater:
    (folder / "got").mkdir(parents=True, exist_ok=True)
    updater = Updater(
        str(folder),
        "local://metadata",
        str(folder / "got"),
        "local://targets",
        fetcher=fetcher,
        bootstrap=root,
    )
    updater._trusted_set.reference_time = now
    return updater


def _take(updater: Updater, path: str) -> bytes:
    info = updater.get_targetinfo(path)
    assert info is not None
    return Path(updater.download_target(info)).read_bytes()


def test_a_published_release_is_accepted_file_by_file(publisher: Publisher, tmp_path: Path) -> None:
    paths = publisher.publish("tiny", "r1", _release(tmp_path / "r1", "r1"))
    client = _client(tmp_path / "c", Local(publisher), publisher.root())

    assert paths == ("tiny/r1/symbiont.json", "tiny/r1/model.onnx")
    assert _take(client, "tiny/r1/model.onnx") == b"weights"
    assert json.loads(_take(client, "tiny/r1/symbiont.json"))["release"] == "r1"


def test_a_later_release_follows_from_the_same_root(publisher: Publisher, tmp_path: Path) -> None:
    root = publisher.root()
    publisher.publish("tiny", "r1", _release(tmp_path / "r1", "r1"))
    _client(tmp_path / "c", Local(publisher), root).refresh()

    publisher.publish("tiny", "r2", _release(tmp_path / "r2", "r2", b"better"))
    client = _client(tmp_path / "c", Local(publisher), root)

    assert _take(client, "tiny/r2/model.onnx") == b"better"
    assert _take(client, "tiny/r1/model.onnx") == b"weights"


def test_a_changed_target_is_refused(publisher: Publisher, tmp_path: Path) -> None:
    publisher.publish("tiny", "r1", _release(tmp_path / "r1", "r1"))
    fetcher = Local(publisher)
    digest = hashlib.sha256(b"weights").hexdigest()
    fetcher.bend[f"tiny/r1/{digest}.model.onnx"] = b"weightz"
    client = _client(tmp_path / "c", fetcher, publisher.root())

    with pytest.raises(tuf.RepositoryError):
        _take(client, "tiny/r1/model.onnx")


def test_metadata_older_than_the_trusted_is_refused(publisher: Publisher, tmp_path: Path) -> None:
    publisher.publish("tiny", "r1", _release(tmp_path / "r1", "r1"))
    old = Local(publisher)
    publisher.publish("tiny", "r2", _release(tmp_path / "r2", "r2"))
    _client(tmp_path / "c", Local(publisher), publisher.root()).refresh()

    with pytest.raises(tuf.BadVersionNumberError):
        _client(tmp_path / "c", old, publisher.root()).refresh()


def test_metadata_of_another_owner_is_refused(
    publisher: Publisher, clock: Clock, tmp_path: Path
) -> None:
    other = Publisher(tmp_path / "other", clock)
    other.init()

    with pytest.raises(tuf.UnsignedMetadataError):
        _client(tmp_path / "c", Local(other), publisher.root()).refresh()


def test_a_changed_signature_is_refused(publisher: Publisher, tmp_path: Path) -> None:
    fetcher = Local(publisher)
    timestamp = json.loads(fetcher.metadata["timestamp.json"])
    timestamp["signed"]["expires"] = "2099-01-01T00:00:00Z"
    fetcher.bend["timestamp.json"] = json.dumps(timestamp).encode()

    with pytest.raises(tuf.UnsignedMetadataError):
        _client(tmp_path / "c", fetcher, publisher.root()).refresh()


def test_a_frozen_repository_is_refused_after_its_lifetime(
    publisher: Publisher, tmp_path: Path
) -> None:
    frozen = Local(publisher)
    later = NOW + timedelta(days=Lifetimes().timestamp + 1)

    with pytest.raises(tuf.ExpiredMetadataError):
        _client(tmp_path / "c", frozen, publisher.root(), now=later).refresh()


def test_metadata_is_renewed_before_it_expires(
    publisher: Publisher, clock: Clock, tmp_path: Path
) -> None:
    root = publisher.root()
    publisher.publish("tiny", "r1", _release(tmp_path / "r1", "r1"))
    _client(tmp_path / "c", Local(publisher), root).refresh()
    clock.time = NOW + timedelta(days=400)  # past every lifetime, the root's included

    client = _client(tmp_path / "c", Local(publisher), root, now=clock.time)

    assert _take(client, "tiny/r1/model.onnx") == b"weights"
    assert not publisher.refresh()


def test_keys_are_private_and_never_overwritten(publisher: Publisher) -> None:
    keys = sorted((publisher.folder / "keys").iterdir())

    assert [key.stem for key in keys] == ["director", "root", "snapshot", "targets", "timestamp"]
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
    with pytest.raises(ExportError, match="already holds"):
        publisher.init()


def test_a_release_is_published_once(publisher: Publisher, tmp_path: Path) -> None:
    folder = _release(tmp_path / "r1", "r1")
    publisher.publish("tiny", "r1", folder)

    with pytest.raises(ExportError, match="already published"):
        publisher.publish("tiny", "r1", folder)
    assert publisher.releases() == {"tiny/r1": ("tiny/r1/model.onnx", "tiny/r1/symbiont.json")}


def test_a_folder_changed_since_its_export_is_not_signed(
    publisher: Publisher, tmp_path: Path
) -> None:
    folder = _release(tmp_path / "r1", "r1")
    (folder / "model.onnx").write_bytes(b"other")

    with pytest.raises(ExportError, match="changed since the export"):
        publisher.publish("tiny", "r1", folder)
    with pytest.raises(ExportError, match="not tiny/r9"):
        publisher.publish("tiny", "r9", folder)


def test_a_link_in_a_release_is_not_signed(publisher: Publisher, tmp_path: Path) -> None:
    folder = _release(tmp_path / "r1", "r1")
    (folder / "extra").symlink_to("/etc/hostname")

    with pytest.raises(ExportError, match="plain file"):
        publisher.publish("tiny", "r1", folder)


def test_a_path_outside_the_targets_is_not_read(publisher: Publisher) -> None:
    for path in ("../keys/root.pem", "tiny/r1/../../../keys/root.pem", "x", ""):
        with pytest.raises(ExportError):
            publisher.read(path)


def test_an_empty_folder_says_how_to_begin(tmp_path: Path, clock: Clock) -> None:
    with pytest.raises(ExportError, match=r"init\(\)"):
        Publisher(tmp_path / "none", clock).metadata()
