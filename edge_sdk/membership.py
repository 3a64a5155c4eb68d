"""To whom a device belongs, and how it stays one: code, keys, signed time and renewal.

Knows what a device remembers about its tenant and when its keys are due. Does not know examples,
models, tasks, or how messages travel: the courier carries what is asked for here.

Nothing here looks at this machine's clock. A code, a bundle and every message of the coordinator
bring a signed time (`store/clock.py`), and that is what expiry and the age of keys are judged by.
"""

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct

from edge_sdk.abilities import reads
from edge_sdk.config import EdgeConfig
from edge_sdk.errors import EnrolmentError, RemoteProtocolError
from edge_sdk.link.certificate import BrokerCertificate
from edge_sdk.link.courier import Courier, part
from edge_sdk.link.keys import CoordinatorKeys
from edge_sdk.link.passwords import COORDINATOR
from edge_sdk.memory import DeviceMemory
from edge_sdk.store.clock import SignedTime
from edge_sdk.store.keyring import Keyring
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire.enrolment import EnrolmentCode, state_keys
from edge_sdk.wire.messages import Enrol, Enrolled, Renewed, RenewKeys, TextTask

logger = logging.getLogger(__name__)

RECEIVE_KEY_S = 7 * 86_400.0
"""Age at which a device makes new receive keys: what is seized later opens a week at most."""
GRACE_S = 86_400.0
"""How long the old ones still open what the coordinator had sealed before it knew the new ones."""
_MEMBER, _REQUEST, _KEYS, _TIME, _RENEWAL, _ISSUED = (
    "membership",
    "request",
    "keys",
    "signed-time",
    "renewal",
    "certificate-issued",
)


class Membership(Struct, frozen=True, forbid_unknown_fields=True):
    """To whom this device belongs, as its enrolment code said."""

    tenant: str
    device: str
    root_key_hash: bytes
    tuf_root: bytes = b""
    task: TextTask | None = None

    @property
    def complete(self) -> bool:
        """Whether the coordinator has answered."""
        return self.task is not None


class Member:
    """One device's place in its tenant.

    Attributes:
        time: what time it is at least; give it to everything that judges expiry.
        certificate: the one for the broker, where the settings ask for mutual TLS.
        ring: this device's own keys; `open` must have been called.
        keys: the coordinator's keys; so must it for these.
    """

    ring: Keyring
    keys: CoordinatorKeys

    def __init__(
        self,
        config: EdgeConfig,
        mailbox: Mailbox,
        memory: DeviceMemory,
        folder: Path,
        *,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._config, self._mailbox, self._memory = config, mailbox, memory
        self._key_file = folder / "identity.key"
        self.certificate = BrokerCertificate(folder)
        self._renewing = threading.Lock()
        self._clock = clock
        self.time = self._signed_time()

    def _signed_time(self) -> SignedTime:
        saved = self._memory.recall(_TIME)
        options = {} if self._clock is None else {"clock": self._clock}
        return SignedTime(
            floor_s=msgspec.msgpack.decode(saved, type=float) if saved else 0.0,
            keep=lambda now_s: self._memory.remember(_TIME, msgspec.msgpack.encode(now_s)),
            **options,
        )

    @property
    def membership(self) -> Membership | None:
        """To whom this device belongs; None before a code was accepted here."""
        saved = self._memory.recall(_MEMBER)
        return msgspec.msgpack.decode(saved, type=Membership) if saved else None

    @property
    def complete(self) -> bool:
        """Whether the coordinator has taken this device in."""
        found = self.membership
        return found is not None and found.complete

    def require(self) -> Membership:
        """Return the membership.

        Raises:
            EnrolmentError: the device is not enrolled.
        """
        found = self.membership
        if found is None or not found.complete:
            raise EnrolmentError("this device is not enrolled; call enrol(code) first")
        return found

    # --- enrolling ----------------------------------------------------------------------------

    def begin(self, ticket: EnrolmentCode) -> None:
        """Believe the operator's code: whose root it names, and that it is no older than a day."""
        self._keep(Membership(ticket.tenant, ticket.device, ticket.root_key_hash))
        self.time.heard(ticket.issued_s)

    def forget(self) -> None:
        """Undo `begin`: the coordinator is not the one of the code, or refused."""
        for name in (_MEMBER, _REQUEST, _KEYS, _TIME):
            self._memory.remember(name, b"")
        self.time = self._signed_time()

    def open(self) -> None:
        """Open this device's keys and what is known of the coordinator's; one process at a time.

        Raises:
            ConfigError: others may read the key file.
            StorageError: it cannot be read or written.
        """
        found = self.membership
        assert found is not None
        self.ring = Keyring(self._key_file, hybrid=self._config.device.hybrid)
        self.keys = self.known_keys(found)

    def known_keys(self, found: Membership) -> CoordinatorKeys:
        """Return the coordinator's keys as an earlier run knew them."""
        return CoordinatorKeys(
            found.tenant,
            found.root_key_hash,
            now=self.time,
            bundle=self._memory.recall(_KEYS),
            keep=lambda data: self._memory.remember(_KEYS, data),
            heard=self.time.heard,
        )

    def request(self, ticket: EnrolmentCode, courier: Courier) -> bytes:
        """Return the stream of the request for `ticket`: an earlier attempt's, else a new one.

        Raises:
            EnrolmentError: the code has expired by signed time.
            StorageError: the disk refuses.
        """
        public = self.ring.public
        # A device of its own task each: the coordinator, not the mailbox, judges a reused code.
        task = part(ticket.token_id, public.sign.hex())
        saved = self._memory.recall(_REQUEST)
        if saved:
            earlier, stream = msgspec.msgpack.decode(saved, type=tuple[str, bytes])
            if earlier == task:
                return stream
        ticket.check_fresh(self.time())
        request = Enrol(
            token_id=ticket.token_id,
            secret=ticket.secret,
            device=ticket.device,
            identity_key=public.sign,
            receive_key=public.receive,
            families=self._config.device.families,
            memory_mb=self._config.train.memory_mb,
            csr=self._csr(ticket.device),
            hybrid_key=public.hybrid,
            reads=reads(),
        )
        with self._mailbox.transaction():
            stream = courier.send(COORDINATOR, request, task=task)
            self._memory.remember(_REQUEST, msgspec.msgpack.encode((task, stream)))
        return stream

    def take(self, answer: Enrolled) -> bool:
        """Complete the membership; return False for an answer that is not for us or not new."""
        known = self.membership
        if known is None or answer.device != known.device or known.complete:
            return False
        self._take_certificate(answer.certificate)
        self._keep(msgspec.structs.replace(known, tuf_root=answer.tuf_root, task=answer.task))
        return True

    def _keep(self, membership: Membership) -> None:
        self._memory.remember(_MEMBER, msgspec.msgpack.encode(membership))

    # --- staying ------------------------------------------------------------------------------

    def upkeep(self, courier: Courier) -> None:
        """Do what is due: delete old keys, ask for new ones, and repeat a request that was cut.

        Raises:
            StorageError: the disk refuses; the next call tries again.
        """
        self.time.keep()
        if not self.complete or not self.time.known:
            return
        now_s = self.time()
        self.ring.note_made(now_s)
        if self.ring.tidy(now_s):
            logger.info("an old receive key was deleted")
        old = now_s - self.ring.made_s >= RECEIVE_KEY_S
        if self.ring.coming is not None or old or self._certificate_due():
            self.renew(courier)

    def renew(self, courier: Courier, *, identity: bool = False) -> None:
        """Make new receive keys (and, if `identity`, a new identity key) and tell the coordinator.

        They count once it has answered; asking again before that changes nothing.

        Raises:
            EnrolmentError: the device is not enrolled.
            StorageError: the disk refuses.
        """
        with self._renewing:  # the application may ask while the device's own thread does
            self._renew(courier, identity)

    def _renew(self, courier: Courier, identity: bool) -> None:
        found = self.require()
        coming = self.ring.prepare(signing=identity)
        task = f"renew-{coming.public.receive_id.hex()}"
        if self._memory.recall(_RENEWAL) == task.encode():
            return
        words = state_keys(found.tenant, found.device, self.ring.identity, coming)
        csr = self._csr(found.device) if self._certificate_due() else b""
        with self._mailbox.transaction():
            courier.send(COORDINATOR, RenewKeys(task, *words, csr=csr), task=task)
            self._memory.remember(_RENEWAL, task.encode())
        logger.info("asked the coordinator to know this device by new keys")

    def renewed(self, answer: Renewed) -> bool:
        """Use the keys that the coordinator knows now; False when it answers something else.

        Raises:
            StorageError: the disk refuses; call again.
        """
        if self._memory.recall(_RENEWAL) != answer.task_id.encode():
            return False
        self.ring.confirm(self.time(), grace_s=GRACE_S)
        self._take_certificate(answer.certificate)
        self._memory.remember(_RENEWAL, b"")
        return True

    # --- the broker's certificate -------------------------------------------------------------

    def _csr(self, device: str) -> bytes:
        return self.certificate.request(device) if self._config.link.mutual_tls else b""

    def _certificate_due(self) -> bool:
        if not self._config.link.mutual_tls:
            return False
        saved = self._memory.recall(_ISSUED)
        if not self.certificate.held or not saved:
            return True
        return self.certificate.due(self.time(), msgspec.msgpack.decode(saved, type=float))

    def _take_certificate(self, pem: bytes) -> None:
        if not pem:
            return
        try:
            self.certificate.take(pem)
        except RemoteProtocolError as exc:
            logger.warning("the coordinator's certificate is of no use: %s", exc)
            return
        self._memory.remember(_ISSUED, msgspec.msgpack.encode(self.time()))
