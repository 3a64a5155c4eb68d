"""The commands as a user meets them: what they print, and with which code they end."""

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from coordinator import commands
from edge_sdk import cli
from edge_sdk.wire.enrolment import EnrolmentCode

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _only_our_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("coordinator", "coordinator.commands", cli.GROUP)
    monkeypatch.setattr(cli, "entry_points", lambda group: [point])


@pytest.fixture
def config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert cli.main(["coordinator", "init", str(tmp_path / "cloud")]) == 0
    capsys.readouterr()
    return tmp_path / "cloud" / "coordinator.toml"


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_init_writes_settings_that_load_and_private_keys(config: Path) -> None:
    keys = config.parent / "state" / "keys"

    assert "# First part of all topics" in config.read_text()
    assert sorted(path.name for path in keys.iterdir()) == ["coordinator.key", "root.key"]
    assert all(path.stat().st_mode & 0o077 == 0 for path in keys.iterdir())
    assert run("coordinator", "status", "--config", config) == 0


def test_traffic_is_told_by_round_with_the_files_that_were_asked_for() -> None:
    def note(**values: object) -> dict[str, object]:
        return {"event": "note", "run": "fedavg", **values}

    def files(size: int) -> dict[str, object]:
        return {"event": "files", "device": "a", "count": 1, "bytes": size}

    rounds = [{"round": i, "bytes_up": 10 + i, "bytes_down": 20 + i} for i in range(2)]
    events = [files(500), note(baseline=True), files(7), note(**rounds[0]), note(**rounds[1])]

    assert commands._traffic(events) == [
        {"run": "fedavg", **rounds[0], "files": 507},
        {"run": "fedavg", **rounds[1], "files": 0},
    ]


def test_init_never_overwrites(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("coordinator", "init", config.parent) == 2
    assert "exists" in capsys.readouterr().err


def test_a_token_is_printed_once_and_belongs_to_the_root(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("device", "token", "--device", "kitchen-1", "--config", config, "--json") == 0

    code = EnrolmentCode.from_text(json.loads(capsys.readouterr().out)["code"])
    stored = b"".join(path.read_bytes() for path in (config.parent / "state").glob("*.db*"))
    assert (code.device, code.tenant) == ("kitchen-1", "home")
    assert code.secret not in stored


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["device", "token", "--device", "coordinator"], 2, "choose another"),
        (["device", "token", "--device", "a b"], 2, "not a device name"),
        (["device", "token", "--device", "a", "--hours", "48"], 2, "86400"),
        (["device", "revoke", "nobody"], 1, "no device nobody here"),
        (["device", "list"], 0, ""),
        (["coordinator", "lineage"], 0, ""),
        (["coordinator", "serve"], 2, "no Hugging Face folder"),
        (["coordinator", "serve", "--set", "program.round=1"], 2, "did you mean 'rounds'"),
        (["coordinator", "serve", "--set", "program.rounds=0"], 2, ">= 1"),
    ],
)
def test_exit_codes(
    config: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    sentence: str,
) -> None:
    assert run(*arguments, "--config", config) == code
    assert sentence in capsys.readouterr().err


def test_a_failure_in_json_is_an_object(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("device", "revoke", "nobody", "--config", config, "--json") == 1

    failure = json.loads(capsys.readouterr().out)
    assert failure["error"] == "EnrolmentError"


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('tenant = "home"', 'tenent = "home"', "did you mean 'tenant'"),
        ('tenant = "home"', "tenant = 5", "allowed: text"),
        ("# cohort = 1", "cohort = 0", "'program.cohort' is 0; allowed: a whole number >= 1"),
        ("# need = 0", "need = 4", "no round could complete"),
        ('[" question"," summary"]', '[" question"," summary"," x"]', "one word per label"),
        ('path = "models/llm"', '# path = ""', "needs llm.path"),
    ],
)
def test_a_bad_setting_is_named(
    config: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, sentence: str
) -> None:
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new, 1))

    assert run("coordinator", "status", "--config", config) == 2
    assert sentence in capsys.readouterr().err


def test_a_missing_settings_file_is_misuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("coordinator", "status", "--config", tmp_path / "none.toml") == 2
    assert "none.toml" in capsys.readouterr().err


def test_the_commands_load_no_torch() -> None:
    code = "import coordinator.commands, sys; print('torch' in sys.modules)"

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "False"


def test_settings_left_out_are_the_algorithms_own_defaults(tmp_path: Path) -> None:
    from coordinator.algorithms.crosslm import CrossLMConfig
    from coordinator.assembly import crosslm_config
    from coordinator.config import CoordinatorConfig

    run("coordinator", "init", tmp_path / "cloud")
    config = CoordinatorConfig.load(
        tmp_path / "cloud" / "coordinator.toml",
        {"llm.path": "models/llm", "program.name": "crosslm"},
    )

    assert crosslm_config(config) == CrossLMConfig()
