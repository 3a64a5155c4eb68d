"""Programs are plain generators: driven by `send`, without network, store or clock."""

import pytest
from coordinator_world import train, update

from coordinator.programs import Ask, Commit, Note, Program, Publish, Release, Reply, Tell
from coordinator.store import state_digest
from edge_sdk.errors import QuorumMissed
from edge_sdk.wire.messages import OfferData, OfferModel


def summing(resume: Commit | None, rounds: int = 2) -> Program:
    total = 0 if resume is None else int(resume.state["total"])
    for step in range(0 if resume is None else resume.step + 1, rounds):
        try:
            replies = yield Ask(train(step), ("a", "b"), need=2, within_s=1.0)
        except QuorumMissed:
            yield Note({"missed": step})
            continue
        total += sum(reply.message.examples for reply in replies)
        yield Commit(step, {"total": str(total).encode()})


def replies_to(ask: Ask) -> tuple[Reply, ...]:
    return tuple(Reply(device, update(ask.message(device))) for device in ask.to)


def test_a_program_is_driven_by_send() -> None:
    program = summing(None)

    ask = next(program)
    commit = program.send(replies_to(ask))
    second = program.send(None)

    assert (commit.step, commit.state) == (0, {"total": b"6"})
    assert second.message("a").round == 1


def test_a_program_goes_on_from_its_commit() -> None:
    program = summing(Commit(0, {"total": b"6"}))

    ask = next(program)
    commit = program.send(replies_to(ask))

    assert ask.message("a").round == 1
    assert commit.state == {"total": b"12"}
    with pytest.raises(StopIteration):
        program.send(None)


def test_a_missed_quorum_is_the_programs_to_answer() -> None:
    program = summing(None)
    next(program)

    note = program.throw(QuorumMissed("too few"))
    ask = program.send(None)

    assert note.values == {"missed": 0}
    assert ask.message("a").round == 1


def test_an_ask_can_say_something_else_to_each_device() -> None:
    ask = Ask(lambda device: train(0, seed=len(device)), ("a", "bb"), need=1, within_s=1.0)

    assert [ask.message(device).seed for device in ask.to] == [1, 2]


def test_a_release_makes_its_offer() -> None:
    release = Release("slm", "base", ("slm/base/symbiont.json",), {"1.root.json": b"{}"})

    offer = release.offer()

    assert isinstance(offer, OfferModel)
    assert (offer.release, offer.targets) == ("base", ("slm/base/symbiont.json",))


def test_requests_are_values() -> None:
    data = OfferData("d", 1, ("text",), ("sum",), (1.0,))

    assert Tell(data, ("a",)) == Tell(data, ("a",))
    with pytest.raises(AttributeError):
        Note({}).values = {}  # type: ignore[misc]
    assert Publish.__slots__


def test_the_digest_of_a_state_tells_names_from_bytes() -> None:
    assert state_digest({"a": b"b"}) != state_digest({"ab": b""})
    assert state_digest({"a": b"1", "b": b"2"}) == state_digest({"b": b"2", "a": b"1"})
