"""When an Ask is met: which waiting replies count for it, and when it cannot be met any more.

Knows freshness, lateness and the program's own check. Does not know time or threads; the runner
asks again whenever something arrived.

A reply is *fresh* if it answers the very words of this Ask, whoever sent them first: this process
or the one before a crash. It is *late* if it answers an earlier task of the same kind.
"""

import logging

from coordinator.fleet import Fleet
from coordinator.inbox import Inbox, Waiting
from coordinator.programs import LATE_STEPS, Ask
from coordinator.store import AskRow, Store
from edge_sdk.errors import FleetError, QuorumMissed, StorageError

logger = logging.getLogger(__name__)

Taken = list[tuple[Waiting, int]]
"""Replies with their staleness."""


def late_limit(kind: str) -> int:
    """Return how many commits late a reply to a task of this kind may be, unless the Ask says."""
    return LATE_STEPS if kind in {"TrainAdapter", "TopLogits"} else 0


class Quorum:
    """One Ask being waited for. Its methods are called with `inbox.changed` held."""

    def __init__(
        self, ask: Ask, rows: dict[str, AskRow], inbox: Inbox, store: Store, fleet: Fleet
    ) -> None:
        self.ask = ask
        self._rows, self._inbox, self._store, self._fleet = rows, inbox, store, fleet
        first = next(iter(rows.values()))
        self._run, self._kind = first.run, first.kind
        limit = ask.max_staleness
        self._limit = late_limit(self._kind) if limit is None else limit
        self._answered: frozenset[str] = frozenset()

    @property
    def found(self) -> str:
        """Say how many of how many replies are there."""
        return f"{len(self._answered)} of {self.ask.need} useful replies to {self._kind}"

    @property
    def answered(self) -> tuple[str, ...]:
        """The devices whose replies those are, in order."""
        return tuple(sorted(self._answered))

    def met(self, used: frozenset[int]) -> Taken | None:
        """Return the replies if they suffice, sorted by device, or None to go on waiting.

        A device that is excused is not waited for: without it one reply less suffices.

        `used`: letters already delivered since the last Commit, not to be late for another Ask.

        Raises:
            QuorumMissed: every device has answered and it is not enough.
        """
        fresh, late = self._candidates(used)
        late = _once(fresh, late)
        closed = self._closed()  # once for both questions below: a refusal may come at any moment
        # With need = everyone the round is synchronous: a late reply stands for nobody else's.
        pool = fresh if self.ask.need == len(self._rows) else fresh + late
        self._answered = frozenset(waiting.row.device for waiting, _ in pool)
        excused = sum(state == "excused" for state in closed.values())
        if len(self._answered) >= max(1, min(self.ask.need, len(self._rows) - excused)):
            return sorted(fresh + late, key=lambda pair: (pair[0].row.device, pair[0].letter))
        if {waiting.row.device for waiting, _ in fresh} | closed.keys() >= self._rows.keys():
            raise QuorumMissed(
                f"{self.found}: every device answered, the others refused; "
                "retry, skip the step or ask others",
                self.answered,
            )
        return None

    def _candidates(self, used: frozenset[int]) -> tuple[Taken, Taken]:
        numbers = {row.ask for row in self._rows.values()}
        fresh: Taken = []
        late: Taken = []
        for waiting in list(self._inbox.waiting.values()):
            row = waiting.row
            if row.ask in numbers:
                if self._passes(waiting):
                    fresh.append((waiting, 0))
                continue
            if self._limit == 0 or waiting.letter in used:
                continue
            if (row.run, row.kind) != (self._run, self._kind):
                continue
            staleness = self._store.commits_since(row.run, row.step)
            if staleness <= self._limit and self._passes(waiting):
                late.append((waiting, staleness))
        return fresh, late

    def _passes(self, waiting: Waiting) -> bool:
        if waiting.checked:
            return True
        if self._store.counted(waiting.row):
            self._inbox.put_away(waiting, "this device has counted in this round already")
            return False
        if self.ask.check is None:
            return True
        try:
            self.ask.check(waiting.row.device, waiting.message)
        except StorageError:
            raise  # ours, not the device's
        except Exception as exc:  # whatever a device's bytes provoke must not end the round
            reason = str(exc)
            if not isinstance(exc, FleetError | ValueError):
                logger.exception("a reply of %s broke its check", waiting.row.device[:12])
                reason = f"it could not be checked ({type(exc).__name__})"
            self._inbox.refuse(
                waiting.letter, waiting.row.device, waiting.message, reason, step="update"
            )
            self._inbox.put_away(waiting, reason)
            return False
        waiting.checked = True
        return True

    def _closed(self) -> dict[str, str]:
        """How each task ended that nobody need wait for: its state, or "gone" with its device."""
        closed = {}
        for device, row in self._rows.items():
            now = self._store.ask_of_task(row.task)
            state = "gone" if now is None else now.state
            if state != "open" or not self._fleet.is_active(device):
                closed[device] = "gone" if state == "open" else state
        return closed


def _once(fresh: Taken, late: Taken) -> Taken:
    """The late replies without those of a round in which their device answers anyway.

    A program that asks for one round in two ways (after a crash, say) would count a device twice.
    """
    seen = {(waiting.row.device, waiting.row.round) for waiting, _ in fresh}
    kept: Taken = []
    for waiting, staleness in late:
        key = (waiting.row.device, waiting.row.round)
        if key not in seen:
            seen.add(key)
            kept.append((waiting, staleness))
    return kept
