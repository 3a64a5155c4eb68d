"""A party's keys: an Ed25519 signing key, an X25519 receive key and, if wanted, a hybrid one.

Knows their bytes, their short names and signatures. Does not know encryption, headers or files.

The hybrid receive key is an ML-KEM-768 key and an X25519 key of its own (not the plain receive
key: one key, one use). Who has one is sealed to with suite 2, who has none with suite 1; both
public halves travel signed, so nobody on the way can take the hybrid one out.
"""

import hashlib
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from edge_sdk.errors import LocalProtocolError, RemoteProtocolError, SealError

SUITE_X25519 = 1
"""HPKE with X25519, HKDF-SHA256 and ChaCha20-Poly1305."""
SUITE_HYBRID = 2
"""The same with ML-KEM-768 beside X25519. Its encoding follows a draft, so it is off by default."""

KEY_ID_BYTES = 8
SIGNATURE_BYTES = 64
MLKEM_PUBLIC_BYTES = 1184
HYBRID_PUBLIC_BYTES = MLKEM_PUBLIC_BYTES + 32
_SEED_BYTES = 64
_LABELS = {SUITE_X25519: b"receive", SUITE_HYBRID: b"receive-hybrid"}


@dataclass(frozen=True, slots=True)
class PublicIdentity:
    """What others know of a party: signing and receive key (32 bytes each), hybrid key or b""."""

    sign: bytes
    receive: bytes
    hybrid: bytes = b""

    def __post_init__(self) -> None:
        sizes = (len(self.sign), len(self.receive), len(self.hybrid))
        if sizes not in ((32, 32, 0), (32, 32, HYBRID_PUBLIC_BYTES)):
            raise RemoteProtocolError(f"keys of {sizes} bytes are not a public identity")

    @property
    def suite(self) -> int:
        """Return the suite to seal with for this party: the strongest it has a key for."""
        return SUITE_HYBRID if self.hybrid else SUITE_X25519

    @property
    def sign_id(self) -> bytes:
        """Return the 8-byte name of the signing key, as headers carry it."""
        return hashlib.sha256(b"sign" + self.sign).digest()[:KEY_ID_BYTES]

    @property
    def receive_id(self) -> bytes:
        """Return the 8-byte name of the key that `suite` seals to."""
        return self.key_id(self.suite)

    def key_id(self, suite: int) -> bytes:
        """Return the 8-byte name of the receive key of `suite`, as headers carry it."""
        key = self.hybrid if suite == SUITE_HYBRID else self.receive
        return hashlib.sha256(_LABELS[suite] + key).digest()[:KEY_ID_BYTES]

    def to_bytes(self) -> bytes:
        """Return the 64 or 1,280 bytes: signing key, receive key, hybrid key."""
        return self.sign + self.receive + self.hybrid

    @classmethod
    def from_bytes(cls, data: bytes) -> "PublicIdentity":
        """Return the identity in `data`, refusing receive keys nobody can encrypt to.

        Raises:
            RemoteProtocolError: not 64 or 1,280 bytes, or a receive key that cannot be used.
        """
        identity = cls(bytes(data[:32]), bytes(data[32:64]), bytes(data[64:]))
        points = [identity.receive]
        try:
            if identity.hybrid:
                MLKEM768PublicKey.from_public_bytes(identity.hybrid[:MLKEM_PUBLIC_BYTES])
                points.append(identity.hybrid[MLKEM_PUBLIC_BYTES:])
            for point in points:
                X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(point))
        except ValueError as exc:
            raise RemoteProtocolError("a receive key of this identity cannot be used") from exc
        return identity

    def verify(self, kind: str, body: bytes, signature: bytes) -> None:
        """Check an Ed25519 `signature` over `body`, made for the purpose `kind`.

        Raises:
            SealError: anything is wrong.
        """
        try:
            Ed25519PublicKey.from_public_bytes(self.sign).verify(signature, _signed(kind, body))
        except (InvalidSignature, ValueError) as exc:
            raise SealError from exc


@dataclass(frozen=True, slots=True)
class Identity:
    """A party's own private keys. Never leaves the machine; see `edge_sdk.store.keys`."""

    signing: Ed25519PrivateKey = field(repr=False)
    receiving: X25519PrivateKey = field(repr=False)
    hybrid: tuple[MLKEM768PrivateKey, X25519PrivateKey] | None = field(default=None, repr=False)

    @classmethod
    def generate(cls, *, hybrid: bool = False) -> "Identity":
        """Return fresh keys from the operating system's random source."""
        identity = cls(Ed25519PrivateKey.generate(), X25519PrivateKey.generate())
        return identity.with_hybrid() if hybrid else identity

    def with_hybrid(self) -> "Identity":
        """Return the same identity with a fresh hybrid receive key."""
        pair = (MLKEM768PrivateKey.generate(), X25519PrivateKey.generate())
        return Identity(self.signing, self.receiving, pair)

    @property
    def public(self) -> PublicIdentity:
        """Return the public half."""
        hybrid = [key.public_key().public_bytes_raw() for key in self.hybrid or ()]
        return PublicIdentity(
            self.signing.public_key().public_bytes_raw(),
            self.receiving.public_key().public_bytes_raw(),
            b"".join(hybrid),
        )

    def to_bytes(self) -> bytes:
        """Return 64 or 160 secret bytes: signing key, receive key, hybrid seed and key."""
        keys = (self.signing, self.receiving, *(self.hybrid or ()))
        return b"".join(key.private_bytes_raw() for key in keys)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Identity":
        """Return the keys that `to_bytes` wrote.

        Raises:
            LocalProtocolError: not 64 or 160 bytes.
        """
        if len(data) not in (64, 64 + _SEED_BYTES + 32):
            raise LocalProtocolError(f"an identity is 64 or 160 bytes, not {len(data)}")
        signing = Ed25519PrivateKey.from_private_bytes(data[:32])
        receiving = X25519PrivateKey.from_private_bytes(data[32:64])
        if len(data) == 64:
            return cls(signing, receiving)
        seed, point = data[64 : 64 + _SEED_BYTES], data[64 + _SEED_BYTES :]
        lattice = MLKEM768PrivateKey.from_seed_bytes(seed)
        return cls(signing, receiving, (lattice, X25519PrivateKey.from_private_bytes(point)))

    def sign(self, kind: str, body: bytes) -> bytes:
        """Return the 64-byte Ed25519 signature over `body` for the purpose `kind`."""
        return self.signing.sign(_signed(kind, body))


def _signed(kind: str, body: bytes) -> bytes:
    # DSSE's pre-authentication encoding: type and length come before the bytes, so a signature made
    # for one purpose is never valid for another.
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(body), body)
