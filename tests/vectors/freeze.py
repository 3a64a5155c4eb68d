"""Freezes what one version sealed and stored, so that every later version must open it (F12).

Knows which cases are worth keeping. Does not know versions: a folder `vN` is written once, when a
version is released, and only read afterwards.

    python tests/vectors/freeze.py v1

`open_frozen` opens all folders there are; it yields one outcome per file.
"""

import base64
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge_sdk.errors import RemoteProtocolError
from edge_sdk.store.keys import load_or_create
from edge_sdk.store.mailbox import Acceptance, Mailbox
from edge_sdk.wire import messages
from edge_sdk.wire.enrolment import EnrolmentCode, KeyBundle, root_key_hash, sign_bundle
from edge_sdk.wire.seal import Identity, peek_header, read_manifest, reseal, seal, unseal

HERE = Path(__file__).resolve().parent
SIZES = (0, 1, 15, 16, 17, 100, 1_000, 4_096, 9_999, 65_537)
"""In both suites: twenty envelopes."""
SENDER = bytes(range(64))
RECIPIENT = bytes(range(64, 224))
ROOT = bytes(range(100, 164))
SECRET = bytes(range(16))
NOW_S = 1_800_000_000
LETTER = messages.Refused("round-1", "no memory")


def message_of(size: int) -> bytes:
    """Return the plaintext of a size."""
    return hashlib.shake_128(b"frozen %d" % size).digest(size)


def fields(number: int) -> dict[str, Any]:
    """Return the header fields of the envelope with this number."""
    return {
        "tenant": "acme",
        "sender_id": "kitchen-1",
        "recipient_id": "coordinator",
        "kind": "AdapterUpdate",
        "task": f"round-{number}",
        "stream": bytes([number]) * 16,
        "sequence": number + 1,
        "created_s": NOW_S,
        "expires_s": NOW_S + 3600,
    }


def recipients() -> list[Identity]:
    """Return the recipient without and with its hybrid key."""
    return [Identity.from_bytes(RECIPIENT[:64]), Identity.from_bytes(RECIPIENT)]


# --- writing ----------------------------------------------------------------------------------


def freeze(folder: Path) -> None:
    """Write everything into `folder`, which must not hold anything yet."""
    folder.mkdir(parents=True)
    sender = Identity.from_bytes(SENDER)
    lines = []
    for number, (recipient, size) in enumerate((r, s) for r in recipients() for s in SIZES):
        sealed = seal(message_of(size), sender=sender, recipient=recipient.public, **fields(number))
        case = {
            "size": size,
            "manifest": _text(sealed.manifest),
            "file_key": _text(sealed.file_key),
            "chunks": [_text(chunk) for chunk in sealed.chunks],
        }
        lines.append(json.dumps(case, separators=(",", ":")))
    (folder / "envelopes.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
    _freeze_keys(folder)
    _freeze_mailbox(folder / "mailbox.db")


def _freeze_keys(folder: Path) -> None:
    root, hybrid = Identity.from_bytes(ROOT), recipients()[1].public
    bundle = sign_bundle(root, hybrid, tenant="acme", version=3, expires_s=NOW_S + 3600)
    code = EnrolmentCode("t-1", SECRET, "acme", "kitchen-1", root_key_hash(root.public), NOW_S)
    texts = {"bundle": _text(bundle), "code": code.to_text()}
    (folder / "enrolment.json").write_text(json.dumps(texts, indent=1) + "\n")
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "identity.key"
        load_or_create(path)
        heading = path.read_bytes().split(b"\n")[0]
    (folder / "identity.key").write_bytes(heading + b"\n" + base64.b64encode(RECIPIENT) + b"\n")


def _freeze_mailbox(path: Path) -> None:
    mailbox = Mailbox(path)
    sealed = seal(
        message_of(1_000),
        sender=Identity.from_bytes(SENDER),
        recipient=recipients()[0].public,
        **fields(1),
    )
    waiting = mailbox.put("kitchen-1", "Score", "score-1", message_of(1_000))
    mailbox.keep_seal(waiting, sealed.manifest, sealed.file_key)
    parked = mailbox.put("kitchen-2", "Score", "score-1", message_of(1_000))
    mailbox.park(parked, "too large for its broker")
    header = peek_header(sealed.manifest)
    mailbox.accept(header, messages.encode(LETTER))
    mailbox.close()
    for extra in path.parent.glob(path.name + "-*"):
        extra.unlink()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


# --- reading ----------------------------------------------------------------------------------


def open_frozen() -> Iterator[bool]:
    """Open what every version froze: envelopes, keys and stores."""
    for folder in sorted(HERE.glob("v[0-9]*")):
        for number, case in enumerate(json.loads((folder / "envelopes.json").read_text())):
            yield _opens(number, case)
        yield _keys_open(folder)
        yield _mailbox_opens(folder / "mailbox.db")


def _opens(number: int, case: dict[str, Any]) -> bool:
    manifest, chunks = _data(case["manifest"]), [_data(chunk) for chunk in case["chunks"]]
    names = {name: fields(number)[name] for name in ("tenant", "sender_id", "recipient_id")}
    checked = read_manifest(manifest, Identity.from_bytes(SENDER).public, **names)
    recipient = recipients()[checked.header.suite - 1]
    plain = message_of(case["size"])
    again = reseal(plain, manifest, _data(case["file_key"]))
    return unseal(checked, chunks, recipient) == plain and list(again.chunks) == chunks


def _keys_open(folder: Path) -> bool:
    texts = json.loads((folder / "enrolment.json").read_text())
    code = EnrolmentCode.from_text(texts["code"])
    bundle = KeyBundle.verify(_data(texts["bundle"]), code.root_key_hash, NOW_S, tenant="acme")
    with tempfile.TemporaryDirectory() as place:
        path = Path(shutil.copy(folder / "identity.key", place))
        path.chmod(0o600)  # git keeps no modes
        identity = load_or_create(path)
    return code.secret == SECRET and bundle.identity == identity.public


def _mailbox_opens(file: Path) -> bool:
    with tempfile.TemporaryDirectory() as place:
        mailbox = Mailbox(Path(shutil.copy(file, place)))
        try:
            return _mailbox_holds(mailbox)
        finally:
            mailbox.close()


def _mailbox_holds(mailbox: Mailbox) -> bool:
    (waiting,) = mailbox.pending()
    item = mailbox.posted(waiting)
    (parked,) = mailbox.parked()
    (letter,) = mailbox.unread()
    assert item is not None
    reseal(message_of(1_000), item.manifest, item.file_key)
    repeat = mailbox.accept(letter.header, letter.message) is Acceptance.ALREADY
    try:
        mailbox.accept(_older(letter.header), letter.message)
    except RemoteProtocolError:
        replay = False
    else:
        replay = True
    return (
        parked.to == "kitchen-2"
        and messages.decode(letter.message) == LETTER
        and repeat
        and not replay
    )


def _older(header: Any) -> Any:
    # The same sequence number in another stream: a replay under a new name.
    names = {name: getattr(header, name) for name in type(header).__slots__}
    return type(header)(**(names | {"stream": bytes(16), "task": "another"}))


def _data(text: str) -> bytes:
    return base64.b64decode(text)


if __name__ == "__main__":
    freeze(HERE / sys.argv[1])
