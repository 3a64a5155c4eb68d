"""The tenant's own certificate authority: who a broker may let in over mutual TLS.

Knows X.509, one key on the disk and the serial numbers that were issued. Does not know brokers or
messages. Nothing end to end rests on it: a certificate lets a device in to the broker, and what it
sends there is believed only if its own keys signed it.

    keys/authority.key, keys/authority.pem    P-256, mode 0600, made on first use; ten years

Source: RFC 2986 (requests), RFC 5280 sections 4 and 5 (certificates and revocation lists).
"""

import ipaddress
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from coordinator.store import Store
from edge_sdk.errors import ConfigError, RemoteProtocolError, StorageError
from edge_sdk.store.keys import read_private, write_private

AUTHORITY_LASTS = timedelta(days=3650)
EARLIER = timedelta(days=3660)
"""Certificates begin ten years early: a device whose clock is behind can still use its own."""
_MAX_BYTES = 16_384
_TABLE = """
CREATE TABLE IF NOT EXISTS certificates (
  serial TEXT PRIMARY KEY, tenant TEXT NOT NULL, name TEXT NOT NULL, expires REAL NOT NULL,
  revoked REAL)
"""


class Authority:
    """Issues and revokes certificates of one tenant; the files are made when first needed.

    Raises:
        ConfigError: others may read the key.
        StorageError: the files are damaged or cannot be written.
    """

    def __init__(
        self, folder: Path, store: Store, *, tenant: str, days: int, now: Callable[[], float]
    ) -> None:
        self._store, self._tenant, self._days, self._now = store, tenant, days, now
        store.mailbox.create(_TABLE)
        key_file, self._file = folder / "authority.key", folder / "authority.pem"
        if not key_file.exists():
            self._create(key_file)
        try:
            key = load_pem_private_key(read_private(key_file, _MAX_BYTES), None)
            self._certificate = x509.load_pem_x509_certificate(self._file.read_bytes())
        except (OSError, ValueError) as exc:
            raise StorageError(
                f"the authority in {folder} is damaged ({exc}); restore a copy, or remove "
                "authority.key and enrol devices again"
            ) from exc
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise StorageError(f"{key_file} is not a P-256 key; restore a copy")
        self._key = key

    @property
    def pem(self) -> bytes:
        """The authority's own certificate, for the broker's `cafile`."""
        return self._certificate.public_bytes(Encoding.PEM)

    def certify(self, device: str, csr: bytes) -> bytes:
        """Return a client certificate (PEM, with the authority's) for the key of a PKCS#10 `csr`.

        Raises:
            RemoteProtocolError: not a request, not for this device, or not signed by its key.
        """
        try:
            request = x509.load_der_x509_csr(csr)
            names = [item.value for item in request.subject]
            key = request.public_key()
            sound = request.is_signature_valid
        except (ValueError, UnsupportedAlgorithm, InvalidSignature) as exc:
            raise RemoteProtocolError("not a certificate request") from exc
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
            raise RemoteProtocolError("a certificate request must be for a P-256 key")
        if not sound or names != [device]:
            raise RemoteProtocolError("a certificate request for another name, or of another key")
        return self._issue(device, key, client=True) + self.pem

    def client(self, name: str, *, days: float | None = None) -> tuple[bytes, bytes]:
        """Return a certificate and its key (PEM) for our own use as the broker's client `name`."""
        key = ec.generate_private_key(ec.SECP256R1())
        return self._issue(name, key.public_key(), client=True, days=days) + self.pem, _pem(key)

    def server(self, host: str) -> tuple[bytes, bytes]:
        """Return a certificate and its key (PEM) for a broker at `host`, a name or an address."""
        key = ec.generate_private_key(ec.SECP256R1())
        return self._issue(host, key.public_key(), client=False, days=397) + self.pem, _pem(key)

    def revoke(self, device: str) -> int:
        """Put all certificates of `device` on the list; return how many these were."""
        with self._store.transaction() as db:
            return db.execute(
                "UPDATE certificates SET revoked = ? WHERE tenant = ? AND name = ?"
                " AND revoked IS NULL AND expires > ?",
                (self._now(), self._tenant, device, self._now()),
            ).rowcount

    def revocations(self) -> bytes:
        """Return the revocation list (PEM) for the broker's `crlfile`."""
        with self._store.transaction() as db:
            rows = db.execute(
                "SELECT serial, revoked FROM certificates"
                " WHERE tenant = ? AND revoked IS NOT NULL AND expires > ?",
                (self._tenant, self._now()),
            ).fetchall()
        now = datetime.fromtimestamp(self._now(), UTC)
        # A list that ran out would shut every device out; it is renewed with each revocation.
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._certificate.subject)
            .last_update(now - EARLIER)
            .next_update(now + AUTHORITY_LASTS)
        )
        for serial, revoked in rows:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(int(serial, 16))
                .revocation_date(datetime.fromtimestamp(revoked, UTC))
                .build()
            )
        return builder.sign(self._key, SHA256()).public_bytes(Encoding.PEM)

    def _issue(
        self,
        name: str,
        key: ec.EllipticCurvePublicKey,
        *,
        client: bool,
        days: float | None = None,
    ) -> bytes:
        now, serial = datetime.fromtimestamp(self._now(), UTC), x509.random_serial_number()
        until = now + timedelta(days=self._days if days is None else days)
        usage = ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(self._certificate.subject)
            .public_key(key)
            .serial_number(serial)
            .not_valid_before(now - EARLIER)
            .not_valid_after(until)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        )
        if not client:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_alternative(name)]), critical=False
            )
        with self._store.transaction() as db:
            db.execute(
                "INSERT INTO certificates (serial, tenant, name, expires) VALUES (?, ?, ?, ?)",
                (f"{serial:x}", self._tenant, name, until.timestamp()),
            )
        return builder.sign(self._key, SHA256()).public_bytes(Encoding.PEM)

    def _create(self, key_file: Path) -> None:
        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.fromtimestamp(self._now(), UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name(f"Symbiont {self._tenant}"[:64]))
            .issuer_name(_name(f"Symbiont {self._tenant}"[:64]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - EARLIER)
            .not_valid_after(now + AUTHORITY_LASTS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .sign(key, SHA256())
        )
        write_private(self._file, certificate.public_bytes(Encoding.PEM))
        write_private(key_file, _pem(key))


def _name(name: str) -> x509.Name:
    if len(name) > 64:  # X.520's upper bound for a common name
        raise ConfigError(f"{name!r} is over 64 characters, too long for a certificate's name")
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
