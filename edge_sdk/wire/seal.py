"""The envelope: one message, encrypted for one recipient and signed by one sender.

Knows HPKE, chunk encryption and the manifest; it is the only module that touches AEADs or HPKE.
Does not know frames, topics, storage, clocks or what a message means.

Sealing follows five steps, and opening undoes them in reverse (PROTOCOL.md 1.3):

1. a header in fixed order, length-prefixed: the bytes sent are the bytes signed;
2. `wrap = HPKE(file key, recipient, info = label || SHA-256(header))`;
3. `payload key = HKDF(file key, salt = SHA-256(shared fields of the header), info = label)`;
4. STREAM as in the age file format: 64 KiB chunks, ChaCha20-Poly1305, the nonce is an 11-byte
   big-endian counter and one byte that is 1 for the last chunk;
5. manifest = header, wrap, SHA-256 of each *encrypted* chunk, signed with Ed25519 over the type
   and length of what is signed.

The whole header is part of the wrap's `info`, so somebody who strips the signature and signs the
same ciphertext as himself gets something nobody can decrypt. The chunk count is signed, so an empty
list of chunks is not an empty message.

Step 3 leaves out what differs between recipients (recipient, its key, wrap, stream, sequence, times
and suite), and nothing else: so one encrypted body serves a whole cohort, each device getting its
own wrap and signature (`Sealer.begin(body=...)`), with no second kind of envelope to review.

Not promised: that sender, recipient, kind, task and size stay hidden (they are in the header, in
clear), nor that a message was sent recently (the mailbox refuses repeats, the caller old ones).
"""

import hashlib
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Unpack

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from edge_sdk.errors import LocalProtocolError, RemoteProtocolError, SealError
from edge_sdk.wire.header import (
    CHUNK_BYTES,
    MAX_CHUNKS,
    MAX_HEADER_BYTES,
    STREAM_BYTES,
    TAG_BYTES,
    VERSION,
    Fields,
    Header,
    chunk_size,
    count_chunks,
    plain_size,
)
from edge_sdk.wire.identity import (
    KEY_ID_BYTES,
    MLKEM_PUBLIC_BYTES,
    SIGNATURE_BYTES,
    SUITE_HYBRID,
    SUITE_X25519,
    Identity,
    PublicIdentity,
)

__all__ = [  # the other rooms need only this module to seal and open
    "CHUNK_BYTES",
    "HASH_BYTES",
    "KEY_ID_BYTES",
    "MAX_CHUNKS",
    "MAX_HEADER_BYTES",
    "MAX_MANIFEST_BYTES",
    "SIGNATURE_BYTES",
    "STREAM_BYTES",
    "SUITE_HYBRID",
    "SUITE_X25519",
    "TAG_BYTES",
    "VERSION",
    "WRAP_BYTES",
    "Fields",
    "Header",
    "Identity",
    "Manifest",
    "Opener",
    "PublicIdentity",
    "Sealed",
    "Sealer",
    "chunk_hash",
    "chunk_size",
    "count_chunks",
    "manifest_digest",
    "new_stream",
    "open_chunks",
    "peek_header",
    "plain_size",
    "read_manifest",
    "reseal",
    "seal",
    "unseal",
]

HASH_BYTES = 32
WRAP_BYTES = {SUITE_X25519: 32 + 32 + TAG_BYTES, SUITE_HYBRID: 1088 + 32 + 32 + TAG_BYTES}
"""Encapsulated key (X25519; or ML-KEM-768 and X25519), then the encrypted 32-byte file key."""
MAX_MANIFEST_BYTES = (
    2 + MAX_HEADER_BYTES + WRAP_BYTES[SUITE_HYBRID] + MAX_CHUNKS * HASH_BYTES + SIGNATURE_BYTES
)

_WRAP_LABEL = b"symbiont/v1/wrap"
_PAYLOAD_LABEL = b"symbiont/v1/payload"
_MANIFEST_TYPE = "symbiont/v1/manifest"
_HPKE = {
    SUITE_X25519: Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305),
    SUITE_HYBRID: Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305),
}
_U16 = struct.Struct(">H")


def new_stream() -> bytes:
    """Return a fresh random 16-byte stream id."""
    return os.urandom(STREAM_BYTES)


# --- sealing ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sealed:
    """A sealed message: the signed manifest and the encrypted chunks it lists.

    `file_key` lets the sender make the same chunks again from the same plaintext (`reseal`).
    """

    manifest: bytes
    chunks: tuple[bytes, ...]
    file_key: bytes = field(repr=False)


class Sealer:
    """One message being encrypted chunk by chunk, so that no more than one is in memory.

    `Sealer.begin` starts a message: give `chunk` every part in order, then ask for the `manifest`.
    `Sealer.again` starts from a manifest and its file key: `chunk` then gives any chunk again.
    A part is CHUNK_BYTES long, the last one may be shorter (and is empty in an empty message).
    """

    def __init__(
        self, header: Header, file_key: bytes, wrap: bytes, hashes: Iterable[bytes] = ()
    ) -> None:
        self.header = header
        self.file_key = file_key
        self._wrap = wrap
        self._hashes = list(hashes)
        self._cipher = _cipher(file_key, header)

    @classmethod
    def begin(
        cls,
        plaintext_bytes: int,
        *,
        sender: PublicIdentity,
        recipient: PublicIdentity,
        body: "Sealer | None" = None,
        **fields: Unpack[Fields],
    ) -> "Sealer":
        """Start a message of `plaintext_bytes` for `recipient`, in the suite it has a key for.

        `body` is a sealer of the same message for somebody else (a broadcast): what was sealed
        there need not be sealed again, only the wrap and the signature are new.

        Raises:
            LocalProtocolError: a header field or the size is out of range, or `body` is of another
                sender, kind, task or size.
        """
        header = Header(
            VERSION,
            recipient.suite,
            fields["tenant"],
            fields["sender_id"],
            sender.sign_id,
            fields["recipient_id"],
            recipient.receive_id,
            fields["kind"],
            fields["task"],
            fields["stream"],
            fields["sequence"],
            fields["created_s"],
            fields["expires_s"],
            plaintext_bytes,
            CHUNK_BYTES,
            count_chunks(plaintext_bytes),
        )
        file_key, hashes = (body.file_key, body._hashes) if body else (os.urandom(32), [])
        wrap = _wrap(file_key, header, recipient)  # refuses a header out of range
        if body and body.header.shared() != header.shared():
            raise LocalProtocolError("messages of one body may differ in their recipients only")
        return cls(header, file_key, wrap, hashes)

    @classmethod
    def again(cls, manifest: bytes, file_key: bytes) -> "Sealer":
        """Return the sealer that made `manifest`, for a resend after a restart.

        Raises:
            SealError: not a manifest.
        """
        header, wrap, hashes, _ = _split(manifest)
        return cls(header, file_key, wrap, _hash_list(hashes))

    def chunk(self, index: int, plaintext: bytes | memoryview) -> bytes:
        """Return the encrypted chunk `index`.

        A chunk that was sealed before comes out only for the plaintext it had then: any other
        would be a second message under the same key and nonce.

        Raises:
            LocalProtocolError: parts out of order, or one of a wrong size.
            SealError: another plaintext, or another file key, than at the first time.
        """
        known, last = len(self._hashes), self.header.chunks - 1
        if not 0 <= index <= min(known, last) or len(plaintext) != plain_size(self.header, index):
            raise LocalProtocolError(
                f"part {index} of {len(plaintext)} bytes does not fit; {known} are sealed so far"
            )
        sealed = self._cipher.encrypt(_nonce(self.header, index), plaintext, None)
        digest = chunk_hash(sealed)
        if index == known:
            self._hashes.append(digest)
        elif digest != self._hashes[index]:
            raise SealError
        return sealed

    def manifest(self, sender: Identity) -> bytes:
        """Return the manifest of the whole message, signed by `sender`.

        Raises:
            LocalProtocolError: not every chunk was sealed yet, or not by this sender.
        """
        header, count = self.header, len(self._hashes)
        if (count, sender.public.sign_id) != (header.chunks, header.sender_key):
            raise LocalProtocolError(f"{count} of {header.chunks} parts, or another sender's key")
        head = header.encode()
        body = _U16.pack(len(head)) + head + self._wrap + b"".join(self._hashes)
        return body + sender.sign(_MANIFEST_TYPE, body)


def seal(
    plaintext: bytes, *, sender: Identity, recipient: PublicIdentity, **fields: Unpack[Fields]
) -> Sealed:
    """Encrypt `plaintext` for `recipient` and sign it as `sender`.

    Raises:
        LocalProtocolError: a header field or the size is out of range.
    """
    public = sender.public
    sealer = Sealer.begin(len(plaintext), sender=public, recipient=recipient, **fields)
    chunks = _chunks(sealer, plaintext)
    return Sealed(sealer.manifest(sender), chunks, sealer.file_key)


def reseal(plaintext: bytes, manifest: bytes, file_key: bytes) -> Sealed:
    """Return again the very chunks that `manifest` lists, for a resend after a restart.

    Raises:
        SealError: this plaintext and key are not the ones that were sealed.
    """
    sealer = Sealer.again(manifest, file_key)
    if len(plaintext) != sealer.header.plaintext_bytes:
        raise SealError
    return Sealed(manifest, _chunks(sealer, plaintext), file_key)


def _chunks(sealer: Sealer, plaintext: bytes) -> tuple[bytes, ...]:
    view = memoryview(plaintext)
    return tuple(
        sealer.chunk(index, view[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])
        for index in range(sealer.header.chunks)
    )


# --- opening ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest whose signature held. Made by `read_manifest` only."""

    header: Header
    chunk_hashes: tuple[bytes, ...]
    digest: bytes
    """SHA-256 of the whole manifest; what `Done` and `Reject` sign."""
    wrap: bytes


def peek_header(manifest: bytes) -> Header:
    """Return the header of `manifest` UNVERIFIED, to find out whose key must have signed it.

    Raises:
        RemoteProtocolError: not a manifest.
    """
    if not _U16.size <= len(manifest) <= MAX_MANIFEST_BYTES:
        raise RemoteProtocolError(f"{len(manifest)} bytes are no manifest")
    (length,) = _U16.unpack_from(manifest)
    return Header.decode(bytes(manifest[2 : 2 + length]))


def read_manifest(
    manifest: bytes, sender: PublicIdentity, *, tenant: str, sender_id: str, recipient_id: str
) -> Manifest:
    """Verify `manifest` as signed by `sender` and addressed to us, and return what it says.

    The checks, in order: shape, signature, then that tenant, sender, its key and recipient are
    those the caller expects. The recipient's key is checked when it is opened.

    Raises:
        SealError: any check failed.
    """
    header, wrap, hashes, signature = _split(manifest)
    sender.verify(_MANIFEST_TYPE, manifest[:-SIGNATURE_BYTES], signature)
    expected = (tenant, sender_id, sender.sign_id, recipient_id)
    if (header.tenant, header.sender, header.sender_key, header.recipient) != expected:
        raise SealError
    return Manifest(header, _hash_list(hashes), manifest_digest(manifest), wrap)


class Opener:
    """Opens the chunks of one verified manifest, in any order, one at a time.

    Whoever opens chunk by chunk has the message only once every chunk of the header's count was
    opened; `open_chunks` and `unseal` see to that themselves.

    Raises:
        SealError: the message is sealed to another key.
    """

    def __init__(self, manifest: Manifest, recipient: Identity) -> None:
        self._manifest = manifest
        header = manifest.header
        if header.recipient_key != recipient.public.key_id(header.suite):
            raise SealError
        try:
            file_key = _unwrap(manifest, recipient)
        except (InvalidTag, ValueError) as exc:
            raise SealError from exc
        self._cipher = _cipher(file_key, header)

    def chunk(self, index: int, sealed: bytes) -> bytes:
        """Return the plaintext of the encrypted chunk `index`.

        Raises:
            SealError: there is no such chunk, or these are not its bytes.
        """
        header = self._manifest.header
        if not 0 <= index < header.chunks or len(sealed) != chunk_size(header, index):
            raise SealError
        if chunk_hash(sealed) != self._manifest.chunk_hashes[index]:
            raise SealError
        try:
            return self._cipher.decrypt(_nonce(header, index), sealed, None)
        except InvalidTag as exc:
            raise SealError from exc

    def holds(self, index: int, plaintext: bytes) -> bool:
        """Whether `plaintext` is what chunk `index` opens to, by sealing it again.

        For what was kept of a message before a crash. The sealed bytes go nowhere.
        """
        header = self._manifest.header
        if not 0 <= index < header.chunks or len(plaintext) != plain_size(header, index):
            return False
        sealed = self._cipher.encrypt(_nonce(header, index), plaintext, None)
        return chunk_hash(sealed) == self._manifest.chunk_hashes[index]


def open_chunks(
    manifest: Manifest, chunks: Iterable[bytes], recipient: Identity
) -> Iterator[bytes]:
    """Yield the plaintext of each chunk, given all of them in order.

    What was yielded is the message only if the iterator came to its end without raising.

    Raises:
        SealError: a chunk is missing, extra, changed or out of place, or the message is sealed to
            another key.
    """
    opener = Opener(manifest, recipient)
    opened = 0
    for sealed in chunks:
        yield opener.chunk(opened, sealed)
        opened += 1
    if opened != manifest.header.chunks:
        raise SealError


def unseal(manifest: Manifest, chunks: Sequence[bytes], recipient: Identity) -> bytes:
    """Return the plaintext of a verified manifest and all of its chunks, in order.

    Raises:
        SealError: as `open_chunks`.
    """
    return b"".join(open_chunks(manifest, chunks, recipient))


def chunk_hash(chunk: bytes) -> bytes:
    """Return the SHA-256 of an encrypted chunk, as manifests list it."""
    return hashlib.sha256(chunk).digest()


def manifest_digest(manifest: bytes) -> bytes:
    """Return the SHA-256 of a whole manifest: what Done and Reject sign."""
    return hashlib.sha256(manifest).digest()


# --- the five steps ---------------------------------------------------------------------------


def _split(manifest: bytes) -> tuple[Header, bytes, bytes, bytes]:
    # (header, wrap, hashes, signature); every length follows from the header.
    try:
        header = peek_header(manifest)
    except RemoteProtocolError as exc:
        raise SealError from exc
    (length,) = _U16.unpack_from(manifest)
    wrap_at = _U16.size + length
    hashes_at = wrap_at + WRAP_BYTES[header.suite]
    signature_at = hashes_at + header.chunks * HASH_BYTES
    if len(manifest) != signature_at + SIGNATURE_BYTES:
        raise SealError
    wrap, hashes = manifest[wrap_at:hashes_at], manifest[hashes_at:signature_at]
    return header, wrap, hashes, manifest[signature_at:]


def _hash_list(hashes: bytes) -> tuple[bytes, ...]:
    return tuple(hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES))


def _wrap(file_key: bytes, header: Header, recipient: PublicIdentity) -> bytes:
    key: X25519PublicKey | MLKEM768X25519PublicKey
    if header.suite == SUITE_HYBRID:
        lattice = MLKEM768PublicKey.from_public_bytes(recipient.hybrid[:MLKEM_PUBLIC_BYTES])
        point = X25519PublicKey.from_public_bytes(recipient.hybrid[MLKEM_PUBLIC_BYTES:])
        key = MLKEM768X25519PublicKey(lattice, point)
    else:
        key = X25519PublicKey.from_public_bytes(recipient.receive)
    return _HPKE[header.suite].encrypt(file_key, key, info=_wrap_info(header))


def _unwrap(manifest: Manifest, recipient: Identity) -> bytes:
    header = manifest.header
    key: X25519PrivateKey | MLKEM768X25519PrivateKey = recipient.receiving
    if header.suite == SUITE_HYBRID:
        if recipient.hybrid is None:
            raise ValueError("sealed to a hybrid key, and there is none")
        key = MLKEM768X25519PrivateKey(*recipient.hybrid)
    return _HPKE[header.suite].decrypt(manifest.wrap, key, info=_wrap_info(header))


def _wrap_info(header: Header) -> bytes:
    return _WRAP_LABEL + hashlib.sha256(header.encode()).digest()


def _cipher(file_key: bytes, header: Header) -> ChaCha20Poly1305:
    salt = hashlib.sha256(header.shared()).digest()
    key = HKDF(SHA256(), length=32, salt=salt, info=_PAYLOAD_LABEL).derive(file_key)
    return ChaCha20Poly1305(key)


def _nonce(header: Header, index: int) -> bytes:
    # A fixed start is safe because every body has a fresh file key.
    return index.to_bytes(11, "big") + bytes([index == header.chunks - 1])
