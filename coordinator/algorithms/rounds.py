"""What every round of adapters does, whichever algorithm runs it: ask, merge, try, take back.

Knows requests and their answers. Does not know what an algorithm makes of them, nor how a round
that is not kept is undone.
"""

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import replace
from typing import Any

from coordinator.aggregate import Aggregate
from coordinator.exchange import AdapterExchange
from coordinator.gate import Gate
from coordinator.programs import (
    Ask,
    Blame,
    Note,
    Publish,
    Release,
    Reply,
    Request,
    TaskFor,
    Withdraw,
)
from edge_sdk.errors import QuorumMissed, RemoteProtocolError
from edge_sdk.train.lora import Factors
from edge_sdk.wire.messages import ModelReport


def patiently(request: Ask, retries: int) -> Generator[Request, Any, tuple[Reply, ...]]:
    """Ask up to `retries` more times in the same words; replies that had arrived are kept.

    Raises:
        QuorumMissed: the last attempt missed its quorum too.
    """
    for left in range(retries, -1, -1):
        try:
            replies: tuple[Reply, ...] = yield request
            return replies
        except QuorumMissed as exc:
            if left == 0:
                raise
            yield Note({"quorum_missed": str(exc), "retries_left": left})
    raise AssertionError("unreachable")


def measured(request: Ask) -> Generator[Request, Any, tuple[Reply, ...]]:
    """Ask for reports; a missing quorum costs the numbers, not the round."""
    try:
        replies: tuple[Reply, ...] = yield request
    except QuorumMissed as exc:
        yield Note({"quorum_missed": str(exc)})
        return ()
    return replies


def gathered(request: Ask) -> Generator[Request, Any, tuple[Reply, ...]]:
    """Ask; where some refuse or stay silent, go on with those that did answer, or with none.

    Nobody is asked a second time: the answers that came are taken up by asking only their senders.
    """
    try:
        replies: tuple[Reply, ...] = yield request
        return replies
    except QuorumMissed as exc:
        yield Note({"quorum_missed": str(exc)})
        here = exc.answered
    if not here:
        return ()
    return (yield from measured(replace(request, to=here, need=len(here))))


def merge(
    exchange: AdapterExchange, gate: Gate, replies: tuple[Reply, ...]
) -> Generator[Request, Any, tuple[Aggregate | None, list[Factors], str]]:
    """Take updates in, tell on outliers, and look at what came out.

    Returns the aggregate, the changes that count, and why nothing of it may be kept ("" if it may).
    """
    try:
        merged, changes = exchange.receive(replies)
    except RemoteProtocolError as exc:  # each passed its check; together they leave float16
        return None, [], str(exc)
    for device, reason in sorted(merged.outliers.items()):
        yield Blame(device, reason)
    return merged, changes, gate.measured(exchange.factors)


def learn(exchange: AdapterExchange, changes: Sequence[Factors]) -> Generator[Request, Any, None]:
    """Learn the codec from a round's decoded changes; say what became of one that had aged."""
    old, aged = exchange.codec.codec_id, exchange.aged
    exchange.learn_codec(changes)
    if aged:
        sent, fell = exchange.fallbacks[old]
        new = exchange.codec
        done = "kept" if new.codec_id == old else "refreshed" if new.basis else "dropped"
        yield Note(
            {
                "codec": done,
                "family": exchange.family,
                "aged": old,
                "updates": sent,
                "fallbacks": fell,
                "new": new.codec_id,
            }
        )


Offers = Callable[[Release], TaskFor]
"""How a release is offered to each device."""


def tried(
    wish: Publish,
    cohort: tuple[str, ...],
    within_s: float,
    gate: Gate,
    *,
    instead: str,
    offers: Offers,
) -> Generator[Request, Any, tuple[str, tuple[Reply, ...]]]:
    """Publish a release, let devices measure it, and take it back if it is worse than before.

    Returns why it was taken back ("" if it was not), and the devices' reports on it.
    """
    release = yield wish
    reports: tuple[Reply, ...] = ()
    fault = "it was withdrawn"
    if not release.withdrawn:
        reports = yield from measured(Ask(offers(release), cohort, len(cohort), within_s))
        fault = gate.reported(reports)
    if fault:
        former = yield Withdraw(wish.family, wish.release, instead, fault)
        yield from measured(Ask(offers(former), cohort, len(cohort), within_s))
    return fault, reports


def lineage(step: int, replies: tuple[Reply, ...], merged: Aggregate | None) -> dict[str, Any]:
    """What a round's release is made from, for the registry."""
    return {
        "round": step,
        "updates": [[reply.device, reply.staleness, *reply.letter_ids] for reply in replies],
        "left_out": sorted(merged.outliers) if merged else [],
    }


def told(left_out: Collection[str], fault: str) -> dict[str, Any]:
    """What a Note says of updates and rounds that were not kept; nothing if all were."""
    said: dict[str, Any] = {"left_out": sorted(left_out)} if left_out else {}
    return said | ({"rolled_back": fault} if fault else {})


def mean_accuracy(replies: tuple[Reply, ...]) -> float | None:
    """Accuracy on the devices' own held-out text, weighted by its size; None without reports."""
    reports = [reply.message for reply in replies if isinstance(reply.message, ModelReport)]
    total = sum(report.examples for report in reports)
    if total == 0:
        return None
    return round(sum(report.accuracy * report.examples for report in reports) / total, 4)
