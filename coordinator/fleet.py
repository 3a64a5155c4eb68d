"""Which devices belong here: enrolment tokens, public keys, states and faults.

Knows the tables `tokens` and `devices`. Does not know messages, links or what devices are asked.

A token is used by exactly one device: `admit` marks it with one `UPDATE ... WHERE used IS NULL`
and goes on only if that changed one row, in the transaction that also writes the device. Only a
hash of the secret is stored, so that a copy of the database enrols nobody.
Revocation is looked at per envelope, by `lookup`; it does not wait for a session to end.
"""

import hmac
import json
import logging
import os
import sqlite3
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import msgspec

from coordinator.abilities import Abilities
from coordinator.quarantine import FaultRule, Quarantine
from coordinator.store import Store
from edge_sdk.errors import ConfigError, EnrolmentError, RemoteProtocolError
from edge_sdk.wire.enrolment import (
    LONGEST_CODE_S,
    SECRET_BYTES,
    EnrolmentCode,
    check_secret,
    read_statement,
    secret_hash,
)
from edge_sdk.wire.messages import Enrol, Name, RenewKeys
from edge_sdk.wire.seal import PublicIdentity

logger = logging.getLogger(__name__)

FAULTS_BEFORE_QUARANTINE = FaultRule().faults
"""Refused messages in a week after which a device is left out until the operator approves it."""
RESERVED = "coordinator"


class DeviceState(StrEnum):
    """Active devices take part; quarantined ones are heard but not used; the others refused.

    Pending ones have used a good code and wait for `approve`.
    """

    PENDING = "pending"
    ACTIVE = "active"
    QUARANTINED = "quarantined"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class Device:
    """One enrolled device. Times are in seconds since 1970."""

    device: str
    state: DeviceState
    families: tuple[str, ...]
    memory_mb: int
    enrolled: float
    last_seen: float
    faults: int
    identity_key: bytes
    receive_key: bytes

    def summary(self) -> dict[str, Any]:
        """Return what `symbiont device list` shows; the key only as its short name."""
        shown = asdict(self)
        del shown["identity_key"], shown["receive_key"]
        return {**shown, "state": str(self.state), "key": self.public.sign_id.hex()}

    @property
    def public(self) -> PublicIdentity:
        """The device's public keys. The hybrid key, if any, is kept behind the receive key."""
        return PublicIdentity(self.identity_key, self.receive_key[:32], self.receive_key[32:])


_COLUMNS = (
    "device, state, families, memory_mb, enrolled, last_seen, faults, identity_key, receive_key"
)


class Fleet:
    """The devices of one tenant; other tenants' rows are never seen."""

    def __init__(
        self,
        store: Store,
        *,
        tenant: str,
        now: Callable[[], float],
        approve: bool = False,
        rule: FaultRule | None = None,
    ) -> None:
        """`approve`: a good code makes a device pending, and `approve` lets it in.

        `rule`: how many faults put a device in quarantine, and for how long.
        """
        self.abilities = Abilities(store, tenant=tenant)
        self.quarantine = Quarantine(store, tenant=tenant, now=now, rule=rule)
        self._store, self._tenant, self._now = store, tenant, now
        self._state = DeviceState.PENDING if approve else DeviceState.ACTIVE

    # --- tokens -------------------------------------------------------------------------------

    def token(self, device: str, *, root_key_hash: bytes, lasts_s: float = 3600.0) -> EnrolmentCode:
        """Make a one-time enrolment code for `device`, good for `lasts_s` seconds.

        Raises:
            ConfigError: not a device name, or it would last longer than a day.
        """
        _check_device(device)
        if not 0 < lasts_s <= LONGEST_CODE_S:
            raise ConfigError(
                f"a code for {lasts_s:.0f} s is not allowed; allowed: up to {LONGEST_CODE_S} s"
            )
        token_id, secret = f"t-{os.urandom(6).hex()}", os.urandom(SECRET_BYTES)
        expires = int(self._now() + lasts_s)
        with self._store.transaction() as db:
            db.execute(
                "INSERT INTO tokens (token, tenant, device, secret_hash, created, expires)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (
                    token_id,
                    self._tenant,
                    device,
                    secret_hash(token_id, secret),
                    self._now(),
                    expires,
                ),
            )
        return EnrolmentCode(token_id, secret, self._tenant, device, root_key_hash, expires)

    def admit(self, enrol: Enrol, keys: PublicIdentity) -> None:
        """Take the device of `enrol` in under `keys`, using its token up; all or nothing.

        The same device with the same keys may say it twice.

        Raises:
            EnrolmentError: unknown, used or expired token, or one for another device.
        """
        if not (
            hmac.compare_digest(enrol.identity_key, keys.sign)
            and hmac.compare_digest(enrol.receive_key, keys.receive)
        ):
            raise EnrolmentError("the enrolment names other keys than those it was sent with")
        with self._store.transaction() as db:
            row = db.execute(
                "SELECT device, secret_hash, expires, used FROM tokens"
                " WHERE token = ? AND tenant = ?",
                (enrol.token_id, self._tenant),
            ).fetchone()
            # An unknown token is compared too, so that both refusals take the same time.
            device, stored, expires, used = row or ("", bytes(32), 0, None)
            check_secret(stored, enrol.token_id, enrol.secret)
            if device != enrol.device:
                raise EnrolmentError(
                    f"this enrolment code is for {device}, not for {enrol.device}; "
                    f"ask the operator for one for {enrol.device}"
                )
            known = self.get(device)
            if used is not None and known is not None and known.public == keys:
                if known.state == DeviceState.REVOKED:
                    raise EnrolmentError(
                        f"the code of {device} was already used and the device is revoked; "
                        "ask the operator for a new code"
                    )
                return
            if used is None and self._now() >= expires:
                raise EnrolmentError(
                    f"the enrolment code for {device} has expired; ask the operator for a new one"
                )
            changed = db.execute(
                "UPDATE tokens SET used = ? WHERE token = ? AND used IS NULL",
                (self._now(), enrol.token_id),
            ).rowcount
            if changed != 1:
                raise EnrolmentError(
                    f"the enrolment code for {device} was already used; if that was not you, "
                    f"revoke {device}, then ask the operator for a new code"
                )
            self._insert(db, enrol, keys)
        logger.info("enrolled %s", enrol.device)

    def approve(self, device: str) -> None:
        """Let a pending device in, or one in quarantine back in.

        Raises:
            EnrolmentError: there is no such device, or it is revoked or active.
        """
        with self._store.transaction() as db:
            changed = db.execute(
                "UPDATE devices SET state = ?, faults = 0 WHERE tenant = ? AND device = ?"
                " AND state IN (?, ?)",
                (
                    DeviceState.ACTIVE,
                    self._tenant,
                    device,
                    DeviceState.PENDING,
                    DeviceState.QUARANTINED,
                ),
            ).rowcount
            found = self.get(device)
        if found is None:
            raise EnrolmentError(self._unknown(device))
        if not changed:
            raise EnrolmentError(
                f"{device} is {found.state}; only pending and quarantined devices are approved"
                + ("; make a new code for it" if found.state == DeviceState.REVOKED else "")
            )
        logger.info("approved %s", device)

    def renew(self, device: str, words: RenewKeys) -> None:
        """Know `device` by the keys of its statement from now on.

        Raises:
            RemoteProtocolError: not signed by its present and its next key, or not its own.
        """
        with self._store.transaction() as db:
            known = self.lookup(device)
            if known is None:
                raise RemoteProtocolError(f"{device} is not enrolled here")
            statement = read_statement(
                words.statement,
                words.signature,
                words.countersignature,
                tenant=self._tenant,
                known=known,
            )
            if statement.device != device:
                raise RemoteProtocolError(f"{device} speaks for {statement.device}")
            keys = statement.identity
            db.execute(
                "UPDATE devices SET identity_key = ?, receive_key = ?"
                " WHERE tenant = ? AND device = ?",
                (keys.sign, keys.receive + keys.hybrid, self._tenant, device),
            )
        logger.info("%s has new keys", device)

    def _insert(self, db: sqlite3.Connection, enrol: Enrol, keys: PublicIdentity) -> None:
        # A second enrolment of a device replaces its keys: the operator made a new code for it.
        db.execute(
            "INSERT OR REPLACE INTO devices (tenant, device, identity_key, receive_key, state,"
            " families, memory_mb, enrolled, last_seen, faults)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 0)",
            (
                self._tenant,
                enrol.device,
                keys.sign,
                keys.receive + keys.hybrid,
                self._state,
                json.dumps(enrol.families),
                enrol.memory_mb,
                self._now(),
                self._now(),
            ),
        )

    # --- devices ------------------------------------------------------------------------------

    def list(self) -> tuple[Device, ...]:
        """Return all devices, sorted by id."""
        with self._store.transaction() as db:
            rows = db.execute(
                f"SELECT {_COLUMNS} FROM devices WHERE tenant = ? ORDER BY device",
                (self._tenant,),
            ).fetchall()
        return tuple(_device(row) for row in rows)

    def get(self, device: str) -> Device | None:
        """Return one device, or None."""
        with self._store.transaction() as db:
            row = db.execute(
                f"SELECT {_COLUMNS} FROM devices WHERE tenant = ? AND device = ?",
                (self._tenant, device),
            ).fetchone()
        return _device(row) if row else None

    def lookup(self, device: str) -> PublicIdentity | None:
        """Return a device's public keys, or None if it is unknown, pending or revoked.

        The courier asks at every message, so a revocation by another process counts at once.
        """
        found = self.get(device)
        if found is None or found.state in (DeviceState.REVOKED, DeviceState.PENDING):
            return None
        return found.public

    def active(self, family: str | None = None) -> tuple[str, ...]:
        """Return the ids of active devices, of one family (devices that named none take any)."""
        self.quarantine.expire()
        return tuple(
            d.device
            for d in self.list()
            if d.state == DeviceState.ACTIVE
            and (family is None or not d.families or family in d.families)
        )

    def is_active(self, device: str) -> bool:
        """Say whether the device may take part."""
        found = self.get(device)
        if found is not None and found.state == DeviceState.QUARANTINED:
            self.quarantine.expire()
            found = self.get(device)
        return found is not None and found.state == DeviceState.ACTIVE

    def revoke(self, device: str) -> None:
        """Refuse everything from `device` from now on, and use up its open tokens.

        Raises:
            EnrolmentError: there is no such device.
        """
        with self._store.transaction() as db:
            changed = db.execute(
                "UPDATE devices SET state = ? WHERE tenant = ? AND device = ?",
                (DeviceState.REVOKED, self._tenant, device),
            ).rowcount
            spent = db.execute(
                "UPDATE tokens SET used = ? WHERE tenant = ? AND device = ? AND used IS NULL",
                (self._now(), self._tenant, device),
            ).rowcount
        if changed + spent == 0:
            raise EnrolmentError(self._unknown(device))
        logger.info("revoked %s", device)

    def revoked(self) -> frozenset[str]:
        """Return the ids of revoked devices."""
        with self._store.transaction() as db:
            rows = db.execute(
                "SELECT device FROM devices WHERE tenant = ? AND state = ?",
                (self._tenant, DeviceState.REVOKED),
            ).fetchall()
        return frozenset(device for (device,) in rows)

    def _unknown(self, device: str) -> str:
        known = ", ".join(d.device for d in self.list()) or "none"
        return f"there is no device {device} here; enrolled are: {known}"

    def seen(self, device: str) -> None:
        """Record that something arrived from `device`."""
        with self._store.transaction() as db:
            db.execute(
                "UPDATE devices SET last_seen = ? WHERE tenant = ? AND device = ?",
                (self._now(), self._tenant, device),
            )

    def fault(self, device: str, step: str = "reply", reason: str = "") -> bool:
        """Count something no honest device sends; return whether that put it in quarantine."""
        return self.quarantine.fault(device, step, reason)


def _device(row: tuple[Any, ...]) -> Device:
    device, state, families, *rest = row
    return Device(device, DeviceState(state), tuple(json.loads(families)), *rest)


def _check_device(device: str) -> None:
    try:
        msgspec.convert(device, Name)
    except msgspec.ValidationError as exc:
        raise ConfigError(
            f"{device!r} is not a device name; use letters, digits, '.', '_' and '-', at most 128"
        ) from exc
    if device == RESERVED or device.startswith(RESERVED + "."):
        raise ConfigError(f"{RESERVED!r} is the coordinator's own name; choose another")
