"""The short forms of the figures about bytes: B1 to B4, B12, P1, P2, P7 and L7.

The full ones: `python -m tests.torture --full --only B1,B2,B3,B4,B12,P1,P2,P7,L7`.
"""

import base64
from pathlib import Path

import pytest

from edge_sdk.store.mailbox import Acceptance, Mailbox
from tests.torture import (
    b1_mutations,
    b2_replays,
    b3_fuzzing,
    b4_bombs,
    b12_pickle,
    l7_cost,
    p1_vectors,
    p2_capture,
    p7_keys,
)
from tests.torture.parsers import outcome, parsers
from tests.torture.result import Result, Run, Scale

SEED = 7


def short(run: Run, folder: Path) -> Result:
    result = run(Scale.SHORT, SEED, folder)
    assert result.passed, str(result)
    return result


def test_b1_no_mutated_envelope_opens(tmp_path):
    result = short(b1_mutations.run, tmp_path)

    assert result.value == 0
    assert len(result.notes["tried"]) > 40


def test_b1_would_notice_an_envelope_that_opens():
    world = b1_mutations.make_world(SEED, hybrid=False)
    honest = world.seal(40)

    assert world.opens(
        b1_mutations.Case("honest", honest.manifest, honest.chunks, world.sender.public)
    )


def test_b2_no_replay_is_taken(tmp_path):
    result = short(b2_replays.run, tmp_path)

    assert (result.lost, result.doubled) == (0, 0)
    assert result.notes["restarts"] > 5


def test_b2_would_notice_a_mailbox_that_forgets(tmp_path, monkeypatch):
    monkeypatch.setattr(Mailbox, "accepted", lambda *_: False)
    monkeypatch.setattr(Mailbox, "accept", lambda *_: Acceptance.NEW)

    result = b2_replays.run(Scale.SHORT, SEED, tmp_path)

    assert not result.passed
    assert result.doubled


@pytest.mark.parametrize("name", parsers())
def test_b3_a_parser_answers_any_bytes_with_a_value_or_its_own_error(name):
    report = b3_fuzzing.mutate(parsers()[name], SEED)

    assert not report.crashes
    assert report.cases >= b3_fuzzing.SHORT_CASES


@pytest.mark.parametrize("name", parsers())
def test_b3_honest_examples_are_taken(name):
    """Else the fuzzing would stop at the first check."""
    parser = parsers()[name]

    assert outcome(parser, parser.seeds[0]) == "taken"


def test_b3_what_fuzzing_found():
    """Inputs that once ended in an error that is not the parser's own."""
    found = {
        "codes, right sum": base64.b64decode(
            "U3lDMQECxlVc9BAtEyo5AAAASnSMTfwqPE83AGk/Tj8B7gHv5JqOtkMvaIiK+rS4x///W///MEkhyZEN"
            "hR4Jn4Ynm2dAj1Ub78odcRUuTzcAaT9OU/TvKrI="
        ),
        "settings": b"a = " + b"[" * 100_000,
    }
    for name, data in found.items():
        assert outcome(parsers()[name], data) == parsers()[name].errors[0].__name__


@pytest.mark.parametrize(
    ("parser", "make"),
    [pytest.param(parser, make, id=name) for name, parser, make in b4_bombs.bombs()],
)
def test_b4_a_bomb_is_refused_in_time_and_memory(parser, make):
    result, seconds, grown_mb = b4_bombs.set_off(parsers()[parser], make())

    assert result != "taken"
    assert not result.startswith("crash")
    assert seconds < b4_bombs.LIMIT_S
    assert grown_mb < b4_bombs.LIMIT_MB


def test_b12_nothing_unpickles_or_reads_without_end(tmp_path):
    assert short(b12_pickle.run, tmp_path).notes["modules"] > 100


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "import numpy as np; np.load('x')",
        "import numpy as np; np.load('x', allow_pickle=True)",
        "import torch; torch.load('x')",
        "import torch; torch.load('x', weights_only=False)",
        "eval('1')",
        "load('x', trust_remote_code=True)",
        "data = socket.recv()",
        "data = response.read()",
        "data = path.read_bytes()",
    ],
)
def test_b12_the_rule_sees_what_it_is_there_for(tmp_path, monkeypatch, line):
    path = tmp_path / "edge_sdk" / "wire" / "some.py"
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    monkeypatch.setattr(b12_pickle, "ROOT", tmp_path)

    assert list(b12_pickle.faults(path))


def test_p1_every_vector_fits(tmp_path):
    result = short(p1_vectors.run, tmp_path)

    assert {name: result.notes[name] for name in p1_vectors.PUBLISHED} == p1_vectors.PUBLISHED
    assert result.notes["age_refusals"] >= 16


@pytest.mark.broker
def test_p2_a_recording_of_the_broker_holds_no_secret(tmp_path):
    short(p2_capture.run, tmp_path)


def test_p7_no_key_is_logged(tmp_path):
    short(p7_keys.run, tmp_path)


def test_l7_the_seal_is_cheap(tmp_path):
    short(l7_cost.run, tmp_path)


def test_f12_what_version_1_sealed_and_stored_still_opens():
    """Changed before the first release only: `python tests/vectors/freeze.py v1` makes it anew."""
    folders = sorted((p1_vectors.HERE).glob("v[0-9]*"))

    assert folders
    assert list(p1_vectors.CHECKS["frozen"]()) == [True] * 22 * len(folders)
