"""B5: models that try to read outside their folder, to load code, or to be loaded unsigned.

Knows how such a model or folder is made, and watches a secret outside with inotify: an open counts
as a read, since weights may be mapped. Each case goes both ways: *path*, the release on a device's
disk, and *bytes*, the model as a message brings it. A model that passes every check is then loaded
by ONNX Runtime, so that a missed case is seen to read.
"""

import ctypes
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from edge_sdk.errors import FleetError
from edge_sdk.graphs import check_graph
from edge_sdk.models import ModelStore
from edge_sdk.wire.manifest import MANIFEST_FILE, ReleaseManifest, encode_manifest
from edge_sdk.wire.messages import OfferModel
from exporters.bundle import file_entries
from exporters.publisher import Publisher
from tests.torture.result import Result, Scale, say

NOW = datetime(2026, 11, 1, tzinfo=UTC)
WEIGHTS = struct.pack("<16f", *range(16))
DATA_FILE = "model.onnx.data"


@dataclass(frozen=True)
class Case:
    """A hostile release: `files` are signed as they are; `tamper` acts on the installed folder."""

    name: str
    files: Callable[[Path], dict[str, bytes]]
    tamper: Callable[[Path, Path], object] = lambda bundle, secret: None
    data: Callable[[Path], bytes] = field(default=lambda secret: b"")
    """The bytes of the other way; by default the signed model."""


def model(
    *,
    location: str = "",
    offset: int = 0,
    op: tuple[str, str] = ("", "MatMul"),
    opset: int = 21,
    attributes: dict[str, Any] | None = None,
    keys: dict[str, str] | None = None,
    properties: dict[str, str] | None = None,
) -> bytes:
    """Y = X op W, the weights inside, or outside at `location`."""
    weights = TensorProto(name="W", data_type=TensorProto.FLOAT, dims=[4, 4])
    if location:
        weights.data_location = TensorProto.EXTERNAL
        pairs = {"location": location, "offset": str(offset), "length": str(len(WEIGHTS))}
        for key, value in {**pairs, **(keys or {})}.items():
            weights.external_data.add(key=key, value=value)
    else:
        weights.raw_data = WEIGHTS
    domain, name = op
    node = helper.make_node(name, ["X", "W"], ["Y"], domain=domain, **(attributes or {}))
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [1, 4])],
        [weights],
    )
    opsets = [helper.make_opsetid("", opset)]
    if domain:
        opsets.append(helper.make_opsetid(domain, 1))
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    for key, value in (properties or {}).items():
        made.metadata_props.add(key=key, value=value)
    return bytes(made.SerializeToString())


def _good(secret: Path) -> dict[str, bytes]:
    return {"model.onnx": model(location=DATA_FILE), DATA_FILE: WEIGHTS}


def _only(**settings: Any) -> Callable[[Path], dict[str, bytes]]:
    return lambda secret: {"model.onnx": model(**settings), DATA_FILE: WEIGHTS}


def _config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], dict[str, bytes]]:
    def files(secret: Path) -> dict[str, bytes]:
        session: dict[str, Any] = {"provider_options": []}
        config = {"model": {"decoder": {"session_options": session, "filename": "model.onnx"}}}
        change(config["model"]["decoder"])
        return {**_good(secret), "genai_config.json": json.dumps(config).encode()}

    return files


def _replaced(by: Callable[[Path, Path], object]) -> Callable[[Path, Path], object]:
    def tamper(bundle: Path, secret: Path) -> None:
        (bundle / DATA_FILE).unlink()
        by(secret, bundle / DATA_FILE)

    return tamper


def _folder_link(bundle: Path, secret: Path) -> None:
    elsewhere = secret.parent / "elsewhere"
    bundle.rename(elsewhere)
    (elsewhere / DATA_FILE).unlink()
    os.link(secret, elsewhere / DATA_FILE)
    bundle.symlink_to(elsewhere)


def _nested(secret: Path) -> dict[str, bytes]:
    """The outside weights hide in a Constant inside an If's branch."""
    tensor = TensorProto(name="c", data_type=TensorProto.FLOAT, dims=[16])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../" * 12 + str(secret)[1:])
    out = helper.make_tensor_value_info("o", TensorProto.FLOAT, [16])
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["o"], value=tensor)], "b", [], [out]
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["Y"], then_branch=branch, else_branch=branch)],
        "g",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [16])],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return {"model.onnx": made.SerializeToString()}


CASES = (
    Case("weights in ../", lambda s: _only(location=f"../{s.name}")(s)),
    Case("weights at an absolute path", lambda s: _only(location=str(s))(s)),
    Case("weights in a subfolder's ..", lambda s: _only(location=f"x/../../{s.name}")(s)),
    Case("outside weights in a branch", _nested),
    Case("symlink for the weights", _good, _replaced(lambda s, at: at.symlink_to(s))),
    Case("hard link for the weights", _good, _replaced(lambda s, at: os.link(s, at))),
    Case("the release folder is a link", _good, _folder_link),
    Case("weights that are not there", _only(location="absent.bin")),
    Case("weights beyond the file's end", _only(location=DATA_FILE, offset=8)),
    Case("weights with an unknown key", _only(location=DATA_FILE, keys={"basepath": ".."})),
    Case("a custom operator", _only(op=("ai.evil", "Run"))),
    Case(
        "an operator that reads a file by name",
        lambda s: _only(
            op=("com.microsoft", "EPContext"),
            attributes={"ep_cache_context": str(s), "embed_mode": 0},
        )(s),
    ),
    Case("a library of custom operators", _config(
        lambda d: d["session_options"].update(custom_ops_library="evil.so")
    ), data=lambda s: model(properties={"ort_config": "{}"})),
    Case("a graph named outside", _config(lambda d: d.update(filename="../model.onnx")),
         data=lambda s: model(location="../x")),
    Case("an operator set from the future", _only(opset=99)),
    Case(
        "other bytes than the signed",
        _good,
        lambda bundle, s: (bundle / "model.onnx").write_bytes(model()),
        lambda s: model(),
    ),
)  # fmt: skip


class Watch:
    """Counts how often a file is opened, under whichever name."""

    def __init__(self, path: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._handle = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        opened = 0x20
        if self._handle < 0 or libc.inotify_add_watch(self._handle, bytes(path), opened) < 0:
            raise OSError(ctypes.get_errno(), "inotify cannot watch")

    def count(self) -> int:
        """Opens since the last call."""
        try:
            return len(os.read(self._handle, 65_536)) // 16
        except BlockingIOError:
            return 0

    def close(self) -> None:
        os.close(self._handle)


class Trial:
    """One case on one device, with a secret outside its folder."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        folder.mkdir(parents=True)
        self.secret = folder / "secret.bin"
        self.secret.write_bytes(WEIGHTS)
        made = folder / "made"
        made.mkdir()
        self.files = case.files(self.secret)
        for name, data in self.files.items():
            (made / name).write_bytes(data)
        manifest = ReleaseManifest(
            "tiny", "r1", "decoder", "none", "none", 8, "0" * 64, file_entries(made)
        )
        (made / MANIFEST_FILE).write_bytes(encode_manifest(manifest))
        self.publisher = Publisher(folder / "owner", lambda: NOW)
        self.publisher.init()
        self.targets = self.publisher.publish("tiny", "r1", made)
        self.store = ModelStore(
            folder / "device", root=self.publisher.root(), probe=lambda held: None
        )
        self.watch = Watch(self.secret)
        self.said = ""

    def by_path(self) -> bool:
        """Install, tamper, and open what is ready; True if it was loaded other than signed."""
        offer = OfferModel("o", "tiny", "r1", self.publisher.metadata(), self.targets)
        try:
            for path in self.store.missing(offer, now=NOW):
                self.store.put(path, self.publisher.read(path))
            held = self.store.install(offer, now=NOW)
            self.case.tamper(Path(held.bundle), self.secret)
            self.watch.count()  # the tampering itself may have opened it
            ready = self.store.ready()
        except FleetError as exc:
            self.said = str(exc)
            return False
        assert ready is not None
        same = all(
            (Path(ready.bundle) / name).read_bytes() == data for name, data in self.files.items()
        )
        bundle = Path(ready.bundle)
        links = [
            bundle.is_symlink(),
            *(p.is_symlink() or p.stat().st_nlink > 1 for p in bundle.iterdir()),
        ]
        plain = not any(links)
        return _loads(str(Path(ready.bundle) / "model.onnx")) and not (same and plain)

    def by_bytes(self) -> bool:
        """The bytes as a message brings them: judged alone, then offered instead of the signed."""
        data = self.case.data(self.secret) or self.files["model.onnx"]
        os.chdir(self.folder)  # where ONNX Runtime would look for weights of a model in memory
        try:
            check_graph(data)
        except FleetError:
            return False
        offer = OfferModel("o", "tiny", "r1", self.publisher.metadata(), self.targets)
        fresh = ModelStore(
            self.folder / "other", root=self.publisher.root(), probe=lambda held: None
        )
        try:
            for path in fresh.missing(offer, now=NOW):
                fresh.put(path, data if path.endswith(".onnx") else self.publisher.read(path))
            fresh.install(offer, now=NOW)
        except FleetError:
            return False
        return _loads(data)


def _loads(source: str | bytes) -> bool:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception:  # its classes are not exported; any of them means it was not loaded
        return False
    return True


def bare_runtime_follows(folder: Path) -> bool:
    """Whether ONNX Runtime alone, without our checks, reads a hard link's outside file."""
    folder.mkdir(parents=True)
    secret = folder / "secret.bin"
    secret.write_bytes(WEIGHTS)
    bundle = folder / "bundle"
    bundle.mkdir()
    (bundle / "model.onnx").write_bytes(model(location=DATA_FILE))
    os.link(secret, bundle / DATA_FILE)
    watch = Watch(secret)
    try:
        return _loads(str(bundle / "model.onnx")) and watch.count() > 0
    finally:
        watch.close()


def trial(case: Case, folder: Path) -> dict[str, int]:
    """Run one case both ways; return reads outside and loads of what was not signed."""
    here = os.getcwd()
    tried = Trial(case, folder)
    try:
        path_load = tried.by_path()
        path_reads = tried.watch.count()
        bytes_load = tried.by_bytes()
        bytes_reads = tried.watch.count()
    finally:
        os.chdir(here)
        tried.watch.close()
    return {"reads": path_reads + bytes_reads, "unsigned_loads": path_load + bytes_load}


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Run every case both ways; there is no shorter form."""
    found = {case.name: trial(case, folder / str(i)) for i, case in enumerate(CASES)}
    reads = sum(outcome["reads"] for outcome in found.values())
    loads = sum(outcome["unsigned_loads"] for outcome in found.values())
    control = Trial(Case("control", _good), folder / "control")
    works = not control.by_path() and control.store.current is not None
    works = works and _loads(str(Path(control.store.current.bundle) / "model.onnx"))
    control.watch.close()
    follows = bare_runtime_follows(folder / "bare")
    say("B5", f"{len(CASES)} cases both ways: {reads} reads outside, {loads} unsigned loads")
    notes: dict[str, object] = {
        "cases": len(CASES) * 2,
        "worst": [name for name, outcome in found.items() if any(outcome.values())],
        "a good model installs and loads": works,
        "onnxruntime alone follows a hard link": follows,
        "onnx": onnx.__version__,
    }
    return Result(
        "B5",
        "hostile ONNX",
        {"reads_outside": reads, "unsigned_loads": loads},
        f"in {len(CASES)} cases x (path, bytes)",
        "0 reads outside, 0 unsigned loads",
        reads == 0 and loads == 0 and works and len(CASES) >= 12,
        notes=notes,
    )
