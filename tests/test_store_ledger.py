"""The ledger: a line before the first byte, a chain that shows every change, sums of the past."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_sdk.errors import StorageError
from edge_sdk.store.ledger import Ledger
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire.messages import Refused, Scores, encode
from edge_sdk.wire.seal import Identity, seal

NOW = 1_700_000_000


@pytest.fixture
def mailbox(tmp_path: Path) -> Iterator[Mailbox]:
    with Mailbox(tmp_path / "mailbox.db") as made:
        yield made


def post(mailbox: Mailbox, number: int) -> tuple[bytes, bytes]:
    """A message in the outbox, and the manifest it would be announced with."""
    message = Scores(f"score-{number}", (0.25, 0.5))
    stream = mailbox.put("coordinator", "Scores", message.task_id, encode(message))
    sealed = seal(
        encode(message),
        tenant="home",
        sender_id="a",
        recipient_id="coordinator",
        kind="Scores",
        task=message.task_id,
        stream=stream,
        sequence=1,
        created_s=NOW,
        expires_s=NOW + 60,
        sender=Identity.generate(),
        recipient=Identity.generate().public,
    )
    return stream, sealed.manifest


def sent(mailbox: Mailbox, ledger: Ledger, number: int, *, refused: str = "") -> bytes:
    stream, manifest = post(mailbox, number)
    item = mailbox.posted(stream)
    assert item is not None
    ledger.begin(item, manifest)
    ledger.count(stream, 300)
    ledger.count(stream, 50)
    with mailbox.transaction():
        mailbox.mark_done(stream)
        ledger.end(stream, refused=refused)
    ledger.forget(stream)
    return stream


def test_an_entry_names_fields_and_sizes_and_never_a_value(mailbox: Mailbox) -> None:
    ledger = Ledger(mailbox, lambda: NOW)

    stream = sent(mailbox, ledger, 7)

    (entry,) = ledger.entries()
    assert (entry.kind, entry.task) == ("Scores", "score-7")
    assert (entry.to, entry.stream, entry.state) == ("coordinator", stream.hex(), "acknowledged")
    assert entry.fields == {"task_id": 8, "scores": 19}
    assert (entry.wire_bytes, entry.whole, entry.local_s) == (350, True, NOW)
    assert entry.plain_bytes == len(encode(Scores("score-7", (0.25, 0.5))))
    with mailbox.transaction() as db:
        assert "0.25" not in str(db.execute("SELECT * FROM ledger").fetchall())


def test_a_refused_message_keeps_its_reason_and_one_on_its_way_is_listed(mailbox: Mailbox) -> None:
    ledger = Ledger(mailbox, lambda: NOW)
    sent(mailbox, ledger, 1, refused="too large")
    stream, manifest = post(mailbox, 2)
    item = mailbox.posted(stream)
    assert item is not None
    ledger.begin(item, manifest)
    ledger.begin(item, manifest)  # a resend in the same process

    first, second = ledger.entries()

    assert (first.state, first.note) == ("refused", "too large")
    assert (second.state, second.whole) == ("on its way", False)
    assert ledger.verify() == 3


def test_a_restart_is_told_and_only_a_kill_leaves_bytes_unknown(mailbox: Mailbox) -> None:
    for clean in (True, False):
        stream, manifest = post(mailbox, int(clean))
        item = mailbox.posted(stream)
        assert item is not None
        first = Ledger(mailbox, lambda: NOW)
        first.begin(item, manifest)
        first.count(stream, 100)
        if clean:
            first.close()
        second = Ledger(mailbox, lambda: NOW)
        second.begin(item, manifest)
        second.count(stream, 40)
        second.end(stream)

        entry = second.entries()[-1]

        assert (entry.wire_bytes, entry.whole) == ((140, True) if clean else (40, False))


CHANGES = {
    "a size": "UPDATE ledger SET wire_bytes = 1 WHERE line = 4",
    "a recipient": "UPDATE ledger SET recipient = 'nobody' WHERE line = 3",
    "a field": "UPDATE ledger SET fields = '{}' WHERE line = 1",
    "a line taken out": "DELETE FROM ledger WHERE line = 3",
    "the first line": "DELETE FROM ledger WHERE line = 1",
    "the last line": "DELETE FROM ledger WHERE line = 6",
    "all lines": "DELETE FROM ledger",
    "two lines exchanged": "UPDATE ledger SET line = CASE line WHEN 3 THEN -1 ELSE line END",
    "the head": "UPDATE ledger_head SET line = 5",
}


@pytest.mark.parametrize("case", sorted(CHANGES))
def test_a_changed_past_is_noticed(mailbox: Mailbox, case: str) -> None:
    ledger = Ledger(mailbox, lambda: NOW)
    for number in range(3):
        sent(mailbox, ledger, number)
    assert ledger.verify() == 6

    with mailbox.transaction() as db:
        db.execute(CHANGES[case])

    with pytest.raises(StorageError, match="the ledger was altered"):
        ledger.verify()


def test_the_past_becomes_sums_and_stays_verifiable(mailbox: Mailbox) -> None:
    ledger = Ledger(mailbox, lambda: NOW, max_lines=20)
    for number in range(60):
        sent(mailbox, ledger, number)

    past, kept = ledger.past(), ledger.entries()

    assert len(kept) <= 20
    assert past["kinds"]["Scores"]["messages"] + sum(bool(e.fields) for e in kept) == 60
    total = past["kinds"]["Scores"]["wire_bytes"] + sum(e.wire_bytes for e in kept)
    assert total == 60 * 350
    ledger.verify()
    with mailbox.transaction() as db:
        db.execute("UPDATE ledger_head SET past = replace(past, '350', '351')")
        db.execute("UPDATE ledger_head SET past = replace(past, 'messages\": ', 'messages\": 1')")
    with pytest.raises(StorageError, match="the sums of its past"):
        ledger.verify()


def test_since_leaves_older_messages_out(mailbox: Mailbox) -> None:
    times = iter(range(NOW, NOW + 100, 10))
    ledger = Ledger(mailbox, lambda: next(times))
    for number in range(3):
        sent(mailbox, ledger, number)  # two lines each

    assert [entry.task for entry in ledger.entries(since_s=NOW + 20)] == ["score-1", "score-2"]


def test_a_line_that_cannot_be_stored_stops_the_message(mailbox: Mailbox) -> None:
    ledger = Ledger(mailbox, lambda: NOW)
    stream = mailbox.put("coordinator", "Refused", "t", encode(Refused("t", "no")))
    item = mailbox.posted(stream)
    _, manifest = post(mailbox, 1)
    assert item is not None
    with mailbox.transaction() as db:
        db.execute(
            "CREATE TRIGGER full BEFORE INSERT ON ledger BEGIN SELECT RAISE(ABORT, 'full'); END"
        )

    with pytest.raises(Exception, match="full"):
        ledger.begin(item, manifest)

    assert ledger.entries() == []
