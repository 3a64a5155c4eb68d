"""B4: small inputs that would become large: refused at once, without the memory they ask for.

Knows twenty and more ways to lie about sizes, and how to measure the memory of one call. Does not
know how each parser defends itself; `parsers.py` lists parsers and the errors they may raise.
"""

import json
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from edge_sdk.wire import seal as seal_module
from edge_sdk.wire.header import CHUNK_BYTES
from tests.torture.parsers import STREAM, Parser, outcome, parsers
from tests.torture.result import Result, Scale, say

LIMIT_S, LIMIT_MB = 1.0, 64.0
MIB = 2**20

Bomb = tuple[str, str, Callable[[], bytes]]


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Set off every bomb; there are few, so both scales run all."""
    accepted, crashes, slow, large = [], [], [], []
    slowest, most, count = 0.0, 0.0, 0
    for name, parser, make in bombs():
        count += 1
        result, seconds, grown_mb = set_off(parsers()[parser], make())
        if result == "taken":
            accepted.append(name)
        elif result.startswith("crash"):
            crashes.append(f"{name}: {result}")
        if seconds >= LIMIT_S:
            slow.append(f"{name}: {seconds:.2f} s")
        if grown_mb >= LIMIT_MB:
            large.append(f"{name}: {grown_mb:.0f} MB")
        slowest, most = max(slowest, seconds), max(most, grown_mb)
    say("B4", f"{count} bombs, slowest {slowest:.3f} s, most {most:.1f} MB")
    faults = accepted + crashes + slow + large
    return Result(
        "B4",
        "bombs",
        len(faults),
        f"not refused in time and memory, of {count}",
        f"20 files refused < {LIMIT_S:.0f} s, RSS growth < {LIMIT_MB:.0f} MB",
        not faults and count >= 20,
        notes={
            "slowest s of processor time": round(slowest, 3),
            "most MB of growth": round(most, 1),
            "accepted": accepted,
            "crashes": crashes,
            "slow": slow,
            "large": large,
        },
    )


def set_off(parser: Parser, data: bytes) -> tuple[str, float, float]:
    """Return the outcome, seconds of processor time and MB by which this process grew."""
    before = _reset_peak()
    began = time.thread_time()
    result = outcome(parser, data)
    seconds = time.thread_time() - began
    return result, seconds, max(0.0, _status("VmHWM") - before)


def _reset_peak() -> float:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark
    return _status("VmRSS")


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


# --- what lies about its size -----------------------------------------------------------------


def bombs() -> Iterator[Bomb]:
    """Yield (name, parser, bytes) of every bomb."""
    yield from _envelopes()
    yield from _messages()
    yield from _json()
    yield from _tensors()
    yield from _codecs()
    yield from _others()


def _envelopes() -> Iterator[Bomb]:
    honest = parsers()["header"].seeds[0]
    sizes = struct.Struct(">QII")  # plaintext, chunk size, chunks
    for name, values in {
        "header: 4 EiB of plaintext": (2**62, CHUNK_BYTES, 2**31),
        "header: four billion chunks": (1, CHUNK_BYTES, 2**32 - 1),
        "header: chunks of one byte": (2**29, 1, 2**29),
    }.items():
        head = honest[: -sizes.size] + sizes.pack(*values)
        yield name, "header", lambda head=head: head  # type: ignore[misc]
    largest = honest[: -sizes.size] + sizes.pack(2**29, CHUNK_BYTES, 8192)
    wrapped = struct.pack(">H", len(largest)) + largest
    yield "manifest: 8,192 hashes announced, none there", "manifest", lambda: wrapped + bytes(200)
    yield "manifest: beyond its limit", "manifest", lambda: wrapped + bytes(32 * MIB)
    hashes = seal_module.WRAP_BYTES[1] + 8192 * 32 + 64
    yield "manifest: all hashes, no signature", "manifest", lambda: wrapped + bytes(hashes)
    yield "frame: a bitmap of 32 MiB", "frame", lambda: b"\x02" + STREAM + b"\xff" * 32 * MIB
    yield "frame: a bitmap over the limit", "frame", lambda: b"\x02" + STREAM + b"\xff" * 2048
    chunk = struct.pack(">IB", 2**32 - 1, 1)
    yield "frame: chunk four billion", "frame", lambda: b"\x03" + STREAM + chunk + b"x"


def _message(kind: str, *fields: tuple[str, bytes]) -> bytes:
    """A message whose fields are given as raw MessagePack."""
    encode = msgspec.msgpack.encode
    body = b"".join(encode(name) + raw for name, raw in fields)
    return bytes([0x81 + len(fields)]) + encode("type") + encode(kind) + body


def _messages() -> Iterator[Bomb]:
    def array(count: int) -> bytes:
        return b"\xdd" + struct.pack(">I", count)

    def table(count: int) -> bytes:
        return b"\xdf" + struct.pack(">I", count)

    task = ("task_id", b"\xa1t")
    many = 8 * MIB
    yield (
        "message: five bytes of array",
        "message",
        lambda: _message("Scores", task, ("scores", array(2**32 - 1))),
    )
    yield (
        "message: eight million scores of a byte",
        "message",
        lambda: _message("Scores", task, ("scores", array(many) + bytes(many))),
    )
    yield (
        "message: a million paths",
        "message",
        lambda: _message("WantFiles", task, ("paths", array(MIB) + b"\xa1a" * MIB)),
    )
    yield (
        "message: sixty million empty texts",
        "message",
        lambda: _message("Score", task, ("texts", array(60 * MIB) + b"\xa0" * 60 * MIB)),
    )
    entries = b"".join(b"\xa4%04x\0" % n for n in range(60_000))
    yield (
        "message: sixty thousand stages",
        "message",
        lambda: _message("AdapterUpdate", task, ("seconds", table(60_000) + entries)),
    )
    yield "message: a million nestings", "message", lambda: b"\x91" * MIB + b"\0"
    yield (
        "message: nestings in a field",
        "message",
        lambda: _message("Scores", task, ("scores", b"\x91" * MIB)),
    )
    yield (
        "message: four billion bytes announced",
        "message",
        lambda: _message("File", task, ("path", b"\xa1a"), ("data", b"\xc6\xff\xff\xff\xff")),
    )
    yield "message: a zlib bomb", "message", lambda: zlib.compress(bytes(64 * MIB), 9)


def _json() -> Iterator[Bomb]:
    yield "release: two million nestings", "release manifest", lambda: b"[" * 2 * MIB
    yield "release: nested records", "release manifest", lambda: b'{"files":' * 400_000
    origins = ",".join(f'"{n:x}":""' for n in range(400_000)).encode()
    honest = parsers()["release manifest"].seeds[0]
    lineage = honest.replace(b'{"from":"z"}', b"{" + origins + b"}")
    yield "release: 400,000 origins", "release manifest", lambda: lineage
    numbers = b",".join([b"0"] * 2_000_000)
    row = b'{"rows":[{"ids":[' + numbers + b'],"columns":[0,1],"logits":[0,1]}]}'
    yield "golden: two million ids", "golden", lambda: row
    yield "release: beyond its limit", "release manifest", lambda: b" " * 64 * MIB


def _file(head: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(head)) + head + body


def _tensors() -> Iterator[Bomb]:
    empty = {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}
    crowd = {f"t{n}": empty for n in range(100_000)}
    yield "tensors: 100,000 empty ones", "tensors", lambda: _file(json.dumps(crowd).encode())
    entry = json.dumps(empty).encode()
    yield "tensors: one name twice", "tensors", lambda: _file(b'{"a":%b,"a":%b}' % (entry, entry))
    yield "tensors: ../ in a name", "tensors", lambda: _file(b'{"../../etc/x":%b}' % entry)
    yield "tensors: a head of 2^63 bytes", "tensors", lambda: struct.pack("<Q", 2**63) + b"{}"
    yield "tensors: a head of 64 MiB", "tensors", lambda: _file(b" " * 64 * MIB)
    yield "tensors: a million nestings", "tensors", lambda: _file(b"[" * MIB)
    vast = json.dumps({"a": {"dtype": "F32", "shape": [2**40, 2**30], "data_offsets": [0, 0]}})
    yield "tensors: 2^70 values", "tensors", lambda: _file(vast.encode())
    large = json.dumps({"a": {"dtype": "F32", "shape": [2**33], "data_offsets": [0, 2**35]}})
    yield "tensors: 32 GiB announced", "tensors", lambda: _file(large.encode())


def _codecs() -> Iterator[Bomb]:
    def codec(**changes: object) -> bytes:
        record = {
            "format": 1,
            "method": 1,
            "ratio": 30.0,
            "block": 64,
            "names": ["a.lora_A"],
            "shapes": [[2, 16]],
        }
        text = json.dumps(record | changes)
        empty = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
        head: dict[str, object] = {"__metadata__": {"codec": text}, "empty": empty}
        return _file(json.dumps(head).encode())

    yield "codec: 2^80 values", "codec", lambda: codec(shapes=[[2**40, 2**40]])
    yield (
        "codec: a shape of a million sizes",
        "codec",
        lambda: codec(shapes=[[1] * 1_000_000 + [0]]),
    )
    yield "codec: nested record", "codec", lambda: codec(names="[" * 100_000, shapes=[])
    yield "codec: blocks of 2^40", "codec", lambda: codec(block=2**40)
    codes = bytearray(parsers()["codes"].seeds[0])
    codes[14:18] = struct.pack("<I", 2**32 - 1)
    yield "codes: 4 GiB announced", "codes, right sum", lambda: bytes(codes)
    yield "codes: a zlib bomb", "codes", lambda: zlib.compress(bytes(64 * MIB), 9)


def _others() -> Iterator[Bomb]:
    yield "code: a megabyte", "enrolment code", lambda: b"symbiont1:" + b"A" * MIB
    yield "bundle: a megabyte", "key bundle", lambda: b"\x92" + b"\x91" * MIB
    yield "bundle: nestings", "signed bundle", lambda: b"\x91" * 3000
    yield "settings: nestings", "settings", lambda: b"a = " + b"[" * 100_000
    yield "settings: dotted key", "settings", lambda: b"a." * 5_000 + b"a = 1"
    yield "graph: 24 GB from 100 bytes", "graph", _large_graph
    yield "graph: a gigabyte announced", "graph", lambda: b"\x3a" + b"\xff\xff\xff\xff\x03"
    yield "graph: nestings", "graph", lambda: _nested(200)


def _large_graph() -> bytes:
    """A stored tensor of 24 GB whose values are not there."""
    from onnx import TensorProto, helper

    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[6_000_000_000])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    node = helper.make_node("Identity", ["w"], ["y"])
    graph = helper.make_graph([node], "g", [], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    return bytes(model.SerializeToString())


def _nested(depth: int) -> bytes:
    """Graphs within attributes of nodes within graphs."""
    graph = b""
    for _ in range(depth):
        attribute = b"\x32" + _varint(len(graph)) + graph  # AttributeProto.g
        node = b"\x2a" + _varint(len(attribute)) + attribute  # NodeProto.attribute
        graph = b"\x0a" + _varint(len(node)) + node  # GraphProto.node
    return b"\x3a" + _varint(len(graph)) + graph  # ModelProto.graph


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])
