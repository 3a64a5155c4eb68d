"""The table of legal moves: both sides agree, and the README shows the real one."""

from pathlib import Path
from typing import get_args

import pytest

from edge_sdk.errors import LocalProtocolError, RemoteProtocolError
from edge_sdk.wire import messages, session
from edge_sdk.wire.messages import (
    AnyMessage,
    File,
    ModelReport,
    OfferData,
    OfferModel,
    Refused,
    Score,
    Scores,
    WantFiles,
)
from edge_sdk.wire.session import LEGAL, Role, Session, State, table_as_markdown

OFFER = OfferModel("t-1", "chat", "r-1", {}, ())
WANT = WantFiles("t-1", ("a",))
FILE = File("t-1", "a", b"x")
REPORT = ModelReport("t-1", "r-1", 0.5, 10, 1.0, 1.0, {})
SCORE = Score("t-2", "r-1", ("text",), ("label",))
SCORES = Scores("t-2", (0.5,))


def test_both_ends_follow_one_conversation():
    coordinator, device = Session(Role.COORDINATOR), Session(Role.DEVICE)

    for message in (OFFER, FILE):
        if message is FILE:
            device.send(WANT)
            coordinator.receive(WANT)
        assert coordinator.send(message) == device.receive(message)
    assert device.send(REPORT) == coordinator.receive(REPORT) == State.CLOSED

    assert coordinator.state("t-1") == device.state("t-1") == State.OPEN


def test_conversations_do_not_disturb_each_other():
    coordinator = Session(Role.COORDINATOR)
    coordinator.send(OFFER)
    coordinator.send(SCORE)

    coordinator.receive(SCORES)

    assert coordinator.state("t-1") == State.OFFERING


def test_an_illegal_move_is_the_speakers_fault():
    coordinator, device = Session(Role.COORDINATOR), Session(Role.DEVICE)
    coordinator.send(OFFER)
    device.receive(OFFER)

    with pytest.raises(LocalProtocolError, match="the device may not say Scores in task t-2"):
        device.send(SCORES)
    with pytest.raises(RemoteProtocolError, match="the device may not say Scores"):
        coordinator.receive(SCORES)
    with pytest.raises(RemoteProtocolError, match="the device may not say OfferModel"):
        coordinator.receive(OFFER)
    with pytest.raises(LocalProtocolError):
        coordinator.send(FILE)
    assert coordinator.state("t-1") == State.OFFERING


def test_an_answer_comes_once():
    coordinator = Session(Role.COORDINATOR)
    coordinator.send(SCORE)
    coordinator.receive(Refused("t-2", "busy"))

    with pytest.raises(RemoteProtocolError):
        coordinator.receive(SCORES)


def test_a_peer_cannot_open_conversations_without_end(monkeypatch):
    monkeypatch.setattr(session, "MAX_CONVERSATIONS", 3)
    device = Session(Role.DEVICE)
    for number in range(3):
        device.receive(Score(f"t-{number}", "r", (), ()))

    with pytest.raises(RemoteProtocolError, match="unanswered"):
        device.receive(Score("t-3", "r", (), ()))
    device.receive(OfferData("t-4", 1, (), (), ()))  # closed at once, so it takes no place


def test_every_word_of_the_vocabulary_has_a_place_and_every_state_an_end():
    said = {kind for roles in LEGAL.values() for moves in roles.values() for kind in moves}
    assert said == set(get_args(AnyMessage))

    reaches_the_end = {State.CLOSED}
    for _ in State:
        for state, roles in LEGAL.items():
            if any(
                after in reaches_the_end for moves in roles.values() for after in moves.values()
            ):
                reaches_the_end.add(state)
    assert reaches_the_end == set(State)


def test_the_readme_shows_this_table():
    readme = Path(messages.__file__).with_name("README.md").read_text()

    assert readme.endswith(table_as_markdown() + "\n")
