"""A device believes only what its owner signed, and never runs less than it ran before."""

import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from edge_sdk.errors import (
    DigestError,
    RollbackError,
    RuntimeFailure,
    SignatureError,
    StorageError,
    TrustError,
)
from edge_sdk.graphs import check_bundle
from edge_sdk.models import MAX_STARTS, Held, ModelStore, child_probe
from edge_sdk.wire.manifest import GOLDEN_FILE
from edge_sdk.wire.messages import OfferModel
from exporters.publisher import Publisher
from tests.edge_world import fingerprint, offer, releases


def _no_probe(_held: Held) -> None:
    return None


def _now() -> datetime:
    return datetime.now(UTC)


class Device:
    """A model store and the files it asks for, from a publisher that may lie."""

    def __init__(self, folder: Path) -> None:
        self.publisher = releases(folder)
        self.folder = folder / "models"
        self.probe = _no_probe
        self.store = self.open()

    def open(self) -> ModelStore:
        return ModelStore(
            self.folder,
            root=self.publisher.root(),
            probe=lambda held: self.probe(held),
            device="d1",
        )

    def fetch(self, wanted: OfferModel) -> tuple[str, ...]:
        missing = self.store.missing(wanted, now=_now())
        for path in missing:
            self.store.put(path, self.publisher.read(path))
        return missing

    def install(self, release: str) -> Held:
        wanted = offer(self.publisher, release)
        self.fetch(wanted)
        return self.store.install(wanted, now=_now())


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def test_a_release_is_fetched_verified_and_kept_over_a_restart(device: Device) -> None:
    held = device.install("r1")

    assert held.release == "r1"
    assert device.open().current == held
    assert device.store.missing(offer(device.publisher, "r1"), now=_now()) == ()
    assert os.stat(held.bundle).st_mode & 0o077 == 0


def test_only_files_that_differ_are_asked_for(device: Device) -> None:
    device.install("r1")

    missing = device.store.missing(offer(device.publisher, "r2"), now=_now())

    assert {path.rsplit("/", 1)[-1] for path in missing} == {
        "answer.onnx",
        "answer_adapted.onnx",
        "config.json",
        "golden.json",
        "model.onnx",
        "model.onnx.data",
        "symbiont.json",
        "weights.json",
    }


def test_an_adapter_release_goes_over_the_bundle_it_names(device: Device) -> None:
    base = device.install("r1")

    held = device.install("a1")

    assert (held.bundle, held.release) == (base.bundle, "a1")
    assert held.adapter_path is not None
    assert held.adapter_path.is_file()


def test_an_adapter_without_its_base_is_refused(device: Device) -> None:
    device.install("r2")

    with pytest.raises(TrustError, match="adapter of r1, which this device does not hold"):
        device.install("a1")

    assert device.store.current is not None
    assert device.store.current.release == "r2"


def test_another_owner_is_refused(device: Device, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    stranger = Publisher(tmp_path / "other" / "repository")
    stranger.init()
    wanted = offer(device.publisher, "r1")
    forged = OfferModel("x", "tiny", "r1", stranger.metadata(), wanted.targets)

    with pytest.raises(SignatureError, match="not signed by its owner"):
        device.store.missing(forged, now=_now())


def test_changed_metadata_is_refused(device: Device) -> None:
    wanted = offer(device.publisher, "r1")
    for name, data in wanted.metadata.items():
        if name.endswith("root.json"):
            continue
        bent = data.replace(b'"version":', b'"Version":', 1)
        metadata = {**wanted.metadata, name: bent}
        device.folder = device.folder.with_name(name)  # what was trusted is not fetched again
        with pytest.raises(TrustError):
            device.open().missing(
                OfferModel("x", "tiny", "r1", metadata, wanted.targets), now=_now()
            )


def test_older_metadata_is_refused_even_after_a_restart(device: Device) -> None:
    old = offer(device.publisher, "r1")
    device.publisher._lifetimes = type(device.publisher._lifetimes)(timestamp=100)
    assert device.publisher.refresh()
    device.install("r1")

    with pytest.raises(RollbackError, match="older than one already trusted"):
        device.open().missing(old, now=_now())


def test_expired_metadata_is_refused_by_the_callers_time(device: Device) -> None:
    wanted = offer(device.publisher, "r1")

    with pytest.raises(TrustError, match="expired"):
        device.store.missing(wanted, now=_now() + timedelta(days=60))

    assert device.store.missing(wanted, now=_now() - timedelta(days=3650))


def test_other_bytes_than_the_signed_are_refused(device: Device) -> None:
    wanted = offer(device.publisher, "r1")
    device.fetch(wanted)
    weights = next(path for path in wanted.targets if path.endswith(".data"))
    data = device.publisher.read(weights)
    device.store.put(weights, data[:-1] + bytes([data[-1] ^ 1]))

    with pytest.raises(DigestError, match="not the file that was signed"):
        device.store.install(wanted, now=_now())

    assert device.store.current is None
    assert device.store.missing(wanted, now=_now()) == (weights,)


@pytest.mark.parametrize(
    "path", ["tiny/r1/../../x", "/etc/passwd", "tiny/r1", "tiny/r1/a/b", "other/r1/model.onnx", ""]
)
def test_a_path_that_leaves_its_place_is_refused(path: str, device: Device) -> None:
    wanted = OfferModel("x", "tiny", "r1", device.publisher.metadata(), (path,))

    with pytest.raises(TrustError):
        device.store.missing(wanted, now=_now())


def test_a_file_nobody_signed_is_refused(device: Device) -> None:
    wanted = OfferModel("x", "tiny", "r1", device.publisher.metadata(), ("tiny/r1/extra.bin",))

    with pytest.raises(TrustError, match="not among the files its owner signed"):
        device.store.missing(wanted, now=_now())


def test_a_release_that_fails_its_trial_changes_nothing(device: Device) -> None:
    before = device.install("r1")
    marks = fingerprint(Path(before.bundle))

    def fails(held: Held) -> None:
        raise RuntimeFailure(f"release {held.release} failed its trial")

    device.probe = fails
    with pytest.raises(RuntimeFailure, match="r2 failed its trial"):
        device.install("r2")

    assert device.open().current == before
    assert fingerprint(Path(before.bundle)) == marks


def test_the_previous_release_is_kept_and_can_return(device: Device) -> None:
    first = device.install("r1")
    device.install("r2")

    assert device.store.roll_back() == first
    assert device.open().current == first
    with pytest.raises(RuntimeFailure, match="no earlier model"):
        device.store.roll_back()


def test_only_current_and_previous_stay_on_the_disk(device: Device) -> None:
    for release in ("r1", "a1", "r2"):
        device.install(release)

    kept = {path.name for path in (device.folder / "bundles").iterdir()}

    assert kept == {"r1", "a1", "r2"}  # a1 runs over r1
    assert not list((device.folder / "incoming").iterdir())


def test_a_damaged_pointer_says_what_to_do(device: Device) -> None:
    device.install("r1")
    (device.folder / "current.json").write_text("{")

    with pytest.raises(StorageError, match="delete it to fetch the model again"):
        device.open()


def test_the_trial_runs_in_another_process_under_limits(device: Device) -> None:
    held = device.install("r1")

    child_probe(timeout_s=60)(held)
    # 100 MiB are too few even to begin.
    with pytest.raises(RuntimeFailure, match="failed its trial"):
        child_probe(timeout_s=60, memory_mb=100)(held)
    started = time.monotonic()
    with pytest.raises(RuntimeFailure, match=r"did not answer within 0\.05 s"):
        child_probe(timeout_s=0.05)(held)
    assert time.monotonic() - started < 5


def test_a_graph_that_is_no_graph_fails_its_trial(device: Device) -> None:
    held = device.install("r1")
    (Path(held.bundle) / "model.onnx").write_bytes(b"\x00" * 100)

    with pytest.raises(RuntimeFailure, match="cannot be loaded"):
        child_probe(timeout_s=60)(held)


def test_a_file_that_arrived_on_disk_is_moved_in_and_may_come_twice(
    device: Device, tmp_path: Path
) -> None:
    wanted = offer(device.publisher, "r1")
    for path in device.store.missing(wanted, now=_now()):
        arrived = tmp_path / "arrived"
        arrived.write_bytes(device.publisher.read(path))
        device.store.put_file(path, arrived)
        device.store.put_file(path, arrived)  # handled again after a crash
        assert not arrived.exists()

    assert device.store.install(wanted, now=_now()).release == "r1"


def test_a_file_that_comes_in_parts_is_whole_when_all_are_here(device: Device) -> None:
    wanted = offer(device.publisher, "r1")
    for path in device.store.missing(wanted, now=_now()):
        data = device.publisher.read(path)
        cut = len(data) // 2

        assert not device.store.put_piece(path, data[cut:], offset=cut, size=len(data))
        assert not device.store.put_piece(path, data[cut:], offset=cut, size=len(data))
        assert path in device.store.missing(wanted, now=_now())
        assert device.store.put_piece(path, data[:cut], offset=0, size=len(data))
        with pytest.raises(TrustError, match="beyond"):
            device.store.put_piece(path, data, offset=1, size=len(data))

    assert device.store.install(wanted, now=_now()).release == "r1"


def test_a_link_does_not_arrive(device: Device, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("outside")
    (tmp_path / "soft").symlink_to(secret)
    os.link(secret, tmp_path / "hard")

    for name in ("soft", "hard"):
        with pytest.raises(TrustError, match="not one plain file"):
            device.store.put_file("tiny/r1/model.onnx", tmp_path / name)
    with pytest.raises(StorageError):
        device.store.put_file("tiny/r1/model.onnx", tmp_path / "absent")


# --- what runs is what was signed, at every start -------------------------------------------------


def test_a_release_that_never_answers_gives_way_after_some_starts(device: Device) -> None:
    first = device.install("r1")
    assert device.store.ready() == first
    device.store.prove()
    device.install("r2")

    for _ in range(MAX_STARTS):  # each of these processes is killed before the first answer
        held = device.open().ready()
        assert held is not None
        assert held.release == "r2"
    device.store = device.open()

    assert device.store.ready() == first
    assert device.store.proven
    with pytest.raises(RuntimeFailure, match="5 times before it answered"):
        device.install("r2")
    assert device.open().ready() == first


def test_a_proven_release_may_be_started_as_often_as_one_likes(device: Device) -> None:
    device.install("r1")
    held = device.store.ready()
    device.store.prove()

    for _ in range(MAX_STARTS + 2):
        assert device.open().ready() == held


def test_an_altered_file_is_repaired_from_an_equal_one(device: Device) -> None:
    first = device.install("r1")
    device.install("r2")  # shares its tokenizer with r1
    damaged = device.folder / "bundles" / "r2" / "tokenizer.json"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b" ")
    store = device.open()

    held = store.ready()

    assert held is not None
    assert held.release == "r2"
    assert damaged.read_bytes() == (Path(first.bundle) / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("harm", ["bit", "missing", "extra", "hard link", "time set back"])
def test_an_altered_model_gives_way_and_is_fetched_again(
    device: Device, harm: str, tmp_path: Path
) -> None:
    first = device.install("r1")
    held = device.install("r2")
    store = device.open()
    assert store.ready() == held  # hashed once, and remembered
    graph = Path(held.bundle) / "model.onnx"
    good, seen = graph.read_bytes(), graph.stat()
    match harm:
        case "bit" | "time set back":
            graph.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
            if harm == "time set back":
                os.utime(graph, ns=(seen.st_atime_ns, seen.st_mtime_ns))
        case "missing":
            graph.unlink()
        case "extra":
            (graph.parent / "more").write_bytes(b"x")
        case "hard link":
            os.link(graph, tmp_path / "second-name")

    ready = store.ready()

    if harm == "extra":  # all signed bytes are there, so the folder is made anew
        assert ready == held
        assert not (graph.parent / "more").exists()
        return
    assert ready == first
    missing = device.store.missing(offer(device.publisher, "r2"), now=_now())
    assert missing == ("tiny/r2/model.onnx",)
    device.store = store
    assert device.install("r2").release == "r2"
    assert graph.read_bytes() == good


def test_an_altered_only_model_is_named(device: Device) -> None:
    held = device.install("r1")
    (Path(held.bundle) / "model.onnx").write_bytes(b"x")

    with pytest.raises(DigestError, match=r"tiny/r1/model\.onnx was altered or lost on this disk"):
        device.open().ready()


def test_a_withdrawn_release_is_neither_loaded_nor_returned_to(device: Device) -> None:
    device.install("r1")
    device.install("r2")
    device.publisher.withdraw("tiny", "a1")
    device.publisher.withdraw("tiny", "r1")
    wanted = offer(device.publisher, "r2")
    device.store.missing(wanted, now=_now())

    store = device.open()
    store.roll_back()
    with pytest.raises(TrustError, match="release r1 was withdrawn"):
        store.ready()


def test_an_operator_that_is_not_on_the_list_stops_an_install(device: Device) -> None:
    strict = ModelStore(
        device.folder.with_name("strict"),
        root=device.publisher.root(),
        probe=_no_probe,
        operators=frozenset({"Add"}),
    )
    device.store = strict

    with pytest.raises(TrustError, match="not on this device's list"):
        device.install("r1")
    assert strict.current is None


# --- the trial ------------------------------------------------------------------------------------


def test_other_answers_than_at_the_export_fail_the_trial(device: Device) -> None:
    held = device.install("r1")
    golden = Path(held.bundle) / GOLDEN_FILE
    other = Path(device.install("r2").bundle) / GOLDEN_FILE
    data = golden.read_bytes()

    golden.write_bytes(other.read_bytes())
    with pytest.raises(RuntimeFailure, match="from those of its export; allowed"):
        child_probe(timeout_s=60)(held)
    golden.write_bytes(b"{}")
    with pytest.raises(RuntimeFailure, match=r"golden\.json is malformed"):
        child_probe(timeout_s=60)(held)
    golden.unlink()  # a bundle made before there were golden answers
    child_probe(timeout_s=60)(held)
    golden.write_bytes(data)
    child_probe(timeout_s=60)(held)


def test_a_graph_that_wants_more_memory_than_there_is_harms_only_its_trial(
    device: Device,
) -> None:
    import onnx

    held = device.install("r1")
    path = Path(held.bundle) / "model.onnx"
    graph = onnx.load(str(path), load_external_data=False)
    size = onnx.numpy_helper.from_array(np.array([6 * 2**30], np.int64), "huge.size")
    graph.graph.initializer.append(size)
    nodes = [
        onnx.helper.make_node("ConstantOfShape", ["huge.size"], ["huge"]),  # 24 GiB of zeros
        onnx.helper.make_node("ReduceSum", ["huge"], ["huge.sum"], keepdims=0),
        onnx.helper.make_node("Add", ["logits.small", "huge.sum"], ["logits"]),
    ]
    for node in graph.graph.node:
        node.output[:] = ["logits.small" if o == "logits" else o for o in node.output]
    graph.graph.node.extend(nodes)
    onnx.save(graph, str(path))

    check_bundle(Path(held.bundle))  # nothing is wrong with its form
    started = time.monotonic()
    with pytest.raises(RuntimeFailure, match="failed its trial"):
        child_probe(timeout_s=60)(held)
    assert time.monotonic() - started < 30


def test_an_answer_in_another_process_undoes_no_later_install(device: Device) -> None:
    device.install("r1")
    asking = device.open()
    asking.ready()
    held = device.install("r2")

    asking.prove()

    assert device.open().current == held
    assert asking.current == held
    assert not device.open().proven
