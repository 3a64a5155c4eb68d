"""The watchers of conftest.py see what they are there for."""

import base64
import io
import logging
import pickle
from fractions import Fraction
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

from edge_sdk.store.keys import load_or_create
from edge_sdk.wire.seal import Identity
from tests.key_scan import SCAN, KeyScan
from tests.no_pickle import ALARM, OURS, PickleAlarm

IDENTITY = Identity.generate(hybrid=True)
KEY = IDENTITY.to_bytes()[:32]


@pytest.mark.parametrize(
    "text",
    [
        f"key {KEY.hex()}",
        f"key={KEY.hex().upper()}!",
        f"keys: {base64.b64encode(IDENTITY.to_bytes()).decode()}",
        f"x{base64.urlsafe_b64encode(b'1' + KEY).decode()}",
        f"{base64.b64encode(b'12' + KEY).decode()}",
        f"made {KEY!r}",
        f"state {b'head' + IDENTITY.to_bytes() + b'tail'!r}",
        "my p4ssword is: correct horse battery",
        "-----BEGIN PRIVATE KEY-----\nMC4C",
    ],
    ids=["hex", "HEX", "base64", "shifted", "shifted twice", "bytes", "in bytes", "word", "PEM"],
)
def test_a_secret_is_found_in_each_form(text):
    scan = KeyScan()
    scan.add_identity(IDENTITY)
    scan.add(b"correct horse battery", "a password")

    scan.lines.append(f"something before {text} and after")

    assert scan.hits()


def test_public_keys_and_other_texts_are_no_secrets():
    scan = KeyScan()
    scan.add_identity(IDENTITY)
    public = IDENTITY.public

    scan.lines.append(f"{public.to_bytes().hex()} {public!r} {IDENTITY!r} {bytes(64).hex()}")

    assert not scan.hits()


def test_keys_and_logs_of_other_processes_are_found_in_the_folder(tmp_path: Path):
    path = tmp_path / "device" / "identity.key"
    path.parent.mkdir()
    secret = load_or_create(path).to_bytes()[32:64]
    log = tmp_path / "broker.log"
    log.write_text(f"connect with {secret.hex()}\n")

    hits = KeyScan().hits(tmp_path)
    log.unlink()  # or the scan of this very session would find it

    assert hits == ["a receive key in broker.log"]


def test_this_session_is_watched(caplog):
    logger = logging.getLogger("edge_sdk.some_room")
    before = len(SCAN.lines)

    logger.debug("a line of the lowest level")
    Identity.generate()

    assert len(SCAN.lines) == before + 1
    assert KEY in SCAN.secrets
    assert ALARM.on


def in_a_room_of_ours(function: FunctionType):
    """The same function as if it were written in edge_sdk."""
    room = ModuleType("edge_sdk.somewhere")
    return FunctionType(function.__code__, {**function.__globals__, "__name__": room.__name__})


def unpickle(data: bytes):
    return pickle.load(io.BytesIO(data))  # noqa: S301 - what the alarm is for


def test_our_code_cannot_unpickle_a_class_and_others_can():
    alarm = PickleAlarm()
    data = pickle.dumps(Fraction(1, 3))
    ALARM.on, alarm.on = False, True
    try:
        assert unpickle(data) == Fraction(1, 3)
        with pytest.raises(RuntimeError, match="B12"):
            in_a_room_of_ours(unpickle)(data)
    finally:
        ALARM.on, alarm.on = True, False

    assert len(alarm.calls) == 1
    assert alarm.calls[0].startswith(OURS)
