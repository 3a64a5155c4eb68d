"""The history checker finds each planted violation, and nothing in a history that is right."""

import os
from pathlib import Path

import pytest

from tests.torture.history import Did, History, Verdict, check

GOOD: dict[str, list[tuple[Did, dict[str, object]]]] = {
    "a": [
        (Did.MODEL, {"version": 1}),
        (Did.SENT, {"update": "a1", "value": 3}),
        (Did.DONE, {"update": "a1"}),
        (Did.MODEL, {"version": 2}),
        (Did.SENT, {"update": "a2", "value": 4}),
        (Did.DONE, {"update": "a2"}),
        (Did.SENT, {"update": "a3", "value": 5}),
        (Did.DONE, {"update": "a3"}),
    ],
    "b": [
        (Did.SENT, {"update": "b1", "value": 10}),
        (Did.DONE, {"update": "b1"}),
        (Did.SENT, {"update": "b2", "value": 20}),
        (Did.PARKED, {"update": "b2", "reason": "too large"}),
        (Did.SENT, {"update": "b3", "value": 30}),
    ],
    "coordinator": [
        (Did.RESUMED, {"run": "r", "step": -1, "attempt": ""}),
        (Did.ATTEMPT, {"run": "r", "step": 0, "attempt": "x", "parts": [["a1", 3]], "total": 3}),
        # Killed before its Commit; then made again, with more.
        (Did.RESUMED, {"run": "r", "step": -1, "attempt": ""}),
        (
            Did.ATTEMPT,
            {"run": "r", "step": 0, "attempt": "y", "parts": [["a1", 3], ["b1", 10]], "total": 13},
        ),
        (Did.COMMITTED, {"run": "r", "step": 0, "attempt": "y"}),
        (Did.ATTEMPT, {"run": "r", "step": 1, "attempt": "z", "parts": [["a2", 4]], "total": 17}),
        # Killed after its Commit, before it could say so; the next process tells.
        (Did.RESUMED, {"run": "r", "step": 1, "attempt": "z"}),
        (Did.REJECTED, {"update": "a3", "reason": "too late"}),
    ],
}


def judged(folder: Path, *extra: tuple[str, Did, dict[str, object]], drop: str = "") -> Verdict:
    """Write GOOD without the lines that mention `drop`, then `extra`, and check it."""
    for party, lines in GOOD.items():
        with History(folder / f"{party}.jsonl") as history:
            for did, values in lines:
                if not drop or drop not in f"{did} {values}":
                    history(did, **values)
            for who, did, values in extra:
                if who == party:
                    history(did, **values)
    return check(folder)


def test_a_history_with_kills_that_kept_every_promise_is_right(tmp_path: Path) -> None:
    verdict = judged(tmp_path)

    assert verdict.ok, verdict
    assert (verdict.sent, verdict.acknowledged, verdict.aggregated) == (6, 4, 3)
    assert (verdict.rejected, verdict.steps, verdict.waiting) == (2, 2, ["b3"])


def test_an_acknowledged_update_in_no_aggregate_is_lost(tmp_path: Path) -> None:
    verdict = judged(tmp_path, drop="rejected")

    assert verdict.lost == ["a3"]
    assert not verdict.ok


def test_an_attempt_that_no_commit_confirms_does_not_count(tmp_path: Path) -> None:
    verdict = judged(tmp_path, drop="'step': 1, 'attempt': 'z'}")

    assert verdict.lost == ["a2"]


def test_an_update_in_two_aggregates_is_doubled(tmp_path: Path) -> None:
    again = {"run": "r", "step": 2, "attempt": "w"}
    verdict = judged(
        tmp_path,
        ("coordinator", Did.ATTEMPT, {**again, "parts": [["a1", 3]], "total": 20}),
        ("coordinator", Did.COMMITTED, again),
    )

    assert verdict.doubled == ["a1"]
    assert not verdict.broken


def test_an_update_twice_in_one_aggregate_is_doubled(tmp_path: Path) -> None:
    last = {"run": "r", "step": 2, "attempt": "w"}
    verdict = judged(
        tmp_path,
        ("coordinator", Did.ATTEMPT, {**last, "parts": [["b3", 30], ["b3", 30]], "total": 77}),
        ("coordinator", Did.COMMITTED, last),
    )

    assert verdict.doubled == ["b3"]
    assert not verdict.broken


@pytest.mark.parametrize(
    ("party", "did", "values", "told"),
    [
        ("a", Did.MODEL, {"version": 1}, "a went from model 2 to 1"),
        ("coordinator", Did.REJECTED, {"update": "a1"}, "a1 is in an aggregate and rejected"),
        ("a", Did.PARKED, {"update": "a1"}, "a1 was parked, and aggregated"),
        ("a", Did.PARKED, {"update": "a3"}, "a3 was parked, and acknowledged"),
        (
            "coordinator",
            Did.RESUMED,
            {"run": "r", "step": 0, "attempt": "y"},
            "r went on after step 0, 1 was committed",
        ),
        (
            "coordinator",
            Did.RESUMED,
            {"run": "r", "step": -1, "attempt": ""},
            "r went on after step -1, 1 was committed",
        ),
        (
            "coordinator",
            Did.RESUMED,
            {"run": "r", "step": 1, "attempt": "y"},
            "r step 1 was changed after its commit",
        ),
        (
            "coordinator",
            Did.COMMITTED,
            {"run": "r", "step": 1, "attempt": "z"},
            "r step 1 was committed again",
        ),
        (
            "coordinator",
            Did.COMMITTED,
            {"run": "r", "step": 2, "attempt": "?"},
            "r step 2 holds an attempt that nobody made",
        ),
    ],
)
def test_planted_violation(
    tmp_path: Path, party: str, did: Did, values: dict[str, object], told: str
) -> None:
    verdict = judged(tmp_path, (party, did, values))

    assert verdict.broken == [told]
    assert not verdict.ok


@pytest.mark.parametrize(
    ("parts", "total", "told"),
    [
        ([["b3", 30]], 46, "r step 2 says 46, its parts give 47"),
        ([["b3", 31]], 48, "b3 was sent as 30 and counted as 31"),
        ([["c1", 1]], 18, "c1 was aggregated and never sent"),
    ],
)
def test_planted_sum(tmp_path: Path, parts: list[list[object]], total: int, told: str) -> None:
    last = {"run": "r", "step": 2, "attempt": "w"}
    verdict = judged(
        tmp_path,
        ("coordinator", Did.ATTEMPT, {**last, "parts": parts, "total": total}),
        ("coordinator", Did.COMMITTED, last),
    )

    assert verdict.broken == [told]


def test_a_torn_line_is_counted_and_the_next_process_writes_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with History(path) as history:
        history(Did.SENT, update="a1", value=1)
    file = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.write(file, b'{"did":"done","upd')
    os.close(file)
    with History(path) as history:
        history(Did.SENT, update="a2", value=1)

    verdict = check(tmp_path)

    assert (verdict.torn, verdict.sent, verdict.acknowledged) == (1, 2, 0)


def test_what_the_coordinator_holds_is_neither_lost_nor_aggregated(tmp_path: Path) -> None:
    verdict = judged(tmp_path, ("coordinator", Did.HELD, {"update": "a3"}), drop="rejected")

    assert verdict.ok
    assert verdict.held == ["a3"]
