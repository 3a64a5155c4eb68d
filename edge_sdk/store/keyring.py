"""One party's keys over time: the ones in use, the next ones, and old ones still needed to open.

Knows files and when an old private half is deleted. Does not know why keys change, nor who has
been told: `prepare` and `confirm` are called by those who do.

    NAME.key        the keys in use, as `store.keys` writes them
    NAME.key.ring   when they were made, the prepared ones, and the retired ones with their end

Both files are replaced whole and are private to their owner. A key leaves the disk by rewriting
the file without it; what a flash chip keeps of the old file is beyond a program.
"""

import threading
from dataclasses import replace
from pathlib import Path

import msgspec
from msgspec import Struct

from edge_sdk.errors import StorageError
from edge_sdk.store.keys import load_or_create, read_private, save, write_private
from edge_sdk.wire.seal import Identity, PublicIdentity

_SUITES = (1, 2)
_MAX_BYTES = 64 * 1024


class _Retired(Struct, frozen=True, array_like=True):
    secret: bytes
    until_s: float


class _Ring(Struct, frozen=True, array_like=True):
    made_s: float = 0.0
    coming: bytes = b""
    retired: tuple[_Retired, ...] = ()


class Keyring:
    """The keys in the file `path` and what belongs to them; safe to share by threads.

    One process changes them; another that only reads sees them as they were when it opened them.
    `hybrid` adds a hybrid receive key where there is none; peers hear of it with the next keys.

    Raises:
        ConfigError: others may read the files.
        StorageError: a file is damaged, or cannot be read or written.
    """

    def __init__(self, path: Path, *, hybrid: bool = False) -> None:
        self._path, self._beside = path, path.with_name(path.name + ".ring")
        self._lock = threading.RLock()
        self._identity = load_or_create(path, hybrid=hybrid)
        self._ring = self._read()
        secret = self._identity.to_bytes()
        # Stopped between two writes of `confirm`: before the keys were in their file, or after.
        unfinished = any(old.secret == secret for old in self._ring.retired)
        self._ring = _Ring(
            0.0 if unfinished else self._ring.made_s,
            b"" if self._ring.coming == secret else self._ring.coming,
            tuple(old for old in self._ring.retired if old.secret != secret),
        )
        self._index()

    @property
    def identity(self) -> Identity:
        """The keys to sign with, and that others are told of."""
        return self._identity

    @property
    def public(self) -> PublicIdentity:
        """The public half of `identity`."""
        return self._identity.public

    @property
    def made_s(self) -> float:
        """When the present keys were taken into use; 0 when it was before anybody noted it."""
        return self._ring.made_s

    @property
    def coming(self) -> Identity | None:
        """The prepared keys that are not confirmed yet; they already open messages."""
        with self._lock:
            return Identity.from_bytes(self._ring.coming) if self._ring.coming else None

    @property
    def retired(self) -> int:
        """How many old keys can still open messages."""
        return len(self._ring.retired)

    def opener(self, key_id: bytes, suite: int) -> Identity | None:
        """Return the keys that open what was sealed to the receive key `key_id`, or None."""
        return self._openers.get((suite, bytes(key_id)))

    def note_made(self, now_s: float) -> None:
        """Count the age of the present keys from `now_s` on, if nobody did before."""
        with self._lock:
            if self._ring.made_s == 0:
                self._write(msgspec.structs.replace(self._ring, made_s=now_s))

    def prepare(self, *, signing: bool = False) -> Identity:
        """Return the next keys, made and stored unless an earlier call did.

        The receive keys are new; the signing key only if `signing`.
        """
        with self._lock:
            known = self.coming
            if known is not None:
                return known
            fresh = Identity.generate()
            if self._identity.public.hybrid:
                fresh = fresh.with_hybrid()
            if not signing:
                fresh = replace(fresh, signing=self._identity.signing)
            self._write(msgspec.structs.replace(self._ring, coming=fresh.to_bytes()))
            return fresh

    def confirm(self, now_s: float, *, grace_s: float) -> None:
        """Use the prepared keys from now on; the old ones open messages for `grace_s` more."""
        with self._lock:
            coming = self.coming
            if coming is None:
                return
            old = _Retired(self._identity.to_bytes(), now_s + grace_s)
            others = tuple(each for each in self._ring.retired if each.secret != old.secret)
            # The prepared keys stay in the ring until they are in the other file: a power cut at
            # any point leaves both, or a device would no longer be who others think it is.
            self._write(_Ring(now_s, self._ring.coming, (*others, old)))
            save(self._path, coming)
            self._identity = coming
            self._write(_Ring(now_s, b"", (*others, old)))

    def tidy(self, now_s: float) -> int:
        """Delete the retired keys whose time is over, and return how many these were."""
        with self._lock:
            kept = tuple(old for old in self._ring.retired if now_s < old.until_s)
            gone = len(self._ring.retired) - len(kept)
            if gone:
                self._write(msgspec.structs.replace(self._ring, retired=kept))
            return gone

    def shorten(self, until_s: float) -> None:
        """Let no retired key last longer than `until_s`."""
        with self._lock:
            if any(old.until_s > until_s for old in self._ring.retired):
                shorter = tuple(
                    _Retired(old.secret, min(old.until_s, until_s)) for old in self._ring.retired
                )
                self._write(msgspec.structs.replace(self._ring, retired=shorter))

    # --- the file beside ----------------------------------------------------------------------

    def _index(self) -> None:
        held = [Identity.from_bytes(old.secret) for old in self._ring.retired]
        held += [self.coming] if self.coming else []
        openers: dict[tuple[int, bytes], Identity] = {}
        for identity in [*held, self._identity]:
            public = identity.public
            for suite in _SUITES:
                if suite == 1 or public.hybrid:
                    openers[suite, public.key_id(suite)] = identity
        self._openers = openers  # replaced at once: read without the lock

    def _read(self) -> _Ring:
        try:
            data = read_private(self._beside, _MAX_BYTES)
        except FileNotFoundError:
            return _Ring()
        except OSError as exc:
            raise StorageError(f"cannot read {self._beside}: {exc}; check disk and rights") from exc
        try:
            return msgspec.msgpack.decode(data, type=_Ring)
        except msgspec.DecodeError as exc:
            raise StorageError(
                f"the key file {self._beside} is damaged; restore a copy, or remove it: messages "
                "sealed to older keys are then sealed anew by their senders"
            ) from exc

    def _write(self, ring: _Ring) -> None:
        write_private(self._beside, msgspec.msgpack.encode(ring))
        self._ring = ring
        self._index()


class OneKey:
    """A Keyring of one identity that never changes; for tests and tools."""

    coming: Identity | None = None

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self._ids = {
            (suite, identity.public.key_id(suite))
            for suite in _SUITES
            if suite == 1 or identity.public.hybrid
        }

    def opener(self, key_id: bytes, suite: int) -> Identity | None:
        """Return the identity if `key_id` names its receive key, else None."""
        return self.identity if (suite, bytes(key_id)) in self._ids else None
