"""The broker on this machine: who is let in, and how somebody inside is put out.

Knows the folder that `symbiont broker config` made. Does not know the coordinator's tables.

mosquitto ends the session of a user who has left its password file as soon as it reads the file
again. A session that was opened with a certificate it leaves alone, revocation list or not
(PROTOCOL.md, finding 8), so that one is taken over: we connect under the same name with a
certificate of a few minutes, upon which the broker ends the other session, and leave.
"""

import logging
import tempfile
from pathlib import Path

from coordinator.authority import Authority
from edge_sdk.errors import FleetError
from edge_sdk.link.broker_files import AUTHORITY_FILE, CRL_FILE, drop_user, mutual_url, reload
from edge_sdk.link.mqtt import MqttLink
from edge_sdk.store.keys import write_private

logger = logging.getLogger(__name__)

TAKE_OVER_S = 5.0
_MINUTES_5 = 5 / 1440
"""Life of the certificate of a take-over, in days."""


class Door:
    """A broker's folder and the tenant's authority."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        self._folder, self._authority = folder, authority

    def throw_out(self, device: str) -> str:
        """Let `device` in no more and end its session; return what was done, in a few words.

        A failure is part of the answer: the device is refused at every message whatever the
        broker does.
        """
        try:
            drop_user(self._folder, device)
            url = mutual_url(self._folder)
            if url:
                self._authority.revoke(device)
                self._list_revoked()
            reload(self._folder)
            if url:
                self._take_over(device, url)
        except FleetError as exc:
            logger.warning("%s may still be connected: %s", device[:12], exc)
            return f"perhaps still open ({exc})"
        return "ended"

    def _take_over(self, device: str, url: str) -> None:
        certificate, key = self._authority.client(device, days=_MINUTES_5)
        with tempfile.TemporaryDirectory() as home:
            cert_file, key_file = Path(home, "cert.pem"), Path(home, "key.pem")
            cert_file.write_bytes(certificate)
            write_private(key_file, key)
            link = MqttLink(
                url,
                client_id=device,
                ca=str(self._folder / AUTHORITY_FILE),
                cert=str(cert_file),
                key=str(key_file),
            )
            try:
                link.connect(wait_s=TAKE_OVER_S)
            finally:
                link.close()
        self._authority.revoke(device)
        self._list_revoked()
        reload(self._folder)

    def _list_revoked(self) -> None:
        write_private(self._folder / CRL_FILE, self._authority.revocations())
