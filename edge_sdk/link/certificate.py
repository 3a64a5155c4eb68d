"""A device's certificate for the broker: its key, its request, and when it is due for renewal.

Knows three files and X.509. Does not know who issues certificates, nor brokers.

    broker.key    P-256, made here, mode 0600, never leaves
    broker.pem    the certificate and its authority, as issued

Source: RFC 2986 (requests); renewal at two thirds of life as in PROTOCOL.md 1.4.
"""

from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from edge_sdk.errors import RemoteProtocolError, StorageError
from edge_sdk.store.keys import read_private, write_private

_MAX_BYTES = 16_384


class BrokerCertificate:
    """The certificate in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.key_file, self.cert_file = folder / "broker.key", folder / "broker.pem"

    @property
    def held(self) -> bool:
        """Whether a certificate was ever issued to us."""
        return self.cert_file.exists()

    def request(self, device: str) -> bytes:
        """Return a PKCS#10 request (DER) for `device`, under a key that is made here once.

        Raises:
            ConfigError: others may read the key.
            StorageError: it cannot be read or written.
        """
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device)])
        request = x509.CertificateSigningRequestBuilder().subject_name(name)
        return request.sign(self._key(), SHA256()).public_bytes(Encoding.DER)

    def take(self, pem: bytes) -> None:
        """Keep an issued certificate; the next connection shows it.

        Raises:
            RemoteProtocolError: not a certificate for our key.
            StorageError: it cannot be written.
        """
        try:
            issued = x509.load_pem_x509_certificates(pem)[0].public_key()
        except (ValueError, IndexError) as exc:
            raise RemoteProtocolError("what was issued is not a certificate") from exc
        if issued != self._key().public_key():
            raise RemoteProtocolError("the certificate was issued for another key")
        write_private(self.cert_file, pem)

    def expires_s(self) -> float:
        """Return when the certificate ends, in seconds since 1970.

        Raises:
            StorageError: there is none, or it is damaged.
        """
        try:
            pem = self.cert_file.read_bytes()
            return x509.load_pem_x509_certificates(pem)[0].not_valid_after_utc.timestamp()
        except (OSError, ValueError, IndexError) as exc:
            raise StorageError(f"cannot use the certificate {self.cert_file}: {exc}") from exc

    def due(self, now_s: float, issued_s: float) -> bool:
        """Whether two thirds of the life of a certificate that was issued at `issued_s` are over.

        Raises:
            StorageError: there is none, or it is damaged.
        """
        return now_s >= issued_s + (self.expires_s() - issued_s) * 2 / 3

    def _key(self) -> ec.EllipticCurvePrivateKey:
        if not self.key_file.exists():
            fresh = ec.generate_private_key(ec.SECP256R1())
            pem = fresh.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            write_private(self.key_file, pem)
        try:
            key = load_pem_private_key(read_private(self.key_file, _MAX_BYTES), None)
        except (OSError, ValueError) as exc:
            raise StorageError(f"cannot use the key {self.key_file}: {exc}") from exc
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise StorageError(f"{self.key_file} is not a P-256 key; remove it and enrol again")
        return key
