"""The envelope: one message, encrypted for one recipient and signed by one sender.

Knows keys, the header, HPKE, chunk encryption and signatures; it is the only module that does.
Does not know frames, topics, storage, clocks or what a message means.

Sealing follows five steps, and opening undoes them in reverse (PROTOCOL.md 1.3):

1. a header in fixed order, length-prefixed: the bytes sent are the bytes signed;
2. `wrap = HPKE(file key, recipient, info = label || SHA-256(header))`;
3. `payload key = HKDF(file key, salt = SHA-256(header || wrap), info = label)`;
4. STREAM as in the age file format: 64 KiB chunks, ChaCha20-Poly1305, the nonce is an 11-byte
   big-endian counter and one byte that is 1 for the last chunk;
5. manifest = header, wrap, SHA-256 of each *encrypted* chunk, signed with Ed25519 over the type
   and length of what is signed.

The header is part of the wrap's `info` and of the payload key's salt, so somebody who strips the
signature and signs the same ciphertext as himself gets something nobody can decrypt. The chunk
count is signed, so an empty list of chunks is not an empty message.

Not promised: that sender, recipient, kind, task and size stay hidden (they are in the header, in
clear), nor that a message was sent recently (the mailbox refuses repeats, the caller old ones).
"""

import hashlib
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from edge_sdk.errors import LocalProtocolError, RemoteProtocolError, SealError
from edge_sdk.wire.messages import MAX_MESSAGE_BYTES

VERSION = 1
SUITE_X25519 = 1
"""HPKE with X25519, HKDF-SHA256 and ChaCha20-Poly1305. 2 is kept for the ML-KEM hybrid."""

CHUNK_BYTES = 64 * 1024
TAG_BYTES = 16
HASH_BYTES = 32
SIGNATURE_BYTES = 64
STREAM_BYTES = 16
KEY_ID_BYTES = 8
WRAP_BYTES = 32 + 32 + TAG_BYTES
"""Encapsulated X25519 key, then the encrypted 32-byte file key."""
MAX_CHUNKS = MAX_MESSAGE_BYTES // CHUNK_BYTES
MAX_HEADER_BYTES = 1024
"""Five names of at most 128 bytes and 76 bytes of numbers fit; no honest header is longer."""
MAX_MANIFEST_BYTES = 2 + MAX_HEADER_BYTES + WRAP_BYTES + MAX_CHUNKS * HASH_BYTES + SIGNATURE_BYTES

_WRAP_LABEL = b"symbiont/v1/wrap"
_PAYLOAD_LABEL = b"symbiont/v1/payload"
_MANIFEST_TYPE = "symbiont/v1/manifest"
_HPKE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NUMBERS = struct.Struct(">QQQQII")  # sequence, created, expires, plaintext, chunk size, chunks
_U16 = struct.Struct(">H")


# --- keys -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PublicIdentity:
    """What others know of a party: its Ed25519 signing and X25519 receive key, 32 bytes each."""

    sign: bytes
    receive: bytes

    def __post_init__(self) -> None:
        if len(self.sign) != 32 or len(self.receive) != 32:
            raise RemoteProtocolError("a public identity is two keys of 32 bytes each")

    @property
    def sign_id(self) -> bytes:
        """Return the 8-byte name of the signing key, as headers carry it."""
        return hashlib.sha256(b"sign" + self.sign).digest()[:KEY_ID_BYTES]

    @property
    def receive_id(self) -> bytes:
        """Return the 8-byte name of the receive key, as headers carry it."""
        return hashlib.sha256(b"receive" + self.receive).digest()[:KEY_ID_BYTES]

    def to_bytes(self) -> bytes:
        """Return the 64 bytes: signing key, then receive key."""
        return self.sign + self.receive

    @classmethod
    def from_bytes(cls, data: bytes) -> "PublicIdentity":
        """Return the identity in `data`, refusing receive keys nobody can encrypt to.

        Raises:
            RemoteProtocolError: not 64 bytes, or a receive key of small order.
        """
        identity = cls(bytes(data[:32]), bytes(data[32:]))
        try:
            X25519PrivateKey.generate().exchange(
                X25519PublicKey.from_public_bytes(identity.receive)
            )
        except ValueError as exc:
            raise RemoteProtocolError("a receive key of small order cannot be used") from exc
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

    @classmethod
    def generate(cls) -> "Identity":
        """Return fresh keys from the operating system's random source."""
        return cls(Ed25519PrivateKey.generate(), X25519PrivateKey.generate())

    @property
    def public(self) -> PublicIdentity:
        """Return the public half."""
        return PublicIdentity(
            self.signing.public_key().public_bytes_raw(),
            self.receiving.public_key().public_bytes_raw(),
        )

    def to_bytes(self) -> bytes:
        """Return 64 secret bytes: signing key, then receive key."""
        return self.signing.private_bytes_raw() + self.receiving.private_bytes_raw()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Identity":
        """Return the keys that `to_bytes` wrote.

        Raises:
            LocalProtocolError: not 64 bytes.
        """
        if len(data) != 64:
            raise LocalProtocolError(f"an identity is 64 bytes, not {len(data)}")
        return cls(
            Ed25519PrivateKey.from_private_bytes(data[:32]),
            X25519PrivateKey.from_private_bytes(data[32:]),
        )

    def sign(self, kind: str, body: bytes) -> bytes:
        """Return the 64-byte Ed25519 signature over `body` for the purpose `kind`."""
        return self.signing.sign(_signed(kind, body))


def _signed(kind: str, body: bytes) -> bytes:
    # DSSE's pre-authentication encoding: type and length come before the bytes, so a signature made
    # for one purpose is never valid for another.
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(body), body)


def new_stream() -> bytes:
    """Return a fresh random 16-byte stream id."""
    return os.urandom(STREAM_BYTES)


# --- header -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Header:
    """What is known of a message before it is opened. Times are seconds since 1970, UTC.

    `sender_key` and `recipient_key` are key ids of 8 bytes; `sequence` counts the messages from
    this sender to this recipient from 1; `stream` names this transfer.
    """

    version: int
    suite: int
    tenant: str
    sender: str
    sender_key: bytes
    recipient: str
    recipient_key: bytes
    kind: str
    task: str
    stream: bytes
    sequence: int
    created_s: int
    expires_s: int
    plaintext_bytes: int
    chunk_bytes: int
    chunks: int

    def expired(self, now_s: float) -> bool:
        """Return whether the sender no longer wants this message delivered at `now_s`."""
        return now_s >= self.expires_s

    def encode(self) -> bytes:
        """Return the header's bytes.

        Raises:
            LocalProtocolError: a field is out of its range.
        """
        fault = _header_fault(self)
        if fault:
            raise LocalProtocolError(f"cannot make this header: {fault}")
        names = (self.tenant, self.sender, self.recipient, self.kind, self.task)
        return b"".join(
            [
                bytes([self.version, self.suite]),
                *(bytes([len(name)]) + name.encode("ascii") for name in names),
                self.sender_key,
                self.recipient_key,
                self.stream,
                _NUMBERS.pack(
                    self.sequence,
                    self.created_s,
                    self.expires_s,
                    self.plaintext_bytes,
                    self.chunk_bytes,
                    self.chunks,
                ),
            ]
        )

    @classmethod
    def decode(cls, data: bytes) -> "Header":
        """Return the header in `data`, which must be exactly one header.

        Raises:
            RemoteProtocolError: anything else.
        """
        if len(data) > MAX_HEADER_BYTES:
            raise RemoteProtocolError(
                f"a header of {len(data)} bytes is over the limit of {MAX_HEADER_BYTES}"
            )
        try:
            header = _parse_header(data)
        except (IndexError, struct.error, UnicodeDecodeError) as exc:
            raise RemoteProtocolError("the header is cut short or not a header") from exc
        fault = _header_fault(header)
        if fault:
            raise RemoteProtocolError(f"the header is not acceptable: {fault}")
        return header


def _parse_header(data: bytes) -> Header:
    at = 2
    names = []
    for _ in range(5):
        end = at + 1 + data[at]
        names.append(data[at + 1 : end].decode("ascii"))
        at = end
    ids = at + 2 * KEY_ID_BYTES + STREAM_BYTES
    numbers = _NUMBERS.unpack(data[ids:])  # also refuses anything appended
    tenant, sender, recipient, kind, task = names
    return Header(
        data[0],
        data[1],
        tenant,
        sender,
        data[at : at + KEY_ID_BYTES],
        recipient,
        data[at + KEY_ID_BYTES : at + 2 * KEY_ID_BYTES],
        kind,
        task,
        data[at + 2 * KEY_ID_BYTES : ids],
        *numbers,
    )


def _header_fault(header: Header) -> str:
    if (header.version, header.suite) != (VERSION, SUITE_X25519):
        return (
            f"version {header.version} and suite {header.suite} are not "
            f"{VERSION} and {SUITE_X25519}; update this side"
        )
    for field_name in ("tenant", "sender", "recipient", "kind", "task"):
        value = getattr(header, field_name)
        if not _NAME.fullmatch(value):
            return f"{field_name} is not a name of 1 to 128 letters, digits, '.', '_' or '-'"
    if (len(header.sender_key), len(header.recipient_key), len(header.stream)) != (8, 8, 16):
        return "key ids are 8 bytes and stream ids 16"
    for field_name in ("sequence", "created_s", "expires_s"):
        if not 0 <= getattr(header, field_name) < 2**63:  # what SQLite stores
            return f"{field_name} is outside 0 to 2^63 - 1"
    if not 0 <= header.plaintext_bytes <= MAX_MESSAGE_BYTES:
        return (
            f"a message of {header.plaintext_bytes} bytes is over the limit of {MAX_MESSAGE_BYTES}"
        )
    if header.chunk_bytes != CHUNK_BYTES:
        return f"chunks of {header.chunk_bytes} bytes, not {CHUNK_BYTES}"
    if header.chunks != count_chunks(header.plaintext_bytes):
        return f"{header.chunks} chunks do not hold {header.plaintext_bytes} bytes"
    return ""


def count_chunks(plaintext_bytes: int) -> int:
    """Return how many chunks carry `plaintext_bytes`; an empty message still has one."""
    return max(1, -(-plaintext_bytes // CHUNK_BYTES))


# --- sealing ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sealed:
    """A sealed message: the signed manifest and the encrypted chunks it lists.

    `file_key` lets the sender make the same chunks again from the same plaintext (`reseal`).
    """

    manifest: bytes
    chunks: tuple[bytes, ...]
    file_key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest whose signature held. Made by `read_manifest` only."""

    header: Header
    chunk_hashes: tuple[bytes, ...]
    digest: bytes
    """SHA-256 of the whole manifest; what `Done` and `Reject` sign."""
    wrap: bytes
    header_bytes: bytes


def seal(
    plaintext: bytes,
    *,
    tenant: str,
    sender_id: str,
    recipient_id: str,
    kind: str,
    task: str,
    stream: bytes,
    sequence: int,
    created_s: int,
    expires_s: int,
    sender: Identity,
    recipient: PublicIdentity,
) -> Sealed:
    """Encrypt `plaintext` for `recipient` and sign it as `sender`.

    Raises:
        LocalProtocolError: a header field or the size is out of range.
    """
    header = Header(
        VERSION,
        SUITE_X25519,
        tenant,
        sender_id,
        sender.public.sign_id,
        recipient_id,
        recipient.receive_id,
        kind,
        task,
        stream,
        sequence,
        created_s,
        expires_s,
        len(plaintext),
        CHUNK_BYTES,
        count_chunks(len(plaintext)),
    ).encode()  # step 1
    file_key = os.urandom(32)
    receive = X25519PublicKey.from_public_bytes(recipient.receive)
    wrap = _HPKE.encrypt(file_key, receive, info=_wrap_info(header))  # step 2
    chunks = _encrypt(plaintext, _payload_key(file_key, header, wrap))  # steps 3 and 4
    hashes = b"".join(chunk_hash(chunk) for chunk in chunks)
    body = _U16.pack(len(header)) + header + wrap + hashes
    return Sealed(body + sender.sign(_MANIFEST_TYPE, body), chunks, file_key)  # step 5


def reseal(plaintext: bytes, manifest: bytes, file_key: bytes) -> Sealed:
    """Return again the very chunks that `manifest` lists, for a resend after a restart.

    Only a plaintext that gives exactly those chunks is accepted: any other would be a second
    message under the same key and nonces.

    Raises:
        SealError: this plaintext and key are not the ones that were sealed.
    """
    header_bytes, wrap, hashes, _ = _split(manifest)
    chunks = _encrypt(plaintext, _payload_key(file_key, header_bytes, wrap))
    if b"".join(chunk_hash(chunk) for chunk in chunks) != hashes:
        raise SealError
    return Sealed(manifest, chunks, file_key)


def peek_header(manifest: bytes) -> Header:
    """Return the header of `manifest` UNVERIFIED, to find out whose key must have signed it.

    Raises:
        RemoteProtocolError: not a manifest.
    """
    if len(manifest) > MAX_MANIFEST_BYTES or len(manifest) < _U16.size:
        raise RemoteProtocolError(
            f"a manifest of {len(manifest)} bytes is outside 2 to {MAX_MANIFEST_BYTES}"
        )
    (length,) = _U16.unpack_from(manifest)
    return Header.decode(bytes(manifest[2 : 2 + length]))


def read_manifest(
    manifest: bytes, sender: PublicIdentity, *, tenant: str, sender_id: str, recipient_id: str
) -> Manifest:
    """Verify `manifest` as signed by `sender` and addressed to us, and return what it says.

    The checks, in order: shape, signature, then that tenant, sender, its key and recipient are
    those the caller expects. The recipient's key is checked by `unseal`.

    Raises:
        SealError: any check failed.
    """
    header_bytes, wrap, hashes, signature = _split(manifest)
    sender.verify(_MANIFEST_TYPE, manifest[:-SIGNATURE_BYTES], signature)
    header = Header.decode(header_bytes)  # cannot fail: _split decoded it
    expected = (tenant, sender_id, sender.sign_id, recipient_id)
    if (header.tenant, header.sender, header.sender_key, header.recipient) != expected:
        raise SealError
    parts = tuple(hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES))
    return Manifest(header, parts, manifest_digest(manifest), wrap, header_bytes)


def unseal(manifest: Manifest, chunks: Sequence[bytes], recipient: Identity) -> bytes:
    """Return the plaintext of a verified manifest and all of its chunks, in order.

    Raises:
        SealError: a chunk is missing, extra, changed or out of place, or the message is sealed to
            another key.
    """
    header = manifest.header
    if len(chunks) != header.chunks or header.recipient_key != recipient.public.receive_id:
        raise SealError
    for chunk, expected in zip(chunks, manifest.chunk_hashes, strict=True):
        if chunk_hash(chunk) != expected:
            raise SealError
    try:
        info = _wrap_info(manifest.header_bytes)
        file_key = _HPKE.decrypt(manifest.wrap, recipient.receiving, info=info)
        cipher = ChaCha20Poly1305(_payload_key(file_key, manifest.header_bytes, manifest.wrap))
        last = header.chunks - 1
        plaintext = b"".join(
            cipher.decrypt(_nonce(index, index == last), chunk, None)
            for index, chunk in enumerate(chunks)
        )
    except (InvalidTag, ValueError) as exc:
        raise SealError from exc
    if len(plaintext) != header.plaintext_bytes:
        raise SealError
    return plaintext


def chunk_hash(chunk: bytes) -> bytes:
    """Return the SHA-256 of an encrypted chunk, as manifests list it."""
    return hashlib.sha256(chunk).digest()


def manifest_digest(manifest: bytes) -> bytes:
    """Return the SHA-256 of a whole manifest: what Done and Reject sign."""
    return hashlib.sha256(manifest).digest()


def chunk_size(header: Header, index: int) -> int:
    """Return the encrypted size of chunk `index`, so that a wrong one is refused unread."""
    if index < header.chunks - 1:
        return CHUNK_BYTES + TAG_BYTES
    return header.plaintext_bytes - (header.chunks - 1) * CHUNK_BYTES + TAG_BYTES


def _split(manifest: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    # (header, wrap, hashes, signature); every length follows from the header.
    try:
        header = peek_header(manifest)
    except RemoteProtocolError as exc:
        raise SealError from exc
    (length,) = _U16.unpack_from(manifest)
    wrap_at = _U16.size + length
    hashes_at = wrap_at + WRAP_BYTES
    signature_at = hashes_at + header.chunks * HASH_BYTES
    if len(manifest) != signature_at + SIGNATURE_BYTES:
        raise SealError
    return (
        manifest[_U16.size : wrap_at],
        manifest[wrap_at:hashes_at],
        manifest[hashes_at:signature_at],
        manifest[signature_at:],
    )


def _wrap_info(header: bytes) -> bytes:
    return _WRAP_LABEL + hashlib.sha256(header).digest()


def _payload_key(file_key: bytes, header: bytes, wrap: bytes) -> bytes:
    salt = hashlib.sha256(header + wrap).digest()
    return HKDF(SHA256(), length=32, salt=salt, info=_PAYLOAD_LABEL).derive(file_key)


def _encrypt(plaintext: bytes, key: bytes) -> tuple[bytes, ...]:
    cipher = ChaCha20Poly1305(key)
    last = count_chunks(len(plaintext)) - 1
    view = memoryview(plaintext)
    return tuple(
        cipher.encrypt(
            _nonce(index, index == last),
            view[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES],
            None,
        )
        for index in range(last + 1)
    )


def _nonce(index: int, last: bool) -> bytes:
    # A fixed start is safe because every message has a fresh payload key.
    return index.to_bytes(11, "big") + bytes([last])
