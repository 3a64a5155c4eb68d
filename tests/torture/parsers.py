"""Every function that reads bytes of somebody else, honest examples, and the errors it may raise.

Knows our parsers. Does not know what they are fed: fuzzing (B3) and bombs (B4) do.
"""

import base64
import hashlib
import logging
import random
import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from compression.codec import Compressor, FeedbackState, Layout
from compression.errors import CodecError
from compression.tensor_file import read as read_tensors
from edge_sdk import graphs
from edge_sdk.config import EdgeConfig
from edge_sdk.errors import (
    ConfigError,
    EnrolmentError,
    FleetError,
    RemoteProtocolError,
    SealError,
    TrustError,
)
from edge_sdk.link.courier import Courier
from edge_sdk.link.memory import MemoryBroker
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire import config_rules, manifest, messages, offers, transfer
from edge_sdk.wire.enrolment import (
    _COUNTERSIGNED,
    _STATEMENT,
    EnrolmentCode,
    KeyBundle,
    read_statement,
    root_key_hash,
    sign_bundle,
    state_keys,
)
from edge_sdk.wire.header import Header
from edge_sdk.wire.seal import (
    SIGNATURE_BYTES,
    Identity,
    PublicIdentity,
    Sealed,
    peek_header,
    read_manifest,
    seal,
)

ME, PEER = Identity.from_bytes(bytes(range(64))), Identity.from_bytes(bytes(range(160)))
NOW_S = 1_800_000_000
STREAM = bytes(range(16))


@dataclass(frozen=True, slots=True)
class Parser:
    """A parser: bytes in, a value out or one of `errors`."""

    name: str
    read: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    errors: tuple[type[Exception], ...]


def text_of(data: bytes) -> str:
    """Return any bytes as text, since some parsers read text."""
    return data.decode("utf-8", "replace")


@cache
def parsers() -> dict[str, Parser]:
    """Return all parsers by name."""
    remote: tuple[type[Exception], ...] = (RemoteProtocolError,)
    envelope = _envelope()
    header = peek_header(envelope.manifest).encode()
    code = EnrolmentCode("t-1", bytes(16), "acme", "kitchen", bytes(32), NOW_S)
    root = root_key_hash(ME.public)
    bundle = sign_bundle(ME, PEER.public, tenant="acme", version=1, expires_s=NOW_S + 1)
    codec, codes = _codec()
    feedback = _feedback(codec)
    table = [
        Parser("header", Header.decode, (header,), remote),
        Parser("manifest", _manifest, (envelope.manifest,), (SealError,)),
        Parser(
            "signed manifest",
            lambda data: _manifest(data + ME.sign("symbiont/v1/manifest", data)),
            (envelope.manifest[:-SIGNATURE_BYTES],),
            (SealError,),
        ),
        Parser("peek", peek_header, (envelope.manifest,), remote),
        Parser("identity", PublicIdentity.from_bytes, _identities(), remote),
        Parser("frame", transfer.decode_frame, _frames(envelope), remote),
        Parser("courier", _Coordinator().take, _frames(envelope), ()),
        Parser("bitmap", _bitmap, (b"", b"\x01", b"\xff" * 9), remote),
        Parser("message", messages.decode, _messages(), remote),
        Parser(
            "packed metadata",
            lambda data: offers.unpacked(_offer(packed=data)),
            (offers.packed(_offer()).packed,),
            remote,
        ),
        Parser("release manifest", manifest.decode_manifest, (_release(),), remote),
        Parser("golden", manifest.decode_golden, (_golden(),), remote),
        Parser("codec", Compressor.from_bytes, (codec.to_bytes(),), (CodecError,)),
        Parser("codes", codec.decode, codes, (CodecError,)),
        Parser("codes, right sum", lambda d: codec.decode(_summed(d)), codes, (CodecError,)),
        Parser("feedback", FeedbackState.from_bytes, (feedback,), (CodecError,)),
        Parser("tensors", read_tensors, (codec.to_bytes(), feedback), (CodecError,)),
        Parser(
            "enrolment code",
            lambda data: EnrolmentCode.from_text(text_of(data)),
            (code.to_text().encode(),),
            (EnrolmentError,),
        ),
        Parser(
            "code, right sum",
            lambda data: EnrolmentCode.from_text(_code_text(data)),
            (msgspec.msgpack.encode(code),),
            (EnrolmentError,),
        ),
        Parser(
            "signed bundle",
            lambda data: KeyBundle.verify(_signed_bundle(data), root, NOW_S, tenant="acme"),
            (msgspec.msgpack.decode(bundle)[0],),
            (EnrolmentError, RemoteProtocolError),
        ),
        Parser("statement", _statement, (state_keys("acme", "k", ME, PEER)[0],), remote),
        Parser(
            "key bundle",
            lambda data: KeyBundle.verify(data, root, NOW_S, tenant="acme"),
            (bundle,),
            (EnrolmentError, RemoteProtocolError),
        ),
        Parser(
            "settings",
            lambda data: config_rules.parse_toml(text_of(data), EdgeConfig, "settings"),
            (config_rules.template(EdgeConfig).encode(), b"[device]\nid = 'kitchen'\n"),
            (ConfigError,),
        ),
        Parser("graph", graphs.check_graph, (_graph(),), (TrustError,)),
    ]
    return {parser.name: parser for parser in table}


def outcome(parser: Parser, data: bytes) -> str:
    """Return "taken", the name of the typed error, or "crash: ..." for any other."""
    try:
        parser.read(data)
    except parser.errors as exc:
        return type(exc).__name__
    except Exception as exc:
        known = " (of the tree, but not of this parser)" if isinstance(exc, FleetError) else ""
        return f"crash: {type(exc).__name__}{known}: {str(exc)[:100]}"
    return "taken"


# --- honest examples --------------------------------------------------------------------------


def _envelope() -> Sealed:
    return seal(
        messages.encode(messages.Refused("round-1", "no memory")),
        tenant="acme",
        sender_id="kitchen",
        recipient_id="coordinator",
        kind="Refused",
        task="round-1",
        stream=STREAM,
        sequence=1,
        created_s=1,
        expires_s=NOW_S,
        sender=ME,
        recipient=PEER.public,
    )


def _manifest(data: bytes) -> object:
    names = {"tenant": "acme", "sender_id": "kitchen", "recipient_id": "coordinator"}
    return read_manifest(data, ME.public, **names)


def _identities() -> tuple[bytes, ...]:
    return ME.public.to_bytes(), PEER.public.to_bytes()


def _frames(envelope: Sealed) -> tuple[bytes, ...]:
    frames: Sequence[transfer.Frame] = (
        transfer.Offer(STREAM, envelope.manifest),
        transfer.Offer(STREAM, envelope.manifest, ME.public.to_bytes()),
        transfer.Want(STREAM, frozenset({0, 3, 8})),
        transfer.Chunk(STREAM, 0, True, envelope.chunks[0]),
        transfer.Have(STREAM, 1, frozenset({0, 1})),
        transfer.sign_done(STREAM, bytes(32), ME),
        transfer.sign_reject(STREAM, bytes(32), transfer.Refusal.EXPIRED, "too late", ME),
    )
    return tuple(bytes(transfer.encode_frame(frame)) for frame in frames)


class _Coordinator(logging.Handler):
    """A coordinator's courier that a known device sends anything to; it logs what surprises it."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._surprise = ""
        self._folder = tempfile.TemporaryDirectory(prefix="fuzzed-courier-")
        broker = MemoryBroker(rng=random.Random(1))
        self._time_s = 0.0
        self._device = broker.link("kitchen")
        link = broker.link("coordinator")
        self._courier = Courier(
            link,
            Mailbox(Path(self._folder.name) / "mailbox.db"),
            PEER,
            tenant="acme",
            me="coordinator",
            lookup=lambda name: ME.public if name == "kitchen" else None,
            now=lambda: 2.0,
            rng=random.Random(1),
            clock=lambda: self._time_s,
            admit=self._admit,
        )
        link.connect()
        self._device.connect()

    def _admit(self, message: messages.Enrol, public: PublicIdentity) -> None:
        raise EnrolmentError("nobody is let in here")

    def emit(self, record: logging.LogRecord) -> None:
        """Remember an error; refusals are warnings."""
        self._surprise = record.getMessage()

    def take(self, data: bytes) -> object:
        """Hand one frame over; anything the courier did not expect is a crash."""
        logger = logging.getLogger("edge_sdk.link.courier")
        logger.addHandler(self)
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            self._device.publish("v1/acme/kitchen/up", data)
            self._time_s += 0.01
            self._courier.step()
        finally:
            logging.disable(before)
            logger.removeHandler(self)
        if self._surprise:
            raise AssertionError(self._surprise)
        return None


def _bitmap(data: bytes) -> object:
    return transfer.decode_frame(b"\x02" + STREAM + data)


def _messages() -> tuple[bytes, ...]:
    task = messages.TextTask("kinds", "{text}", "{label}", ("a", "b"), (" a", " b"))
    every: Sequence[messages.AnyMessage] = (
        messages.Score("t", "base", ("one", "two"), ("a", "b")),
        messages.Scores("t", (0.1, 1.0)),
        messages.TopLogits("t", 1, "slm", "base", ("one",), ("a",), 2),
        messages.LogitRows("t", 1, "base", bytes(32), 1, bytes(4), bytes(2), bytes(2), {}, 3.0),
        messages.TeachAdapter(
            "t",
            1,
            "slm",
            "base",
            b"a",
            8,
            16.0,
            ("q_proj",),
            "c",
            b"c",
            1,
            1,
            0.1,
            0,
            0,
            ("one",),
            ("a",),
            False,
            0.9,
            False,
            bytes(32),
            b"w",
            bytes(4),
            bytes(4),
            1,
            bytes(4),
            bytes(2),
            bytes(2),
        ),
        messages.WantFiles("t", ("a/b",)),
        messages.File("t", "a/b", b"data"),
        messages.Refused("t", "no memory"),
        messages.ModelReport("t", "base", 0.5, 3, 1.0, 2.0, {"load": 1.0}),
        messages.AdapterUpdate("t", 1, "base", "c", b"codes", 1, 2, 0.9, {"train": 1.0}, 3.0),
        messages.Enrolled("kitchen", b"{}", task),
        messages.OfferData("t", 1, ("one",), ("a",), (1.0,)),
        _offer(),
        _offer(source=messages.AdapterSource(bytes(32), (), 1, 8, 16.0, ("q_proj",))),
    )
    return tuple(messages.encode(message) for message in every)


def _offer(**more: Any) -> messages.OfferModel:
    return messages.OfferModel("t", "slm", "base", {"root.json": b"{}"}, ("a",), **more)


def _summed(data: bytes) -> bytes:
    """Codes with the checksum they ought to have, so that what lies behind it is reached."""
    crc = zlib.crc32(data[22:], zlib.crc32(data[:18]))
    return data[:18] + struct.pack("<I", crc) + data[22:]


def _code_text(body: bytes) -> str:
    checksum = hashlib.sha256(b"symbiont/v1/code" + body).digest()[:4]
    return "symbiont1:" + base64.urlsafe_b64encode(body + checksum).decode().rstrip("=")


def _signed_bundle(body: bytes) -> bytes:
    return msgspec.msgpack.encode((body, ME.sign("symbiont/v1/keys", body)))


def _statement(body: bytes) -> object:
    signed = [ME.sign(kind, body) for kind in (_STATEMENT, _COUNTERSIGNED)]
    return read_statement(body, *signed, tenant="acme", known=ME.public)


def _release() -> bytes:
    return (
        b'{"family":"slm","release":"base","kind":"decoder","base_model":"x","architecture":"y",'
        b'"context":512,"tokenizer_sha256":"' + b"0" * 64 + b'","files":{"model.onnx":{"sha256":"'
        b"" + b"1" * 64 + b'","bytes":3}},"parity":{"max":0.1},"lineage":{"from":"z"}}'
    )


def _golden() -> bytes:
    row = manifest.GoldenRow((1, 2), (0, 1), (0.5, 0.25))
    return manifest.encode_golden(manifest.Golden((row,)))


def _codec() -> tuple[Compressor, tuple[bytes, ...]]:
    rng = np.random.default_rng(1)
    update = {
        "layer.lora_A": rng.normal(size=(2, 16)).astype(np.float32),
        "layer.lora_B": rng.normal(size=(16, 2)).astype(np.float32),
    }
    codec = Compressor.deadzone(Layout.of(update, block=8))
    return codec, tuple(bytes(codec.encode(update, bytes_target=n).data) for n in (90, 200))


def _feedback(codec: Compressor) -> bytes:
    state = FeedbackState()
    state.keep(np.ones((codec.layout.rows, codec.layout.block), np.float32), codec.layout, 1.0)
    return state.to_bytes()


def _graph() -> bytes:
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    return bytes(model.SerializeToString())
