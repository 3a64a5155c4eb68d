"""How a device and a coordinator come to trust each other: the code and the key bundle.

Knows the text an operator hands over, the coordinator's signed keys, and how both are checked.
Does not know which codes were used (the coordinator's table does), time, files or topics.

The operator gives the device a code. In it are a secret, which vouches for the device's keys, and
the hash of the tenant's root key, which vouches for the coordinator's: neither side trusts on
first use. The bundle is public and may lie anywhere, such as a retained topic.
"""

import base64
import binascii
import hashlib
import hmac
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from edge_sdk.errors import EnrolmentError, RemoteProtocolError, SealError
from edge_sdk.wire.identity import HYBRID_PUBLIC_BYTES
from edge_sdk.wire.messages import Count, Name
from edge_sdk.wire.seal import Identity, PublicIdentity

PREFIX = "symbiont1:"
SECRET_BYTES = 16
MAX_CODE_CHARS = 1024
LONGEST_CODE_S = 24 * 3600
"""A code lies around in a chat or on paper; after a day it is worth nothing (PROTOCOL.md 1.4)."""
MAX_BUNDLE_BYTES = 4096
_CHECK_BYTES = 4
_BUNDLE = "symbiont/v1/keys"
_STATEMENT = "symbiont/v1/new-keys"
_COUNTERSIGNED = "symbiont/v1/new-keys/by-new"

Key = Annotated[bytes, Meta(min_length=32, max_length=32)]


class EnrolmentCode(Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """What an operator hands to one device, once. `expires_s` is in seconds since 1970, UTC."""

    token_id: Name
    secret: Annotated[bytes, Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
    tenant: Name
    device: Name
    root_key_hash: Key
    expires_s: Count

    def __repr__(self) -> str:
        """Return the code without its secret, so that a log line cannot give it away."""
        return f"EnrolmentCode({self.token_id}, {self.tenant}, {self.device})"

    def to_text(self) -> str:
        """Return the one line of text that `from_text` reads."""
        body = msgspec.msgpack.encode(self)
        packed = base64.urlsafe_b64encode(body + _checksum(body))
        return PREFIX + packed.decode().rstrip("=")

    @classmethod
    def from_text(cls, text: str) -> "EnrolmentCode":
        """Return the code in `text`; white space around and inside it does not matter.

        Raises:
            EnrolmentError: not an enrolment code, or mistyped.
        """
        if len(text) > MAX_CODE_CHARS:
            raise EnrolmentError(f"an enrolment code has at most {MAX_CODE_CHARS} characters")
        text = "".join(text.split())
        if not text.startswith(PREFIX):
            raise EnrolmentError(f"an enrolment code starts with '{PREFIX}'; ask for a new one")
        packed = text.removeprefix(PREFIX)
        try:
            data = base64.b64decode(
                packed + "=" * (-len(packed) % 4), altchars=b"-_", validate=True
            )
            body, checksum = data[:-_CHECK_BYTES], data[-_CHECK_BYTES:]
            if checksum != _checksum(body):
                raise EnrolmentError("the enrolment code is incomplete or mistyped; copy it again")
            return msgspec.msgpack.decode(body, type=cls)
        except (binascii.Error, ValueError, msgspec.DecodeError) as exc:
            raise EnrolmentError("this is not an enrolment code; copy it again") from exc

    @property
    def issued_s(self) -> int:
        """Return the earliest time at which this code can have been made."""
        return max(0, self.expires_s - LONGEST_CODE_S)

    def check_fresh(self, now_s: float) -> None:
        """Check that the code may still be used at `now_s`.

        Raises:
            EnrolmentError: it has expired.
        """
        if now_s >= self.expires_s:
            raise EnrolmentError(
                f"the enrolment code for {self.device} has expired; ask the operator for a new one"
            )


def _checksum(body: bytes) -> bytes:
    # Against typing mistakes only; the secret is what authenticates.
    return hashlib.sha256(b"symbiont/v1/code" + body).digest()[:_CHECK_BYTES]


def root_key_hash(root: PublicIdentity) -> bytes:
    """Return the 32 bytes by which a code names a tenant's root key."""
    return hashlib.sha256(b"symbiont/v1/root" + root.sign).digest()


def secret_hash(token_id: str, secret: bytes) -> bytes:
    """Return what the coordinator stores of a secret, so that its table gives nobody a code."""
    return hashlib.sha256(b"symbiont/v1/token" + token_id.encode() + b"\0" + secret).digest()


def check_secret(stored: bytes, token_id: str, secret: bytes) -> None:
    """Check a presented secret against its stored hash, in constant time.

    Raises:
        EnrolmentError: it is another secret.
    """
    if not hmac.compare_digest(stored, secret_hash(token_id, secret)):
        raise EnrolmentError("the enrolment code is not known; ask the operator for a new one")


class KeyBundle(Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """The coordinator's current public keys, as its tenant's root key signed them.

    `version` grows with each bundle; times are in seconds since 1970, UTC. `issued_s` tells devices
    how late it is at least, 0 does not.
    """

    version: Count
    tenant: Name
    sign: Key
    receive: Key
    expires_s: Count
    root: Key
    issued_s: Count = 0
    hybrid: Annotated[bytes, Meta(max_length=HYBRID_PUBLIC_BYTES)] = b""

    @property
    def identity(self) -> PublicIdentity:
        """Return the keys to seal for, and to check signatures with."""
        return PublicIdentity(self.sign, self.receive, self.hybrid)

    @classmethod
    def verify(
        cls, data: bytes, root_hash: bytes, now_s: float, *, tenant: str = "", newer_than: int = 0
    ) -> "KeyBundle":
        """Return the bundle in `data` if it may be believed.

        The checks, in order: size and shape, the root key's hash against the one in the enrolment
        code, the signature, the tenant (unless empty), the version (not below `newer_than`), the
        expiry, and that its receive key can be used at all.

        Raises:
            RemoteProtocolError: not a bundle.
            EnrolmentError: a bundle of another root key or tenant, an older or an expired one.
        """
        if len(data) > MAX_BUNDLE_BYTES:
            raise RemoteProtocolError(
                f"a key bundle of {len(data)} bytes is over the limit of {MAX_BUNDLE_BYTES}"
            )
        try:
            signed = msgspec.msgpack.decode(data, type=_SignedBundle)
            bundle = msgspec.msgpack.decode(signed.body, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise RemoteProtocolError("not a key bundle") from exc
        root = PublicIdentity(bundle.root, bundle.receive)
        if not hmac.compare_digest(root_key_hash(root), root_hash):
            raise EnrolmentError("the coordinator's keys are of another root than the code names")
        try:
            root.verify(_BUNDLE, signed.body, signed.signature)
        except SealError as exc:
            raise EnrolmentError("the coordinator's keys are not signed by their root key") from exc
        if tenant and bundle.tenant != tenant:
            raise EnrolmentError(f"these keys are for tenant {bundle.tenant}, not {tenant}")
        if bundle.version < newer_than:
            raise EnrolmentError(
                f"the coordinator's keys are version {bundle.version}, older than {newer_than}; "
                "wait for the current ones"
            )
        if max(now_s, bundle.issued_s) >= bundle.expires_s:
            raise EnrolmentError(
                "the coordinator's keys have expired; wait until it announces new ones"
            )
        PublicIdentity.from_bytes(bundle.identity.to_bytes())
        return bundle


class _SignedBundle(Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    body: bytes
    signature: bytes


def sign_bundle(
    root: Identity,
    keys: PublicIdentity,
    *,
    tenant: str,
    version: int,
    expires_s: int,
    issued_s: int = 0,
) -> bytes:
    """Return the signed bundle that tells devices the coordinator's `keys`."""
    bundle = KeyBundle(
        version,
        tenant,
        keys.sign,
        keys.receive,
        expires_s,
        root.public.sign,
        issued_s,
        keys.hybrid,
    )
    body = msgspec.msgpack.encode(bundle)
    return msgspec.msgpack.encode(_SignedBundle(body, root.sign(_BUNDLE, body)))


class KeyStatement(Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """What a device says when it changes keys: by which it was known, and by which from now on."""

    tenant: Name
    device: Name
    before: Key
    keys: Annotated[bytes, Meta(max_length=2048)]

    @property
    def identity(self) -> PublicIdentity:
        """Return the next public keys.

        Raises:
            RemoteProtocolError: keys nobody can use.
        """
        return PublicIdentity.from_bytes(self.keys)


def state_keys(
    tenant: str, device: str, present: Identity, coming: Identity
) -> tuple[bytes, bytes, bytes]:
    """Return a statement and its signatures by the present and by the coming signing key."""
    statement = KeyStatement(tenant, device, present.public.sign, coming.public.to_bytes())
    body = msgspec.msgpack.encode(statement)
    return body, present.sign(_STATEMENT, body), coming.sign(_COUNTERSIGNED, body)


def read_statement(
    body: bytes, signature: bytes, countersignature: bytes, *, tenant: str, known: PublicIdentity
) -> KeyStatement:
    """Return the statement in `body` if the device known as `known` may be believed to make it.

    Raises:
        RemoteProtocolError: not a statement, of another tenant or key, or either signature fails.
    """
    try:
        statement = msgspec.msgpack.decode(body, type=KeyStatement)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise RemoteProtocolError("not a statement of keys") from exc
    if statement.tenant != tenant or not hmac.compare_digest(statement.before, known.sign):
        raise RemoteProtocolError("a statement of another tenant, or about another key")
    try:
        known.verify(_STATEMENT, body, signature)
        statement.identity.verify(_COUNTERSIGNED, body, countersignature)
    except SealError as exc:
        raise RemoteProtocolError("a statement of keys that is not signed by both keys") from exc
    return statement
