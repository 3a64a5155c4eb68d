"""The replay window against a set that remembers everything."""

import random

import pytest

from edge_sdk.errors import RemoteProtocolError
from edge_sdk.wire.replay import WINDOW, take


@pytest.mark.parametrize("seed", range(20))
def test_no_number_is_taken_twice_and_none_within_reach_is_refused(seed):
    rng = random.Random(seed)
    taken: set[int] = set()
    highest, seen = 0, 0

    for _ in range(2000):
        number = max(0, highest + rng.choice([-1, 1]) * rng.randrange(rng.choice([2, 10, 70, 200])))
        welcome = number > 0 and number not in taken and number > highest - WINDOW
        try:
            highest, seen = take(highest, seen, number)
        except RemoteProtocolError:
            assert not welcome
        else:
            assert welcome
            taken.add(number)
        assert highest == max(taken, default=0)
        assert seen < 1 << WINDOW


def test_a_peer_that_counts_far_ahead_costs_no_memory():
    highest, seen = take(5, 1, 2**63 - 1)

    assert (highest, seen) == (2**63 - 1, 1)
