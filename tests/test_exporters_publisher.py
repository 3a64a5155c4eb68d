"""exporters: python-tuf's own client accepts what was published and nothing else."""

import hashlib
import json
import shutil
import stat
import threading
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
from exporters.publisher import ROLES, KeyPlan, Lifetimes, Publisher

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


# --- keys, rotation, assignments ------------------------------------------------------------------


def _names(publisher: Publisher, role: str) -> dict[str, object]:
    files = publisher.metadata()
    name = max((n for n in files if n.endswith(f"{role}.json")), key=lambda n: int(n.split(".")[0]))
    return dict(json.loads(files[name])["signed"])


def test_offline_keys_sign_from_their_own_folders(tmp_path: Path, clock: Clock) -> None:
    sticks = tuple(tmp_path / f"stick-{i}" for i in range(3))
    plans = {"root": KeyPlan(3, 2, sticks), "targets": KeyPlan(1, 1, sticks[:1])}
    online = Publisher(tmp_path / "releases", clock)
    root = online.init(plans)
    release = _release(tmp_path / "r1", "r1")

    assert sorted(p.name for p in (tmp_path / "releases" / "keys").iterdir()) == [
        *("director.pem", "snapshot.pem", "timestamp.pem")
    ]
    with pytest.raises(ExportError, match="1 targets keys must sign and 0 are in"):
        online.publish("tiny", "r1", release)
    offline = Publisher(tmp_path / "releases", clock, keys=sticks[:2])
    offline.publish("tiny", "r1", release)
    with pytest.raises(ExportError, match="2 root keys must sign and 0 are in"):
        online.rotate("timestamp")
    offline.rotate("timestamp")
    with pytest.raises(ExportError, match="2 root keys must sign and 1 are in"):
        Publisher(tmp_path / "releases", clock, keys=sticks[:1]).rotate("snapshot")

    client = _client(tmp_path / "c", Local(online), root)
    assert _take(client, "tiny/r1/model.onnx") == b"weights"


def test_without_offline_keys_what_is_online_is_renewed(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    stick = (tmp_path / "stick",)
    publisher = Publisher(tmp_path / "releases", clock)
    publisher.init({"root": KeyPlan(folders=stick), "targets": KeyPlan(folders=stick)})
    clock.time = NOW + timedelta(days=100)

    assert publisher.refresh()

    expires = publisher.expires()
    assert expires["timestamp"] == clock.time + timedelta(days=7)
    assert expires["targets"] == NOW + timedelta(days=180)
    assert "targets is good for 80 days" in caplog.text


@pytest.mark.parametrize("role", ROLES)
def test_a_client_follows_every_rotation(role: str, publisher: Publisher, tmp_path: Path) -> None:
    root = publisher.root()
    publisher.publish("tiny", "r1", _release(tmp_path / "r1", "r1"))
    _client(tmp_path / "c", Local(publisher), root).refresh()
    before = {path.name for path in (publisher.folder / "keys").iterdir()}

    publisher.rotate(role)
    publisher.rotate(role, KeyPlan(2, 2))

    client = _client(tmp_path / "c", Local(publisher), root)
    assert _take(client, "tiny/r1/model.onnx") == b"weights"
    after = {path.name for path in (publisher.folder / "keys").iterdir()}
    assert len(after) == len(before) + 1  # the retired key is gone, two are new
    assert not {name for name in after if name == f"{role}.pem"}
    publisher.publish("tiny", "r2", _release(tmp_path / "r2", "r2", b"more"))
    assert _take(_client(tmp_path / "c", Local(publisher), root), "tiny/r2/model.onnx") == b"more"
    with pytest.raises(ExportError, match="is no role"):
        publisher.rotate("nobody")


def test_what_a_kill_left_half_done_is_completed(publisher: Publisher, tmp_path: Path) -> None:
    root = publisher.root()
    metadata = publisher.folder / "metadata"
    kept = tmp_path / "kept"
    shutil.copytree(metadata, kept)
    publisher.publish("tiny", "r1", _release(tmp_path / "r1", "r1"))
    steps = sorted(set(metadata.iterdir()) - {metadata / p.name for p in kept.iterdir()})
    assert [path.name for path in steps] == ["2.director.json", "2.snapshot.json", "2.targets.json"]
    for survivors in (("targets",), ("targets", "director"), ("targets", "director", "snapshot")):
        shutil.rmtree(publisher.folder / "half", ignore_errors=True)
        half = Publisher(publisher.folder / "half", publisher._now)
        shutil.copytree(publisher.folder / "keys", half.folder / "keys")
        shutil.copytree(publisher.folder / "targets", half.folder / "targets")
        shutil.copytree(kept, half.folder / "metadata")
        for path in steps:
            if path.name.split(".")[1] in survivors:
                shutil.copy(path, half.folder / "metadata")

        client = _client(tmp_path / "-".join(survivors), Local(half), root)

        assert _take(client, "tiny/r1/model.onnx") == b"weights"


def test_assignments_are_signed_once_and_name_published_releases_only(
    publisher: Publisher, tmp_path: Path
) -> None:
    for release in ("r1", "r2"):
        publisher.publish("tiny", release, _release(tmp_path / release, release), everyone=False)

    assert publisher.assign("tiny", ["r1"], {"kitchen-1": ["r2"]})
    assert not publisher.assign("tiny", ["r1"], {"kitchen-1": ["r2"]})
    entries = sorted(_names(publisher, "director")["targets"])
    assert entries[1] == "director/tiny/everyone/r1"
    assert "kitchen" not in json.dumps(entries)
    with pytest.raises(ExportError, match="tiny/r9 is not published"):
        publisher.assign("tiny", ["r9"])
    assert publisher.assign("other", []) is False


def test_a_withdrawn_release_leaves_no_trace_in_what_is_signed(
    publisher: Publisher, tmp_path: Path
) -> None:
    publisher.publish("tiny", "r1", _release(tmp_path / "r1", "r1"))
    publisher.publish("tiny", "r2", _release(tmp_path / "r2", "r2", b"more"))

    publisher.withdraw("tiny", "r1")

    assert list(publisher.releases()) == ["tiny/r2"]
    assert list(_names(publisher, "director")["targets"]) == ["director/tiny/everyone/r2"]
    assert not (publisher.folder / "targets" / "tiny" / "r1").exists()
    with pytest.raises(ExportError, match="not a published release"):
        publisher.withdraw("tiny", "r1")
    with pytest.raises(ExportError, match="not a published target"):
        publisher.read("tiny/r1/model.onnx")


def test_two_publishers_of_one_folder_take_turns(publisher: Publisher, tmp_path: Path) -> None:
    folders = {name: _release(tmp_path / name, name) for name in "abcdefgh"}
    other = Publisher(publisher.folder, publisher._now)

    def publish(who: Publisher, names: str) -> None:
        for name in names:
            who.publish("tiny", name, folders[name])
            who.metadata()

    threads = [
        threading.Thread(target=publish, args=(publisher, "abcd")),
        threading.Thread(target=publish, args=(other, "efgh")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert {name.removeprefix("tiny/") for name in publisher.releases()} == set("abcdefgh")
    assert len(_names(publisher, "director")["targets"]) == 8


@pytest.mark.parametrize("plan", [(0, 1), (1, 2), (2, 0), (65, 1)])
def test_a_key_plan_that_cannot_work_is_refused(plan: tuple[int, int]) -> None:
    with pytest.raises(ExportError, match="allowed: 1 to all"):
        KeyPlan(*plan)


def test_a_repository_from_before_the_director_gets_one(
    publisher: Publisher, tmp_path: Path
) -> None:
    root = publisher.root()
    publisher.publish("tiny", "r1", _release(tmp_path / "r1", "r1"))
    targets = publisher._load("targets").signed
    targets.delegations = None
    publisher._next("targets", targets)
    for path in (publisher.folder / "metadata").glob("*.director.json"):
        path.unlink()
    publisher._close()
    _client(tmp_path / "c", Local(publisher), root).refresh()

    assert publisher.assign("tiny", ["r1"])

    assert list(_names(publisher, "director")["targets"]) == ["director/tiny/everyone/r1"]
    # What a client has seen once may not vanish, but may come: the snapshot names one role more.
    assert _take(_client(tmp_path / "c", Local(publisher), root), "tiny/r1/model.onnx")
