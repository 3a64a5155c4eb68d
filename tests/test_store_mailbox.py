"""The mailbox: nothing acknowledged is lost, nothing is accepted twice."""

import contextlib
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from edge_sdk.errors import LocalProtocolError, RemoteProtocolError, StorageError
from edge_sdk.store.mailbox import Acceptance, Mailbox, OutboxRules, Slice
from edge_sdk.wire.replay import WINDOW
from edge_sdk.wire.seal import CHUNK_BYTES, Header

HEADER = Header(
    version=1, suite=1, tenant="acme", sender="kitchen-1", sender_key=bytes(8),
    recipient="coordinator", recipient_key=bytes(8), kind="AdapterUpdate", task="t-1",
    stream=bytes(16), sequence=1, created_s=1, expires_s=2, plaintext_bytes=5,
    chunk_bytes=CHUNK_BYTES, chunks=1,
)  # fmt: skip


def header(number: int, **changed) -> Header:
    own = {"sequence": number, "task": f"t-{number}", "stream": number.to_bytes(16, "big")}
    return replace(HEADER, **(own | changed))


@pytest.fixture
def mailbox(tmp_path):
    with Mailbox(tmp_path / "mail.db") as opened:
        yield opened


# --- outbox


def test_a_posted_message_waits_until_it_is_done(tmp_path):
    path = tmp_path / "mail.db"
    with Mailbox(path) as mailbox:
        stream = mailbox.put("coordinator", "Scores", "t-1", b"hello")
        mailbox.keep_seal(stream, b"manifest", b"key")
    with Mailbox(path) as mailbox:
        item = mailbox.posted(stream)
        assert mailbox.pending() == [stream]
        assert item is not None
        assert (item.to, item.kind, item.task, item.message) == (
            "coordinator", "Scores", "t-1", b"hello",
        )  # fmt: skip
        assert (item.sequence, item.manifest, item.file_key) == (1, b"manifest", b"key")

        assert mailbox.mark_done(stream)

        assert not mailbox.mark_done(stream)
        assert mailbox.posted(stream) is None
        assert mailbox.pending() == []
        with pytest.raises(LocalProtocolError):
            mailbox.keep_seal(stream, b"", b"")


def test_numbers_are_counted_per_peer_and_never_used_twice(tmp_path):
    numbers = []
    for _ in range(2):
        with Mailbox(tmp_path / "mail.db") as mailbox:
            for peer in ("a", "b", "a"):
                stream = mailbox.put(peer, "Score", "t", b"")
                numbers.append((peer, mailbox.posted(stream).sequence))
                mailbox.mark_done(stream)

    assert numbers == [("a", 1), ("b", 1), ("a", 2), ("a", 3), ("b", 2), ("a", 4)]


def test_one_message_to_many_is_stored_once(mailbox):
    before = mailbox.used_bytes()
    message = random.Random(0).randbytes(1_000_000)

    streams = [mailbox.put(f"device-{n}", "File", "t", message) for n in range(20)]

    assert mailbox.used_bytes() - before < 1_200_000
    for stream in streams[:-1]:
        mailbox.mark_done(stream)
    assert mailbox.posted(streams[-1]).message == message
    mailbox.mark_done(streams[-1])
    assert mailbox.used_bytes() - before < 100_000


def test_a_parked_message_is_kept_but_not_sent(mailbox):
    parked = mailbox.put("a", "Scores", "t-1", b"x")
    other = mailbox.put("a", "Scores", "t-2", b"x")

    mailbox.park(parked, "the coordinator refused it")

    assert mailbox.pending() == [other]
    assert [item.parked for item in mailbox.parked()] == ["the coordinator refused it"]
    assert mailbox.posted(parked).message == b"x"


def test_no_more_is_pending_than_the_peers_window_holds(mailbox):
    with mailbox.transaction():
        streams = [mailbox.put("a", "Score", f"t-{n}", b"") for n in range(WINDOW + 10)]
        other = mailbox.put("b", "Score", "t", b"")

    assert mailbox.pending("a") == streams[:WINDOW]
    assert mailbox.pending() == [*streams[:WINDOW], other]
    assert mailbox.waiting() == [*streams, other]
    for stream in streams[1:WINDOW]:
        mailbox.mark_done(stream)
    assert mailbox.pending("a") == streams[:1]
    mailbox.mark_done(streams[0])
    assert mailbox.pending("a") == streams[WINDOW:]


@pytest.mark.parametrize("size", [0, 10, 600_000, 1_500_000])
def test_a_body_is_read_in_pieces_wherever_it_is_kept(mailbox, size):
    message = random.Random(size).randbytes(size)
    stream = mailbox.put("a", "File", "t", message)

    body = mailbox.posted(stream).body

    assert body.size == size
    assert b"".join(body.pieces(65_536)) == message
    assert body.piece(7, 9) == message[7:16]
    mailbox.mark_done(stream)
    assert mailbox.bodies.list() == []


def test_a_slice_of_a_file_is_sent_without_a_copy(mailbox, tmp_path):
    model = tmp_path / "model.bin"
    data = random.Random(3).randbytes(3_000_000)
    model.write_bytes(data)
    before = mailbox.used_bytes()

    stream = mailbox.put("a", "File", "t", b"head", Slice(model, 1_000_000, 1_500_000))

    body = mailbox.posted(stream).body
    assert body.read() == b"head" + data[1_000_000:2_500_000]
    assert body.piece(2, 6) == b"ad" + data[1_000_000:1_000_004]
    assert mailbox.used_bytes() - before < 100_000
    assert body.there
    model.write_bytes(b"short")
    assert not body.there
    with pytest.raises(StorageError):
        body.read()
    mailbox.mark_done(stream)
    assert model.exists()


def test_a_body_whose_message_was_undone_is_removed(mailbox):
    def post_and_fail() -> None:
        with mailbox.transaction():
            mailbox.put("a", "File", "t", bytes(2_000_000))
            raise RuntimeError("undone")

    with pytest.raises(RuntimeError):
        post_and_fail()

    assert mailbox.bodies.list() == []
    assert mailbox.bodies.used_bytes == 0


def test_a_full_outbox_refuses_and_names_its_cap(tmp_path):
    with Mailbox(tmp_path / "mail.db", outbox=OutboxRules(max_bytes=1_000_000)) as mailbox:
        stream = mailbox.put("a", "Scores", "t-1", bytes(900_000))

        with pytest.raises(StorageError, match="cap of 1000000"):
            mailbox.put("a", "Scores", "t-2", b"x" * 200_000)

        assert mailbox.pending() == [stream]
        mailbox.mark_done(stream)
        mailbox.put("a", "Scores", "t-2", b"x" * 200_000)


def test_a_full_outbox_may_give_up_the_oldest_of_a_kind_and_says_so(tmp_path):
    rules = OutboxRules(max_bytes=1_000_000, when_full="oldest")
    with Mailbox(tmp_path / "mail.db", outbox=rules) as mailbox:
        other = mailbox.put("a", "Refused", "t", bytes(300_000))
        old = [mailbox.put("a", "Scores", f"t-{n}", bytes([n]) * 300_000) for n in range(2)]

        new = mailbox.put("a", "Scores", "t-9", b"n" * 600_000)

        assert mailbox.pending() == [other, new]
        assert [item.stream for item in mailbox.parked()] == old
        assert all("outbox was full" in item.parked for item in mailbox.parked())
        assert mailbox.posted(old[0]).message == b""
        with pytest.raises(StorageError, match="cap"):
            mailbox.put("b", "Scores", "t", bytes(500_000))


def test_what_waits_too_long_at_work_is_set_aside(tmp_path):
    with Mailbox(tmp_path / "mail.db", outbox=OutboxRules(ttl_s=100.0)) as mailbox:
        old = mailbox.put("a", "Scores", "t-1", b"old")
        assert mailbox.wait_passes(60.0) == []
        new = mailbox.put("a", "Scores", "t-2", b"new")

        assert mailbox.wait_passes(60.0) == [old]

        assert mailbox.pending() == [new]
        assert "not confirmed within" in mailbox.posted(old).parked


# --- inbox


def test_a_letter_is_accepted_once_and_answered_every_time(mailbox):
    assert not mailbox.accepted(HEADER)
    assert mailbox.accept(HEADER, b"hello") is Acceptance.NEW
    assert mailbox.accept(HEADER, b"hello") is Acceptance.ALREADY

    [letter] = mailbox.unread()
    assert (letter.sender, letter.kind, letter.task, letter.message, letter.header) == (
        "kitchen-1", "AdapterUpdate", "t-1", b"hello", HEADER,
    )  # fmt: skip
    mailbox.mark_read(letter.id)

    assert mailbox.unread() == []
    assert mailbox.accepted(HEADER)
    assert mailbox.accept(HEADER, b"hello") is Acceptance.ALREADY
    assert mailbox.unread() == []


@pytest.mark.parametrize(
    "changed",
    [
        {"stream": b"s" * 16},
        {"stream": b"s" * 16, "task": "t-9"},
        {"stream": b"s" * 16, "sequence": 9},
        {"stream": b"s" * 16, "sequence": 0, "task": "t-0"},
        {"stream": b"s" * 16, "sequence": 9, "sender_key": b"k" * 8},
    ],
    ids=["all", "number", "task", "zero", "task-under-new-key"],
)
def test_a_replay_or_a_second_answer_is_refused(mailbox, changed):
    mailbox.accept(HEADER, b"hello")

    for _ in range(2):
        with pytest.raises(RemoteProtocolError):
            mailbox.accept(replace(HEADER, **changed), b"other")
    assert [letter.message for letter in mailbox.unread()] == [b"hello"]


def test_a_refused_letter_does_not_move_the_window(mailbox):
    mailbox.accept(header(1), b"")
    with pytest.raises(RemoteProtocolError):
        mailbox.accept(header(500, task="t-1"), b"")

    assert mailbox.accept(header(2), b"") is Acceptance.NEW


def test_the_window_takes_every_order_within_it_and_nothing_behind_it(mailbox):
    rng = random.Random(7)
    numbers = list(range(100, 100 + WINDOW))
    rng.shuffle(numbers)

    for number in numbers:
        assert mailbox.accept(header(number), b"") is Acceptance.NEW
    for number in numbers:
        with pytest.raises(RemoteProtocolError):
            mailbox.accept(header(number, stream=b"x" * 16, task="x"), b"")
    with pytest.raises(RemoteProtocolError, match="behind"):
        mailbox.accept(header(99), b"")
    mailbox.accept(header(2**62), b"")  # a liar who counts ahead locks out only itself
    with pytest.raises(RemoteProtocolError):
        mailbox.accept(header(101 + WINDOW), b"")
    assert mailbox.accept(header(1, sender="kitchen-2"), b"") is Acceptance.NEW


def test_a_device_with_new_keys_counts_from_one_again(mailbox):
    mailbox.accept(header(900), b"")

    assert mailbox.accept(header(1, sender_key=b"k" * 8), b"") is Acceptance.NEW


def test_replays_are_refused_across_restarts(tmp_path):
    recorded = [header(number) for number in range(1, 120)]
    for start in range(0, 119, 40):
        with Mailbox(tmp_path / "mail.db") as mailbox, mailbox.transaction():
            for one in recorded[start : start + 40]:
                mailbox.accept(one, b"")
    accepted = 0
    for seed in range(3):
        with Mailbox(tmp_path / "mail.db") as mailbox:
            before = len(mailbox.unread())
            for one in random.Random(seed).sample(recorded, len(recorded)):
                replayed = replace(one, stream=one.stream[::-1])
                try:
                    mailbox.accept(replayed, b"")
                    accepted += 1
                except RemoteProtocolError:
                    pass
            assert len(mailbox.unread()) == before == 119

    assert accepted == 0


# --- half-received transfers


def test_pieces_survive_a_restart_and_become_the_letter(tmp_path):
    message = random.Random(1).randbytes(2_000_000)
    with Mailbox(tmp_path / "mail.db") as mailbox:
        partial = mailbox.partial(HEADER.stream, b"d" * 32, len(message))
        assert partial.held_bytes == 0
        partial.write(1_000_000, message[1_000_000:])
    with Mailbox(tmp_path / "mail.db") as mailbox:
        partial = mailbox.partial(HEADER.stream, b"d" * 32, len(message))
        assert partial.piece(1_000_000, 50) == message[1_000_000:1_000_050]
        partial.write(0, message[:1_000_000])

        assert mailbox.accept(HEADER, partial) is Acceptance.NEW

        [letter] = mailbox.unread()
        assert letter.message == message
        mailbox.mark_read(letter.id)
        assert mailbox.bodies.list() == []


def test_a_small_message_from_a_file_becomes_a_row(mailbox):
    partial = mailbox.partial(HEADER.stream, b"d" * 32, 5)
    partial.write(0, b"hello")

    mailbox.accept(HEADER, partial)

    assert [letter.message for letter in mailbox.unread()] == [b"hello"]
    assert mailbox.bodies.list() == []


def test_a_message_with_its_end_missing_is_not_accepted(mailbox):
    partial = mailbox.partial(HEADER.stream, b"d" * 32, 10)
    partial.write(0, b"hello")

    with pytest.raises(StorageError, match="5 of 10"):
        mailbox.accept(HEADER, partial)
    assert mailbox.unread() == []


def test_pieces_under_another_manifest_are_not_mixed(mailbox):
    mailbox.partial(HEADER.stream, b"old" * 16, 100).write(0, b"zero")

    fresh = mailbox.partial(HEADER.stream, b"new" * 16, 100)

    assert fresh.held_bytes == 0
    assert mailbox.bodies.list() == []
    fresh.write(0, b"uno")
    mailbox.drop_partial(HEADER.stream)
    assert mailbox.bodies.list() == []


def test_half_received_messages_are_bounded_and_the_oldest_goes(tmp_path):
    with Mailbox(tmp_path / "mail.db", partial_bytes=1_000_000) as mailbox:
        for number in range(5):
            partial = mailbox.partial(number.to_bytes(16, "big"), b"d" * 32, 400_000)
            partial.write(0, bytes(400_000))
            os.utime(mailbox.bodies.folder / partial.name, (number, number))

        held = [mailbox.partial(n.to_bytes(16, "big"), b"d" * 32, 0).held_bytes for n in range(5)]

    assert held == [0, 0, 0, 400_000, 400_000]


def test_what_nobody_continues_and_what_a_crash_left_is_removed(mailbox):
    message = bytes(2_000_000)
    stream = mailbox.put("a", "File", "t", message)
    partial = mailbox.partial(HEADER.stream, b"d" * 32, len(message))
    partial.write(0, message)
    mailbox.accept(HEADER, partial)
    mailbox.bodies.put("out-crashed", [b"x"])
    mailbox.partial(b"n" * 16, b"d" * 32, 10).write(0, b"x")
    now = time.time()

    mailbox.tidy(now + 3_000)
    assert len(mailbox.bodies.list()) == 4
    mailbox.tidy(now + 2 * 3_600)
    assert len(mailbox.bodies.list()) == 3
    mailbox.tidy(now + 8 * 86_400)

    assert len(mailbox.bodies.list()) == 2
    assert mailbox.posted(stream).message == message
    assert mailbox.unread()[0].message == message


def test_unread_letters_after_one(mailbox):
    for number in range(1, 4):
        mailbox.accept(header(number), b"%d" % number)
    first = mailbox.unread()[0].id

    assert [letter.message for letter in mailbox.unread(after=first)] == [b"2", b"3"]


# --- transactions


def test_a_callers_table_joins_the_transaction(mailbox):
    mailbox.create("CREATE TABLE counted (task TEXT)")

    def accept_and_count() -> None:
        with mailbox.transaction() as db:
            mailbox.accept(HEADER, b"hello")
            db.execute("INSERT INTO counted VALUES ('t-1')")
            raise RuntimeError("not admitted")

    with pytest.raises(RuntimeError, match="not admitted"):
        accept_and_count()
    assert mailbox.unread() == []
    assert mailbox.accept(HEADER, b"hello") is Acceptance.NEW


def test_an_inner_step_can_fail_alone(mailbox):
    with mailbox.transaction():
        mailbox.accept(header(1), b"one")
        with pytest.raises(RemoteProtocolError):
            mailbox.accept(header(2, task="t-1"), b"two")
        mailbox.accept(header(3), b"three")

    assert [letter.message for letter in mailbox.unread()] == [b"one", b"three"]


def test_a_callers_own_mistake_is_not_called_a_full_disk(mailbox):
    mailbox.create("CREATE TABLE counted (task TEXT UNIQUE)")
    with pytest.raises(sqlite3.IntegrityError), mailbox.transaction() as db:
        db.executemany("INSERT INTO counted VALUES (?)", [("a",), ("a",)])
    with pytest.raises(FileNotFoundError), mailbox.transaction():
        raise FileNotFoundError("theirs")


def test_a_given_connection_is_used(tmp_path):
    connection = sqlite3.connect(tmp_path / "mail.db", check_same_thread=False)
    with Mailbox(connection) as mailbox:
        mailbox.put("a", "Score", "t", b"x")
        assert connection.execute("SELECT count(*) FROM outbox").fetchone() == (1,)


def test_threads_share_a_mailbox(mailbox):
    def post(name: str) -> None:
        for number in range(20):
            mailbox.mark_done(mailbox.put(name, "Score", f"t-{number}", b"x"))
            mailbox.put("all", "Score", f"{name}-{number}", b"y")

    threads = [threading.Thread(target=post, args=(f"p-{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    with mailbox.transaction() as db:
        rows = db.execute("SELECT sequence FROM outbox ORDER BY sequence").fetchall()
    assert rows == [(number,) for number in range(1, 81)]


# --- trouble

WRITER = """
import sys
from pathlib import Path
from dataclasses import replace
from edge_sdk.store.mailbox import Mailbox
from tests.test_store_mailbox import header

mailbox = Mailbox(Path(sys.argv[1]))
number = int(sys.argv[2])
while True:
    number += 1
    stream = mailbox.put("coordinator", "Scores", f"t-{number}", b"%d" % number)
    mailbox.put("large", "Scores", f"t-{number}", b"%d" % number + bytes(600_000))
    mailbox.accept(header(number), b"%d" % number)
    print(number, stream.hex(), flush=True)
"""


def test_whatever_was_acknowledged_survives_kill_9(tmp_path):
    path = tmp_path / "mail.db"
    acknowledged: dict[int, bytes] = {}
    rng = random.Random(11)
    for _ in range(4):
        start = max(acknowledged, default=0) + 1  # the killed one may have committed one more
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(start)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        )
        with writer:
            for _ in range(rng.randrange(5, 40)):
                number, stream = writer.stdout.readline().split()
                acknowledged[int(number)] = bytes.fromhex(stream)
            writer.send_signal(signal.SIGKILL)
            for line in writer.stdout:  # what it still managed to say
                if line.endswith("\n") and len(line.split()) == 2:
                    number, stream = line.split()
                    acknowledged[int(number)] = bytes.fromhex(stream)

    with Mailbox(path) as mailbox:
        letters = {letter.message for letter in mailbox.unread()}
        for number, stream in acknowledged.items():
            assert b"%d" % number in letters
            assert mailbox.posted(stream).message == b"%d" % number
        for stream in mailbox.pending("large"):
            assert mailbox.posted(stream).message.endswith(bytes(600_000))
        with mailbox.transaction() as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert len(letters) == len(mailbox.unread())
    assert len(acknowledged) >= 20


def fill(mailbox: Mailbox) -> list[bytes]:
    streams: list[bytes] = []

    def post_until_refused() -> None:
        while len(streams) < 10_000:
            message = random.Random(len(streams)).randbytes(20_000)
            streams.append(mailbox.put("a", "Score", f"t-{len(streams)}", message))

    with pytest.raises(StorageError) as caught:
        post_until_refused()
    assert mailbox.path in str(caught.value)
    return streams


def check_usable_when_freed(mailbox: Mailbox, streams: list[bytes]) -> None:
    for number, stream in enumerate(streams):
        assert mailbox.posted(stream).message == random.Random(number).randbytes(20_000)
    with mailbox.transaction() as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    for stream in streams[:3]:
        assert mailbox.mark_done(stream)
    assert mailbox.posted(mailbox.put("a", "Score", "again", bytes(20_000))).sequence > len(streams)


def test_a_full_file_is_reported_and_usable_again_once_freed(mailbox):
    with mailbox.transaction() as db:
        pages = db.execute("PRAGMA page_count").fetchone()[0]
    mailbox._db.execute(f"PRAGMA max_page_count = {pages + 100}")

    streams = fill(mailbox)

    assert len(streams) > 10
    with pytest.raises(StorageError, match=r"full.*free space"):
        mailbox.accept(HEADER, bytes(100_000))
    check_usable_when_freed(mailbox, streams)
    assert mailbox.accept(HEADER, b"hello") is Acceptance.NEW


def test_a_block_that_goes_on_after_a_full_disk_is_not_taken_for_done(mailbox):
    """SQLite may have undone the small message too, when the large one did not fit."""
    with mailbox.transaction() as db:
        pages = db.execute("PRAGMA page_count").fetchone()[0]
    mailbox._db.execute(f"PRAGMA max_page_count = {pages + 100}")

    def post_both() -> None:
        with mailbox.transaction():
            mailbox.put("a", "Score", "small", b"x")
            with contextlib.suppress(StorageError):
                mailbox.put("a", "Score", "large", bytes(500_000))

    try:
        post_both()
        expected = ["small"]
    except StorageError:
        expected = []
    assert [mailbox.posted(stream).task for stream in mailbox.pending()] == expected


def test_the_stores_own_limit_is_reported_and_usable_again_once_freed(tmp_path):
    with Mailbox(tmp_path / "mail.db", max_bytes=500_000) as mailbox:
        streams = fill(mailbox)

        with pytest.raises(StorageError, match="limit of 500000"):
            mailbox.accept(HEADER, bytes(500_000))
        with pytest.raises(StorageError, match="limit"):
            mailbox.partial(HEADER.stream, b"d" * 32, 500_000)
        check_usable_when_freed(mailbox, streams)


def test_a_full_disk_is_reported_and_usable_again_once_freed(tmp_path):
    """On a real small disk, where mounting one is permitted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        with Mailbox(disk / "mail.db") as mailbox:
            ballast = disk / "ballast"
            ballast.write_bytes(bytes(1_000_000))
            streams = fill(mailbox)
            ballast.unlink()
            check_usable_when_freed(mailbox, streams)
        with Mailbox(disk / "mail.db") as mailbox:
            assert set(streams[3:WINDOW]) <= set(mailbox.pending())
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_file_that_is_no_database_is_reported(tmp_path):
    path = tmp_path / "mail.db"
    path.write_bytes(b"this is not a database " * 100)

    with pytest.raises(StorageError, match=r"mail\.db.*damaged"):
        Mailbox(path)


def test_a_missing_folder_is_reported(tmp_path):
    with pytest.raises(StorageError, match="check the folder"):
        Mailbox(tmp_path / "absent" / "mail.db")


def test_nobody_else_can_read_the_file(tmp_path):
    with Mailbox(tmp_path / "mail.db") as mailbox:
        mailbox.put("a", "Score", "t", b"x")
        modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}

    assert modes == {0o600}
