"""What a broker does not say about its limits is guessed; a bad network is not taken for it."""

from edge_sdk.link.limits import FIRST_GUESS_S, RIGHT_AFTER_S, STRIKES, SizeGuess

BIG, SMALL = 65_574, 400


class Time:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def cut_off(guess: SizeGuess, times: int) -> None:
    for _ in range(times):
        guess.taken(SMALL)
        guess.sent(BIG)
        guess.cut([BIG, SMALL])


def test_cuts_right_after_large_messages_give_a_limit_for_some_time() -> None:
    clock = Time()
    guess = SizeGuess(clock)

    cut_off(guess, STRIKES - 1)
    assert guess.limit > BIG
    cut_off(guess, 1)
    assert guess.limit == BIG - 1

    clock.now += FIRST_GUESS_S
    assert guess.limit > BIG
    cut_off(guess, 1)  # still not: believed again at once, and for longer
    clock.now += FIRST_GUESS_S
    assert guess.limit == BIG - 1
    clock.now += FIRST_GUESS_S
    assert guess.limit > BIG


def test_one_large_message_that_is_taken_ends_the_suspicion() -> None:
    guess = SizeGuess(Time())
    cut_off(guess, STRIKES - 1)

    guess.taken(BIG)
    cut_off(guess, STRIKES)

    assert guess.limit > BIG


def test_cuts_for_another_reason_are_not_counted() -> None:
    clock = Time()
    guess = SizeGuess(clock)
    for _ in range(3 * STRIKES):
        guess.sent(BIG)
        clock.now += RIGHT_AFTER_S + 1.0  # a slow line
        guess.cut([BIG])
        guess.taken(SMALL)
        guess.sent(SMALL)
        guess.cut([SMALL])

    assert guess.limit > BIG
