"""What goes down to each device so that it begins a round with the coordinator's own adapter.

Knows which adapter each device last confirmed, and the chain of coded differences. Does not know
tasks, rounds or messages' other fields.

Three ways, the one of fewest bytes that the device can follow: nothing but the digest (it holds the
adapter, or draws it from the seed), the differences since the one it confirmed, a whole copy.
A release of the adapter adopted last goes down by the same differences and the next one, before
that one is opened; who has got them so needs no more than the digest in the next task.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import msgspec

from compression.downlink import Chain, Link, digest_of
from compression.errors import CodecError
from edge_sdk.errors import RemoteProtocolError
from edge_sdk.train.lora import Factors, to_bytes
from edge_sdk.wire.messages import AdapterDelta


@dataclass(frozen=True, slots=True)
class Carried:
    """The fields of a TrainAdapter that say what to begin with.

    `since`: the digest that the differences begin at, whether they are here or came with a release.
    """

    adapter: bytes
    digest: bytes = b""
    deltas: tuple[AdapterDelta, ...] = ()
    since: bytes = b""


class _State(msgspec.Struct):
    chain: bytes
    first: bytes
    confirmed: dict[str, bytes]
    released: dict[str, bytes] = {}


class Broadcast:
    """The chain of one family's adapters; `first` is what every device can draw from its seed."""

    def __init__(self, first: Factors, *, ratio: float, now: Factors | None = None) -> None:
        """`now`: the present adapter, where it is another already."""
        self._chain = Chain(first if now is None else now, ratio=ratio)
        self._first = digest_of(first)
        self._confirmed: dict[str, bytes] = {}
        self._released: dict[str, bytes] = {}  # device -> digest that a release's `ahead` led to

    def adopt(self, target: Factors) -> Factors:
        """What devices will read of `target`, for everyone here to use in its place.

        Raises:
            RemoteProtocolError: it has values that no device could be sent.
        """
        try:
            return self._chain.adopt(target)
        except CodecError as exc:
            raise RemoteProtocolError(f"the new adapter cannot be sent: {exc}") from exc

    def open(self) -> tuple[Factors, bytes]:
        """Send out what was adopted last, from now on; return it and its change's codes, if any."""
        codes = self._chain.open()
        return dict(self._chain.tensors), codes

    @property
    def digest(self) -> bytes:
        """Of the adapter adopted last."""
        return self._chain.digest

    def carried(self, device: str, *, lacks: Collection[str] = ()) -> Carried:
        """What `device` needs to begin with the opened adapter.

        `lacks`: what it said it lacked of this task. With "adapter" it gets a copy, with anything
        else the differences again that a release brought.
        """
        digest, since = self._chain.digest, self._confirmed.get(device, self._first)
        if not lacks and self._released.get(device) == digest:
            return Carried(b"", digest, since=since)
        links = self._chain.since(since)
        if "adapter" in lacks or links is None:
            return Carried(to_bytes(self._chain.tensors), digest)
        return Carried(b"", digest, _deltas(links), since)

    def ahead(self, device: str) -> Carried | None:
        """What `device` needs to make the adapter adopted last; None if a whole one takes less."""
        since = self._confirmed.get(device, self._first)
        links = self._chain.ahead(since)
        return None if links is None else Carried(b"", self._chain.digest, _deltas(links), since)

    def released(self, device: str) -> None:
        """Note that `device` has got `ahead` with a release: a task need not say it again."""
        self._released[device] = self._chain.digest

    def confirm(self, device: str, digest: bytes) -> None:
        """Note that `device` holds the adapter of this digest."""
        if digest:
            self._confirmed[device] = digest

    def keep_confirmed(self, other: "Broadcast") -> None:
        """Know what `other` knows devices to hold, on top of what is known here."""
        self._confirmed |= other._confirmed
        self._released |= other._released

    def to_bytes(self) -> bytes:
        """All of it; equal states give equal bytes."""
        confirmed = dict(sorted(self._confirmed.items()))
        released = dict(sorted(self._released.items()))
        state = _State(self._chain.to_bytes(), self._first, confirmed, released)
        return msgspec.msgpack.encode(state)

    @classmethod
    def from_bytes(cls, data: bytes, *, ratio: float) -> "Broadcast":
        """What `to_bytes` wrote, with `ratio` from now on."""
        state = msgspec.msgpack.decode(data, type=_State)
        made = cls.__new__(cls)
        made._chain, made._first = Chain.from_bytes(state.chain, ratio=ratio), state.first
        made._confirmed, made._released = state.confirmed, state.released
        return made


def _deltas(links: Iterable[Link]) -> tuple[AdapterDelta, ...]:
    return tuple(AdapterDelta(link.base, link.codes) for link in links)
