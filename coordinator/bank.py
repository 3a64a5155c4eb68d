"""What devices have told of the public texts: the newest rows of each, checked and kept.

Knows sparse rows, their messages and how old they are. Does not know models, alignment or rounds'
order.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from coordinator.aggregate import staleness_weight
from coordinator.families import Families
from coordinator.peers import Peer
from coordinator.programs import Reply
from edge_sdk.algorithms.logit_rows import LogitTable, pack, unpack
from edge_sdk.errors import RemoteProtocolError
from edge_sdk.wire.messages import AnyMessage, LogitRows


@dataclass(frozen=True, slots=True)
class Teacher:
    """A device's rows and the weight that their age leaves them, in (0, 1]."""

    device: str
    table: LogitTable
    weight: float


class _Row(msgspec.Struct):
    round: int
    kept: int
    truth: bytes
    ids: bytes
    logps: bytes


class Bank:
    """The newest rows of every device.

    `kept` is the entries of a row that devices are asked for; rows count until `stale_rounds`
    after theirs.
    """

    def __init__(
        self, fleet: Families, peers: Mapping[str, Peer], *, kept: int, stale_rounds: int
    ) -> None:
        self._fleet, self._peers = fleet, peers
        self._kept, self._stale_rounds = kept, stale_rounds
        self._held: dict[str, tuple[int, LogitTable]] = {}

    def check(self, device: str, message: AnyMessage) -> None:
        """Refuse rows about other texts, of another size, or that no model can have said.

        Raises:
            RemoteProtocolError: they are; says what is wrong.
        """
        if isinstance(message, LogitRows):
            self._table(device, message)

    def _table(self, device: str, rows: LogitRows) -> LogitTable:
        peer = self._peers[self._fleet.of(device).name]
        vocabulary = len(peer.words)
        if rows.places != peer.places.digest:
            raise RemoteProtocolError(f"device {device} told of other texts than were asked")
        if rows.kept != min(self._kept, vocabulary):
            raise RemoteProtocolError(
                f"device {device} sent {rows.kept} entries a row, asked were {self._kept}"
            )
        try:
            return unpack(peer.places, rows.kept, vocabulary, rows.truth, rows.ids, rows.logps)
        except RemoteProtocolError as exc:
            raise RemoteProtocolError(f"device {device}: {exc}") from exc

    def keep(self, replies: Sequence[Reply]) -> None:
        """Take in checked rows; older ones than those held are passed over."""
        for reply in replies:
            if isinstance(reply.message, LogitRows):
                self.put(
                    reply.device, reply.message.round, self._table(reply.device, reply.message)
                )

    def put(self, device: str, step: int, table: LogitTable) -> None:
        """Hold `table` as what `device` said in round `step`, unless something newer is held."""
        if device not in self._held or self._held[device][0] <= step:
            self._held[device] = step, table

    def forget(self, devices: Iterable[str]) -> None:
        """Drop what these devices said."""
        for device in devices:
            self._held.pop(device, None)

    def teachers(self, family: str, step: int) -> list[Teacher]:
        """Whose rows count in round `step`, in order of device."""
        return [
            Teacher(device, table, staleness_weight(step - told))
            for device, (told, table) in sorted(self._held.items())
            if self._fleet.of(device).name == family and step - told <= self._stale_rounds
        ]

    def told(self) -> dict[str, int]:
        """The round of every device's rows."""
        return {device: step for device, (step, _) in sorted(self._held.items())}

    def to_bytes(self) -> bytes:
        """Everything held, for a program's state."""
        rows = {}
        for device, (step, table) in sorted(self._held.items()):
            vocabulary = len(self._peers[self._fleet.of(device).name].words)
            rows[device] = _Row(step, table.kept, *pack(table, vocabulary))
        return msgspec.msgpack.encode(rows)

    def restore(self, data: bytes) -> None:
        """Take up what `to_bytes` returned; devices that are no longer of the run are left out."""
        self._held = {}
        for device, row in msgspec.msgpack.decode(data, type=dict[str, _Row]).items():
            if device in self._fleet.cohort:
                peer = self._peers[self._fleet.of(device).name]
                table = unpack(
                    peer.places, row.kept, len(peer.words), row.truth, row.ids, row.logps
                )
                self._held[device] = row.round, table
