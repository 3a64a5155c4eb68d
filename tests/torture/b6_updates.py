"""B6: attacks on model updates, one function each, against the device's own store and fetcher.

Knows how to forge metadata, with stolen keys where the attack has some. Does not know messages: an
offer reaches the store as it would from the mailbox. Each attack says which error it must meet, and
the store is looked at afterwards: nothing installed, nothing written outside its folder.

Source: The Update Framework specification 1.0, section 1.5.2 (list of attacks), and Uptane's
attacks on assignments.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import DelegatedRole, Metadata, MetaFile, TargetFile
from tuf.api.serialization.json import JSONSerializer

from edge_sdk.errors import DigestError, FleetError, RollbackError, SignatureError, TrustError
from edge_sdk.models import ModelStore
from edge_sdk.wire.manifest import (
    MANIFEST_FILE,
    FileEntry,
    ReleaseManifest,
    director_path,
    encode_manifest,
)
from edge_sdk.wire.messages import OfferModel
from exporters.publisher import KeyPlan, Publisher
from tests.torture.result import Result, Scale, say

NOW = datetime(2026, 11, 1, tzinfo=UTC)
Meta = dict[str, bytes]

GRAPH = b"\x08\x08\x3a\x03\x12\x01g"
"""The smallest model: ir_version 8 and a graph without nodes named g."""


class World:
    """An owner with the releases r1 (for everyone), r2 (for d2 alone) and r3 (for nobody)."""

    def __init__(self, folder: Path, **plans: KeyPlan) -> None:
        self.folder, self.now = folder, NOW
        self.publisher = Publisher(folder / "owner", lambda: self.now)
        self.publisher.init(plans)
        self.files: dict[str, bytes] = {}
        for release in ("r1", "r2", "r3"):
            self.publish(release, everyone=release == "r1")
        self.publisher.assign("tiny", ["r1"], {"d2": ["r2"]})
        self.root = self.publisher.root()
        self.store = self.open("d1")

    def publish(self, release: str, *, everyone: bool = True) -> None:
        folder = self.folder / "made" / release
        folder.mkdir(parents=True)
        graph = GRAPH + b"\x32" + bytes([len(release)]) + release.encode()  # a doc string
        (folder / "model.onnx").write_bytes(graph)
        entry = FileEntry(hashlib.sha256(graph).hexdigest(), len(graph))
        manifest = ReleaseManifest(
            "tiny", release, "decoder", "none", "none", 8, "0" * 64, {"model.onnx": entry}
        )
        (folder / MANIFEST_FILE).write_bytes(encode_manifest(manifest))
        self.publisher.publish("tiny", release, folder, everyone=everyone)
        for name in ("model.onnx", MANIFEST_FILE):
            self.files[f"tiny/{release}/{name}"] = (folder / name).read_bytes()

    def open(self, device: str) -> ModelStore:
        return ModelStore(
            self.folder / "devices" / device,
            root=self.root,
            probe=lambda held: None,
            device=device,
        )

    # --- the device's side ------------------------------------------------------------------

    def install(
        self,
        metadata: Meta | None = None,
        release: str = "r1",
        *,
        files: dict[str, bytes] | None = None,
        targets: tuple[str, ...] | None = None,
        store: ModelStore | None = None,
    ) -> None:
        """Offer a release to the device, send what it asks for, and have it installed."""
        store = store or self.store
        wanted = targets or (f"tiny/{release}/{MANIFEST_FILE}", f"tiny/{release}/model.onnx")
        metadata = self.publisher.metadata() if metadata is None else metadata
        offer = OfferModel("offer", "tiny", release, metadata, wanted)
        for path in store.missing(offer, now=self.now):
            store.put(path, {**self.files, **(files or {})}[path])
        store.install(offer, now=self.now)

    @contextmanager
    def refused(self, *kinds: type[FleetError], by: ModelStore | None = None) -> Iterator[None]:
        """What happens within must raise one of `kinds` and leave the model that runs."""
        store = by or self.store
        before, outside = store.current, _outside(self.folder)
        try:
            yield
        except FleetError as exc:
            if not isinstance(exc, kinds):
                raise Accepted(f"met {type(exc).__name__} ({exc}), not {kinds}") from exc
        else:
            raise Accepted("nothing was raised")
        if store.current != before or _outside(self.folder) != outside:
            raise Accepted("the error came, and something had changed")

    # --- the attacker's side ----------------------------------------------------------------

    def signers(self, role: str) -> list[CryptoSigner]:
        return [signer for _, signer in self.publisher._key_files(role)]

    def forge(
        self,
        metadata: Meta,
        role: str,
        change: Callable[[Any], object] = lambda signed: None,
        *,
        by: list[CryptoSigner] | None = None,
        name: str = "",
        ahead: int = 1,
    ) -> Meta:
        """Return `metadata` with the next version of `role`, changed and signed by `by`."""
        found = newest(metadata, role)
        parsed: Metadata[Any] = Metadata.from_bytes(metadata[found])
        parsed.signed.version += ahead
        change(parsed.signed)
        parsed.signatures.clear()
        for signer in self.signers(role) if by is None else by:
            parsed.sign(signer, append=True)
        data = parsed.to_bytes(JSONSerializer(compact=True))
        plain = "timestamp.json" if role == "timestamp" else f"{parsed.signed.version}.{role}.json"
        return {**metadata, name or plain: data}

    def above(self, metadata: Meta, *roles: str) -> Meta:
        """`metadata` with a snapshot and a timestamp that name the newest of `roles`."""
        versions = {f"{role}.json": MetaFile(version(metadata, role)) for role in roles}

        def name_them(signed: Any) -> None:
            signed.meta = {**signed.meta, **versions}

        metadata = self.forge(metadata, "snapshot", name_them)

        def point(signed: Any) -> None:
            signed.snapshot_meta = MetaFile(version(metadata, "snapshot"))

        return self.forge(metadata, "timestamp", point)


class Accepted(AssertionError):  # noqa: N818 - what happened, not a fault of ours
    """The attack was not refused as it must be."""


def newest(metadata: Meta, role: str) -> str:
    if role == "timestamp":
        return "timestamp.json"
    names = [name for name in metadata if name.endswith(f".{role}.json")]
    return max(names, key=lambda name: int(name.split(".")[0]))


def version(metadata: Meta, role: str) -> int:
    return int(json.loads(metadata[newest(metadata, role)])["signed"]["version"])


def only(metadata: Meta, role: str) -> dict[str, bytes]:
    """The files of one role."""
    return {k: v for k, v in metadata.items() if k.endswith(f"{role}.json")}


def _outside(folder: Path) -> set[str]:
    devices = folder / "devices"
    return {str(path) for path in folder.rglob("*") if not path.is_relative_to(devices)}


# --- the attacks ----------------------------------------------------------------------------------


def arbitrary_software(w: World) -> None:
    with w.refused(DigestError):
        w.install(files={"tiny/r1/model.onnx": GRAPH + b"\x32\x02xx"})


def a_file_nobody_signed(w: World) -> None:
    with w.refused(TrustError):
        w.install(targets=(f"tiny/r1/{MANIFEST_FILE}", "tiny/r1/model.onnx", "tiny/r1/extra"))


def wrong_keys(w: World) -> None:
    stranger = World(w.folder / "stranger")
    with w.refused(SignatureError):
        w.install(stranger.publisher.metadata())


def hash_mismatch_of_equal_length(w: World) -> None:
    bent = bytearray(w.files["tiny/r1/model.onnx"])
    bent[-1] ^= 1
    with w.refused(DigestError):
        w.install(files={"tiny/r1/model.onnx": bytes(bent)})


def length_mismatch(w: World) -> None:
    def longer(signed: Any) -> None:
        signed.targets["tiny/r1/model.onnx"].length += 1

    metadata = w.above(w.forge(w.publisher.metadata(), "targets", longer), "targets")
    with w.refused(DigestError):
        w.install(metadata)


def rollback_of_timestamp(w: World) -> None:
    old = w.publisher.metadata()
    w.publish("r4")
    w.install()
    with w.refused(RollbackError):
        w.install({**w.publisher.metadata(), "timestamp.json": old["timestamp.json"]})


def rollback_of_snapshot(w: World) -> None:
    old = w.publisher.metadata()
    w.publish("r4")
    w.install()
    metadata = {**w.publisher.metadata(), **only(old, "snapshot")}

    def point(signed: Any) -> None:
        signed.snapshot_meta = MetaFile(version(old, "snapshot"))

    with w.refused(RollbackError):
        w.install(w.forge(metadata, "timestamp", point))


def _older(w: World, role: str) -> Meta:
    """Metadata whose snapshot, signed with stolen keys, names an earlier version of `role`."""
    old = w.publisher.metadata()
    w.publish("r4")
    w.install()
    metadata = {k: v for k, v in w.publisher.metadata().items() if not k.endswith(f".{role}.json")}
    return w.above({**metadata, **only(old, role)}, role)


def rollback_of_targets(w: World) -> None:
    metadata = _older(w, "targets")
    with w.refused(RollbackError):
        w.install(metadata)


def rollback_of_assignments(w: World) -> None:
    metadata = _older(w, "director")
    with w.refused(RollbackError):
        w.install(metadata)


def rollback_of_root(w: World) -> None:
    w.publisher.rotate("root")
    metadata = w.publisher.metadata()
    with w.refused(RollbackError):
        w.install({**metadata, "2.root.json": metadata["1.root.json"]})


def a_missing_root_version(w: World) -> None:
    w.publisher.rotate("timestamp")
    w.publisher.rotate("timestamp")
    metadata = w.publisher.metadata()
    del metadata["2.root.json"]
    with w.refused(SignatureError):
        w.install(metadata)


def a_root_that_jumps_ahead(w: World) -> None:
    metadata = w.forge(w.publisher.metadata(), "root", ahead=2, name="2.root.json")
    with w.refused(RollbackError):
        w.install(metadata)


def a_root_not_signed_by_the_old_keys(w: World) -> None:
    thief = CryptoSigner.generate_ed25519()

    def take_over(signed: Any) -> None:
        for keyid in list(signed.roles["root"].keyids):
            signed.revoke_key(keyid, "root")
        signed.add_key(thief.public_key, "root")

    metadata = w.forge(w.publisher.metadata(), "root", take_over, by=[thief])
    with w.refused(SignatureError):
        w.install(metadata)


def _two_of_three(w: World) -> World:
    return World(w.folder / "careful", root=KeyPlan(3, 2), targets=KeyPlan(3, 2))


def threshold_of_root_not_met(w: World) -> None:
    careful = _two_of_three(w)
    metadata = careful.publisher.metadata()
    with careful.refused(SignatureError):
        careful.install(careful.forge(metadata, "root", by=careful.signers("root")[:1]))
    careful.install(careful.forge(metadata, "root", by=careful.signers("root")[:2]))


def threshold_of_targets_not_met(w: World) -> None:
    careful = _two_of_three(w)
    one = careful.signers("targets")[:1]
    metadata = careful.forge(careful.publisher.metadata(), "targets", by=one)
    with careful.refused(SignatureError):
        careful.install(careful.above(metadata, "targets"))


def one_key_signing_twice(w: World) -> None:
    careful = _two_of_three(w)
    one = careful.signers("targets")[:1]
    metadata = careful.forge(careful.publisher.metadata(), "targets", by=one)
    name = newest(metadata, "targets")
    parsed = json.loads(metadata[name])
    parsed["signatures"] *= 2
    metadata = careful.above({**metadata, name: json.dumps(parsed).encode()}, "targets")
    with careful.refused(TrustError):
        careful.install(metadata)


def indefinite_freeze(w: World) -> None:
    frozen = w.publisher.metadata()
    w.now += timedelta(days=8)
    with w.refused(TrustError):
        w.install(frozen)


def freeze_with_a_stolen_timestamp_key(w: World) -> None:
    frozen = w.publisher.metadata()
    w.now += timedelta(days=31)

    def renew(signed: Any) -> None:
        signed.expires = w.now + timedelta(days=7)

    with w.refused(TrustError):
        w.install(w.forge(frozen, "timestamp", renew))


def an_expired_root(w: World) -> None:
    w.now += timedelta(days=370)

    def renew(signed: Any) -> None:
        signed.expires = w.now + timedelta(days=7)

    metadata = w.publisher.metadata()
    del metadata["2.root.json"]  # the owner renewed it; the attacker withholds that
    with w.refused(TrustError):
        w.install(metadata)


def fast_forward_of_timestamp(w: World) -> None:
    w.install(w.forge(w.publisher.metadata(), "timestamp", ahead=10**9))
    w.publish("r4")
    with w.refused(RollbackError):
        w.install()
    w.publisher.rotate("timestamp")
    w.install()


def fast_forward_of_snapshot(w: World) -> None:
    def point(signed: Any) -> None:
        signed.snapshot_meta = MetaFile(version(metadata, "snapshot"))

    metadata = w.forge(w.publisher.metadata(), "snapshot", ahead=10**9)
    w.install(w.forge(metadata, "timestamp", point))
    w.publish("r4")
    w.publish("r5")
    with w.refused(RollbackError):
        w.install()
    w.publisher.rotate("snapshot")
    w.publisher.rotate("timestamp")
    w.install()


def endless_timestamp(w: World) -> None:
    with w.refused(DigestError):
        w.install({**w.publisher.metadata(), "timestamp.json": b" " * (1 << 20)})


def endless_root(w: World) -> None:
    with w.refused(DigestError):
        w.install({**w.publisher.metadata(), "2.root.json": b" " * (1 << 20)})


def endless_target(w: World) -> None:
    with w.refused(DigestError):
        w.install(files={"tiny/r1/model.onnx": w.files["tiny/r1/model.onnx"] + bytes(1 << 22)})


def slow_retrieval(w: World) -> None:
    """A pipe that never gives a byte lies where a received file should be."""
    incoming = w.folder / "devices" / "d1" / "incoming"
    os.mkfifo(incoming / hashlib.sha256(b"tiny/r1/model.onnx").hexdigest())
    offer = OfferModel(
        "offer",
        "tiny",
        "r1",
        w.publisher.metadata(),
        ("tiny/r1/symbiont.json", "tiny/r1/model.onnx"),
    )
    if "tiny/r1/model.onnx" not in w.store.missing(offer, now=w.now):
        raise Accepted("the pipe was taken for the file")
    with w.refused(TrustError):
        w.store.install(offer, now=w.now)


def extraneous_metadata(w: World) -> None:
    extra = {"9.other.json": b"{}", "root.json": b"{}", "../../x.json": b"{}", "": b""}
    w.install({**w.publisher.metadata(), **extra})
    names = {path.name for path in (w.folder / "devices" / "d1").rglob("*")}
    if names & {"other.json", "9.other.json", "x.json"}:
        raise Accepted("extra metadata was kept")


def extraneous_files_beside_a_release(w: World) -> None:
    w.install()
    assert w.store.current is not None
    (Path(w.store.current.bundle) / "extra.so").write_bytes(b"code")
    held = w.store.ready()
    if held is None or (Path(held.bundle) / "extra.so").exists():
        raise Accepted("an extra file was left beside the model")


def mix_and_match(w: World) -> None:
    """The newest timestamp and snapshot, with the targets of an earlier state under their name."""
    old = w.publisher.metadata()
    w.publish("r4")
    metadata = w.publisher.metadata()
    metadata[newest(metadata, "targets")] = old[newest(old, "targets")]
    with w.refused(RollbackError):
        w.install(metadata)


def mix_and_match_of_snapshot(w: World) -> None:
    old = w.publisher.metadata()
    w.publish("r4")
    metadata = w.publisher.metadata()
    metadata[newest(metadata, "snapshot")] = old[newest(old, "snapshot")]
    with w.refused(RollbackError):
        w.install(metadata)


def a_role_under_anothers_name(w: World) -> None:
    metadata = w.publisher.metadata()
    metadata[newest(metadata, "targets")] = metadata[newest(metadata, "snapshot")]
    with w.refused(TrustError):
        w.install(metadata)


def a_revoked_key(w: World) -> None:
    stolen = w.signers("targets")
    w.publisher.rotate("targets")
    w.install()
    metadata = w.forge(w.publisher.metadata(), "targets", by=stolen)
    with w.refused(SignatureError):
        w.install(w.above(metadata, "targets"))


def online_keys_sign_no_software(w: World) -> None:
    """Whoever holds snapshot, timestamp and director names a model of their own."""
    evil = b"evil"

    def add(signed: Any) -> None:
        for name in (MANIFEST_FILE, "model.onnx"):
            path = f"tiny/evil/{name}"
            signed.targets[path] = TargetFile.from_data(path, evil, ["sha256"])

    metadata = w.above(w.forge(w.publisher.metadata(), "director", add), "director")
    with w.refused(TrustError):
        w.install(metadata, "evil", files={f"tiny/evil/{n}": evil for n in ("model.onnx",)})


def a_director_naming_unsigned_bytes(w: World) -> None:
    path = director_path("tiny", "r1")

    def bend(signed: Any) -> None:
        signed.targets[path] = TargetFile.from_data(path, b"other", ["sha256"])

    metadata = w.above(w.forge(w.publisher.metadata(), "director", bend), "director")
    with w.refused(TrustError):
        w.install(metadata)


def another_devices_assignment(w: World) -> None:
    other = w.open("d2")
    w.install(release="r2", store=other)
    with w.refused(TrustError):
        w.install(release="r2")


def an_unassigned_release(w: World) -> None:
    with w.refused(TrustError):
        w.install(release="r3")


def a_director_with_a_strangers_key(w: World) -> None:
    thief = CryptoSigner.generate_ed25519()
    path = director_path("tiny", "r3")

    def assign(signed: Any) -> None:
        entry = json.loads(metadata[newest(metadata, "targets")])["signed"]["targets"]
        manifest = entry[f"tiny/r3/{MANIFEST_FILE}"]
        signed.targets[path] = TargetFile(manifest["length"], manifest["hashes"], path)

    metadata = w.publisher.metadata()
    metadata = w.above(w.forge(metadata, "director", assign, by=[thief]), "director")
    with w.refused(SignatureError):
        w.install(metadata, "r3")


def a_withdrawn_release(w: World) -> None:
    before = w.publisher.metadata()
    w.install()
    w.publisher.withdraw("tiny", "r1")
    with w.refused(TrustError):
        w.install()
    with w.refused(RollbackError):
        w.install({**before, "timestamp.json": before["timestamp.json"]})


def going_back_without_a_statement(w: World) -> None:
    """An old offer of an earlier release comes again, after the owner moved on."""
    w.publisher.assign("tiny", ["r1", "r2"])
    old = w.publisher.metadata()
    w.publisher.assign("tiny", ["r2"])
    w.install(release="r2")
    with w.refused(RollbackError):
        w.install(old, "r1")
    with w.refused(TrustError):
        w.install(release="r1")
    w.publisher.assign("tiny", ["r1"])  # the signed statement
    w.install(release="r1")


def fishy_target_names(w: World) -> None:
    for path in (
        *("tiny/r1/../../x", "/etc/passwd", "tiny/r1/..", "tiny/../tiny/model.onnx", "tiny//x"),
        *("tiny/r1/.hidden", "tiny/r1/a\\b", "tiny/r1/a\0b", "C:/r1/x", "tiny/r1/" + "a" * 200),
        *("~/r1/x", "tiny/r1/a b", "tiny/r1/%2e%2e", "tiny/r1/\u202ex", "director/x/y"),
    ):
        with w.refused(TrustError):
            w.install(targets=(path,))


def fishy_role_names(w: World) -> None:
    """The owner's targets delegate to roles whose names try to leave the trust folder."""
    for role in ("../../escape", "/tmp/escape", ".", "a/b", "%2e%2e%2fescape", "root", "targets"):
        key = w.signers("targets")[0]

        def delegate(signed: Any, role: str = role, key: CryptoSigner = key) -> None:
            roles = {
                role: DelegatedRole(
                    role, [key.public_key.keyid], 1, False, paths=["director/*/*/*"]
                )
            }
            signed.delegations.keys = {key.public_key.keyid: key.public_key}
            signed.delegations.roles = roles

        metadata = w.publisher.metadata()
        try:
            bent = w.above(w.forge(metadata, "targets", delegate), "targets")
        except ValueError:
            continue  # not even the library will write it
        with w.refused(FleetError):
            w.install(bent, "r3")
    escaped = [path for path in w.folder.rglob("*escape*") if path.parent.name != "trust"]
    if escaped or Path("/tmp/escape.json").exists():
        raise Accepted(f"a file was written as {escaped or '/tmp/escape.json'}")


def incomplete_metadata(w: World) -> None:
    metadata = w.publisher.metadata()
    for role in ("timestamp", "snapshot", "targets", "director"):
        lacking = {k: v for k, v in metadata.items() if not k.endswith(f"{role}.json")}
        fresh = w.open(f"without-{role}")
        with w.refused(TrustError, by=fresh):
            w.install(lacking, store=fresh)


def malformed_metadata(w: World) -> None:
    metadata = w.publisher.metadata()
    for role in ("timestamp", "snapshot", "targets", "director"):
        for bad in (b"", b"{}", b"[" * 50_000, b"\xff" * 100, b'{"signed":{"_type":"root"}}'):
            fresh = w.open(f"bad-{role}-{len(bad)}")
            with w.refused(TrustError, by=fresh):
                w.install({**metadata, newest(metadata, role): bad}, store=fresh)


ATTACKS: tuple[Callable[[World], None], ...] = (
    arbitrary_software,
    a_file_nobody_signed,
    wrong_keys,
    hash_mismatch_of_equal_length,
    length_mismatch,
    rollback_of_timestamp,
    rollback_of_snapshot,
    rollback_of_targets,
    rollback_of_assignments,
    rollback_of_root,
    a_missing_root_version,
    a_root_that_jumps_ahead,
    a_root_not_signed_by_the_old_keys,
    threshold_of_root_not_met,
    threshold_of_targets_not_met,
    one_key_signing_twice,
    indefinite_freeze,
    freeze_with_a_stolen_timestamp_key,
    an_expired_root,
    fast_forward_of_timestamp,
    fast_forward_of_snapshot,
    endless_timestamp,
    endless_root,
    endless_target,
    slow_retrieval,
    extraneous_metadata,
    extraneous_files_beside_a_release,
    mix_and_match,
    mix_and_match_of_snapshot,
    a_role_under_anothers_name,
    a_revoked_key,
    online_keys_sign_no_software,
    a_director_naming_unsigned_bytes,
    another_devices_assignment,
    an_unassigned_release,
    a_director_with_a_strangers_key,
    a_withdrawn_release,
    going_back_without_a_statement,
    fishy_target_names,
    fishy_role_names,
    incomplete_metadata,
    malformed_metadata,
)


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Run every attack; there is no shorter form, since all take seconds."""
    outcomes: dict[str, object] = {}
    for attack in ATTACKS:
        name = attack.__name__
        place = folder / name
        place.mkdir(parents=True)
        try:
            attack(World(place))
            outcomes[name] = "refused"
        except Accepted as exc:
            outcomes[name] = f"ACCEPTED: {exc}".replace(str(folder), "FOLDER")
            say("B6", f"{name}: {outcomes[name]}")
    control = World(folder / "control")
    control.install()  # the same flow without an attack goes through
    accepted = sum(outcome != "refused" for outcome in outcomes.values())
    say("B6", f"{len(outcomes)} attacks, {accepted} accepted")
    return Result(
        "B6",
        "attacks on model updates",
        accepted,
        f"accepted of {len(outcomes)} attacks",
        ">= 15 attacks, 0 accepted",
        accepted == 0 and len(outcomes) >= 15 and control.store.current is not None,
        notes=outcomes,
    )
