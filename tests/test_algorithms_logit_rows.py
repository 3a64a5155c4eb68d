"""Sparse rows: their bytes, and everything about them that no model can have said."""

from dataclasses import replace

import numpy as np
import pytest

from edge_sdk.algorithms.logit_rows import MOST_KEPT, LogitTable, Places, check, pack, unpack
from edge_sdk.errors import RemoteProtocolError

V = 50
PLACES = Places.of([[1, 2, 3, 4], [5, 6], [7, 8, 9]], [1, 0, 2])


def honest(vocabulary: int = V, kept: int = 4) -> LogitTable:
    rng = np.random.default_rng(2)
    n = len(PLACES.tokens)
    logits = rng.normal(size=(n, vocabulary)).astype(np.float32) * 2
    logps = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.argsort(-logps, axis=1)[:, :kept].astype(np.int32)
    best = np.take_along_axis(logps, ids, axis=1).astype(np.float16)
    return LogitTable(PLACES, logps[np.arange(n), PLACES.tokens], ids, best)


def test_places_are_the_tokens_to_be_predicted() -> None:
    assert PLACES.tokens.tolist() == [2, 3, 4, 5, 6, 9]
    assert PLACES.starts.tolist() == [0, 3, 5, 6]
    assert PLACES.owner().tolist() == [0, 0, 0, 1, 1, 2]
    same = Places.of([[0, 2, 3, 4], [5, 6], [9]], [1, 0, 0])
    moved = Places.of([[2, 3], [4, 5, 6], [9]], [0, 0, 0])
    assert same.digest == PLACES.digest != moved.digest


@pytest.mark.parametrize(("vocabulary", "width"), [(V, 2), (70_000, 4)])
def test_rows_come_back_as_they_were_sent(vocabulary: int, width: int) -> None:
    table = honest(vocabulary)
    truth, ids, logps = pack(table, vocabulary)

    back = unpack(PLACES, 4, vocabulary, truth, ids, logps)

    assert len(ids) == width * 6 * 4
    assert np.array_equal(back.ids, table.ids)
    assert back.logps.tobytes() == table.logps.tobytes()
    assert back.truth.tobytes() == table.truth.tobytes()
    sums = [-table.truth[a:b].sum() for a, b in ((0, 3), (3, 5), (5, 6))]
    assert back.losses() == pytest.approx(sums, rel=1e-6)


def test_lengths_are_looked_at_before_values() -> None:
    truth, ids, logps = pack(honest(), V)
    for kept, parts, said in (
        (0, (truth, ids, logps), "0 entries"),
        (MOST_KEPT + 1, (truth, ids, logps), "129 entries"),
        (4, (truth[:-1], ids, logps), "truth has 23 bytes"),
        (4, (truth, ids + b"\0", logps), "ids has 49 bytes"),
        (3, (truth, ids, logps), "ids has 48 bytes"),
        (4, (truth, ids, b""), "logps has 0 bytes"),
    ):
        with pytest.raises(RemoteProtocolError, match=said):
            unpack(PLACES, kept, V, *parts)


def changed(**fields: object) -> LogitTable:
    return replace(honest(), **fields)


def altered(name: str, row: int, column: int, value: float) -> LogitTable:
    values = getattr(honest(), name).copy()
    if values.ndim == 1:
        values[row] = value
    else:
        values[row, column] = value
    return changed(**{name: values})


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (altered("ids", 1, 2, V), "token id 50 is outside the vocabulary of 50"),
        (altered("ids", 1, 2, -1), "token id -1 is outside"),
        (altered("logps", 0, 3, np.nan), "not finite"),
        (altered("logps", 0, 3, -np.inf), "not finite"),
        (altered("truth", 0, 0, np.nan), "not finite"),
        (altered("truth", 0, 0, 0.5), "above 0"),
        (altered("logps", 2, 3, -1e-3), "falling order"),
        (changed(logps=np.full((6, 4), -1.0, np.float16)), "mass 1.47"),
        (changed(truth=np.full(6, -1e-6, np.float32)), "the loss claimed"),
    ],
)
def test_what_no_model_can_have_said_is_refused(table: LogitTable, said: str) -> None:
    check(honest(), V)
    with pytest.raises(RemoteProtocolError, match=said):
        check(table, V)


def test_a_token_named_twice_is_refused() -> None:
    ids = honest().ids.copy()
    ids[4, 3] = ids[4, 0]
    with pytest.raises(RemoteProtocolError, match="twice"):
        check(changed(ids=ids), V)


def test_a_low_loss_can_only_be_claimed_by_teaching_the_truth() -> None:
    """Claiming the least loss that passes leaves nothing to teach but the true token."""
    logps = np.tile(np.array([-0.001, -9.0, -9.5, -10.0], np.float16), (6, 1))
    ids = np.tile(np.array([40, 41, 42, 43], np.int32), (6, 1))
    wrong = changed(ids=ids, logps=logps, truth=np.full(6, -0.001, np.float32))
    with pytest.raises(RemoteProtocolError, match="the loss claimed"):
        check(wrong, V)

    ids[:, 0] = PLACES.tokens
    check(replace(wrong, ids=ids), V)
