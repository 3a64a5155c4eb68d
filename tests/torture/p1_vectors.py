"""P1: published vectors of every primitive under the envelope, and what we froze ourselves.

Knows `tests/vectors` and how to feed each file to the library or to our own code. Does not know how
the files were made: `tests/vectors/collect.py` and `freeze.py` do.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.bindings._rust import openssl
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from edge_sdk.errors import SealError
from edge_sdk.wire import seal as seal_module
from edge_sdk.wire.header import CHUNK_BYTES, TAG_BYTES, Header, count_chunks
from edge_sdk.wire.seal import Identity, Manifest, Sealer, chunk_hash, open_chunks
from tests.torture.result import Result, Scale, say
from tests.vectors.collect import plaintext
from tests.vectors.freeze import open_frozen

HERE = Path(__file__).resolve().parent.parent / "vectors"
PUBLISHED = {"rfc9180": 18, "hpke_pq": 1, "chacha20_poly1305": 325, "x25519": 518}
PUBLISHED |= {"hkdf_sha256": 86, "ed25519": 210, "age_stream": 8}
"""How many cases each file must hold, so that a cut file is noticed."""

_KEMS = {0x10: KEM.P256, 0x12: KEM.P521, 0x20: KEM.X25519, 0x647A: KEM.MLKEM768_X25519}
_KDFS = {1: KDF.HKDF_SHA256, 3: KDF.HKDF_SHA512}
_AEADS = {1: AEAD.AES_128_GCM, 2: AEAD.AES_256_GCM, 3: AEAD.CHACHA20_POLY1305}
_CURVES = {0x10: ec.SECP256R1(), 0x12: ec.SECP521R1()}


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Run every vector; there is no shorter form, since all take about a second."""
    mismatches: dict[str, int] = {}
    cases: dict[str, int] = {}
    for name, check in CHECKS.items():
        outcomes = list(check())
        cases[name], mismatches[name] = len(outcomes), outcomes.count(False)
        say("P1", f"{name}: {cases[name]} cases, {mismatches[name]} mismatches")
    complete = all(cases[name] == count for name, count in PUBLISHED.items())
    wrong = sum(mismatches.values())
    return Result(
        "P1",
        "published vectors",
        wrong,
        f"mismatches in {sum(cases.values())} cases",
        "0 mismatches",
        complete and wrong == 0,
        notes=dict(cases),
    )


def vectors(name: str) -> list[dict[str, Any]]:
    """Return the cases of one file."""
    cases: list[dict[str, Any]] = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    return cases


def raw(case: dict[str, Any], name: str) -> bytes:
    """Return a field of a case as bytes."""
    return bytes.fromhex(case[name])


def rfc9180() -> Iterator[bool]:
    """Base mode: the first message of each case decrypts (its aad needs the private function)."""
    for case in vectors("rfc9180"):
        yield _decrypts(case, _private_key(case["kem_id"], raw(case, "skRm")))


def hpke_pq() -> Iterator[bool]:
    """Suite 2 as the draft has it: one seed gives both private keys."""
    for case in vectors("hpke_pq"):
        both = hashlib.shake_256(raw(case, "skRm")).digest(96)
        pair = (
            MLKEM768PrivateKey.from_seed_bytes(both[:64]),
            X25519PrivateKey.from_private_bytes(both[64:]),
        )
        ours = Identity(Identity.generate().signing, pair[1], pair).public.hybrid
        yield ours == raw(case, "pkRm") and _decrypts(case, MLKEM768X25519PrivateKey(*pair))


def _private_key(kem: int, data: bytes) -> Any:
    if kem == 0x20:
        return X25519PrivateKey.from_private_bytes(data)
    return ec.derive_private_key(int.from_bytes(data, "big"), _CURVES[kem])


def _decrypts(case: dict[str, Any], key: Any) -> bool:
    suite = Suite(_KEMS[case["kem_id"]], _KDFS[case["kdf_id"]], _AEADS[case["aead_id"]])
    message = raw(case, "enc") + raw(case, "ct")
    info, aad = raw(case, "info"), raw(case, "aad")
    plain: bytes = openssl.hpke._decrypt_with_aad(suite, message, key, info, aad)
    return plain == raw(case, "pt")


def chacha20_poly1305() -> Iterator[bool]:
    """Valid cases encrypt and decrypt to the vector, invalid ones are refused."""
    for case in vectors("wycheproof_chacha20_poly1305"):
        sealed = raw(case, "ct") + raw(case, "tag")
        try:
            cipher = ChaCha20Poly1305(raw(case, "key"))
            opened = cipher.decrypt(raw(case, "iv"), sealed, raw(case, "aad"))
            again = cipher.encrypt(raw(case, "iv"), raw(case, "msg"), raw(case, "aad"))
        except (InvalidTag, ValueError):
            yield case["result"] == "invalid"
        else:
            right = opened == raw(case, "msg") and again == sealed
            yield right and case["result"] == "valid"


def x25519() -> Iterator[bool]:
    """Valid cases give the secret; "acceptable" ones (all-zero secrets) may be refused."""
    for case in vectors("wycheproof_x25519"):
        try:
            private = X25519PrivateKey.from_private_bytes(raw(case, "private"))
            public = X25519PublicKey.from_public_bytes(raw(case, "public"))
            shared = private.exchange(public)
        except ValueError:
            yield case["result"] != "valid"
        else:
            yield shared == raw(case, "shared") and case["result"] != "invalid"


def hkdf_sha256() -> Iterator[bool]:
    """Valid cases give the key, sizes over the limit are refused."""
    for case in vectors("wycheproof_hkdf_sha256"):
        salt, info = raw(case, "salt"), raw(case, "info")
        try:
            made = HKDF(SHA256(), length=case["size"], salt=salt, info=info)
            key = made.derive(raw(case, "ikm"))
        except ValueError:
            yield case["result"] == "invalid"
        else:
            yield key == raw(case, "okm") and case["result"] == "valid"


def ed25519() -> Iterator[bool]:
    """Valid signatures hold, invalid ones do not; "acceptable" ones may go either way."""
    for case in vectors("wycheproof_ed25519"):
        try:
            Ed25519PublicKey.from_public_bytes(raw(case, "pk")).verify(
                raw(case, "sig"), raw(case, "msg")
            )
        except (InvalidSignature, ValueError):
            yield case["result"] != "valid"
        else:
            yield case["result"] != "invalid"


# --- STREAM as age has it ---------------------------------------------------------------------


def age_stream() -> Iterator[bool]:
    """Our chunks under age's payload key are age's payload, byte for byte, and open again."""
    for case in vectors("age_stream"):
        plain, key = plaintext(case["size"]), raw(case, "key")
        body = b"".join(age_seal(key, plain))
        right = hashlib.sha256(body).hexdigest() == case["sha256"]
        yield right and age_open(key, _pieces(body)) == plain


def age_refusals() -> Iterator[bool]:
    """What age's specification says a reader must refuse in a payload (C2SP age.md)."""
    key = bytes(range(32))
    two = age_seal(key, plaintext(CHUNK_BYTES + 100))
    full = age_seal(key, plaintext(CHUNK_BYTES))
    empty = age_seal(key, b"")
    cipher = ChaCha20Poly1305(key)
    last_empty = cipher.encrypt((1).to_bytes(11, "big") + b"\1", b"", None)
    not_last = cipher.encrypt((0).to_bytes(11, "big") + b"\0", plaintext(CHUNK_BYTES), None)
    refused: list[Sequence[bytes]] = [
        [],  # no chunks
        two[:1],  # no final chunk
        [*two, empty[0]],  # something after the final chunk
        [*two, two[1]],  # a second final chunk
        [not_last],  # a whole payload whose only chunk is not marked as the last
        [not_last, last_empty],  # an empty last chunk after a full one
        [full[0], last_empty],
        [two[1], two[0]],  # order
        [_flip(two[0]), two[1]],  # bad tag, first chunk
        [two[0], _flip(two[1])],  # bad tag, second chunk
        [_flip(full[0])],
        [two[0], two[1][:-1]],  # truncated
        [two[0], two[1][:TAG_BYTES]],
        [two[0], two[1][: TAG_BYTES - 1]],  # not even a tag
        [empty[0][:-1]],
        [b""],
    ]
    for chunks in refused:
        try:
            age_open(key, chunks)
        except SealError:
            yield True
        else:
            yield False


def age_seal(key: bytes, plain: bytes) -> tuple[bytes, ...]:
    """Encrypt with our code, the payload key being given instead of derived."""
    with mock.patch.object(seal_module, "_cipher", return_value=ChaCha20Poly1305(key)):
        return seal_module._chunks(Sealer(_header(len(plain)), b"", b""), plain)


def age_open(key: bytes, chunks: Sequence[bytes]) -> bytes:
    """Open with our code; a manifest that lists these very chunks stands for age's file."""
    size = max(0, sum(map(len, chunks)) - TAG_BYTES * len(chunks))
    header = _header(size)
    manifest = Manifest(header, tuple(map(chunk_hash, chunks)), b"", b"")
    me = Identity.from_bytes(bytes(range(64)))
    with (
        mock.patch.object(seal_module, "_unwrap", return_value=b""),
        mock.patch.object(seal_module, "_cipher", return_value=ChaCha20Poly1305(key)),
    ):
        return b"".join(open_chunks(manifest, chunks, me))


def _pieces(body: bytes) -> list[bytes]:
    step = CHUNK_BYTES + TAG_BYTES
    return [body[at : at + step] for at in range(0, max(1, len(body)), step)]


def _flip(chunk: bytes) -> bytes:
    return chunk[:-1] + bytes([chunk[-1] ^ 1])


def _header(size: int) -> Header:
    me = Identity.from_bytes(bytes(range(64))).public
    sizes = (size, CHUNK_BYTES, count_chunks(size))
    names = ("t", "s", me.sign_id, "r", me.receive_id, "K", "x")
    return Header(1, 1, *names, bytes(16), 1, 0, 1, *sizes)


CHECKS: dict[str, Callable[[], Iterator[bool]]] = {
    "rfc9180": rfc9180,
    "hpke_pq": hpke_pq,
    "chacha20_poly1305": chacha20_poly1305,
    "x25519": x25519,
    "hkdf_sha256": hkdf_sha256,
    "ed25519": ed25519,
    "age_stream": age_stream,
    "age_refusals": age_refusals,
    "frozen": open_frozen,
}
