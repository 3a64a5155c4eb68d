"""The command line: exit codes 0, 1 and 2, one sentence of complaint, one object with --json."""

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from edge_sdk import cli, commands, doctor
from edge_sdk.config import EdgeConfig
from edge_sdk.errors import LinkError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def only_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of this room, whatever else is installed."""
    points = [EntryPoint("edge", "edge_sdk.commands", cli.GROUP)]
    monkeypatch.setattr(cli, "entry_points", lambda group: points)


def test_doctor_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["doctor", "--json"])

    found = json.loads(capsys.readouterr().out)
    assert code == 0
    assert found["healthy"] is True
    assert {"python", "wheels core", "processor", "clock", "disk"} <= {
        check["check"] for check in found["checks"]
    }


def test_doctor_fails_when_something_required_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "FREE_MB", 1 << 50)

    assert cli.main(["doctor"]) == 1
    assert "fail  disk" in capsys.readouterr().out


def test_doctor_names_an_unreachable_broker(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edge_sdk.link.mqtt import MqttLink

    def refuse(self: MqttLink, *, wait_s: float = 0.0) -> None:
        raise LinkError("connection refused")

    monkeypatch.setattr(MqttLink, "connect", refuse)

    assert cli.main(["doctor", "--broker", "mqtt://127.0.0.1:1"]) == 1
    assert "fail  broker" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("now", "verdict"), [(0.0, "warn"), (doctor.BUILT_S + 1.0, "ok"), (5e9, "warn")]
)
def test_doctor_judges_the_clock(now: float, verdict: str) -> None:
    assert doctor._clock(now).verdict == verdict


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["edge"], ["edge", "run", "--nonsense"], ["edge", "ask"]]
)
def test_misuse_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)

    assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_no_command_prints_help_and_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "doctor" in capsys.readouterr().err


def test_bad_settings_are_2_with_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "edge.toml").write_text("[trian]\n")

    code = cli.main(["edge", "status", "--config", str(tmp_path / "edge.toml")])

    assert code == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("symbiont: ")
    assert complaint.count("\n") == 1
    assert "did you mean 'train'?" in complaint


def test_init_writes_settings_that_load_and_never_overwrites(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "edge.toml"
    arguments = ["edge", "init", "--config", str(path), "--broker", "mqtts://broker.example:8883"]

    assert cli.main(arguments) == 0
    assert EdgeConfig.load(path).link.broker == "mqtts://broker.example:8883"
    assert cli.main(arguments) == 2
    assert "choose another name" in capsys.readouterr().err


def test_refusals_are_1_and_an_object_with_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "edge.toml"
    cli.main(["edge", "init", "--config", str(path)])
    capsys.readouterr()
    for arguments, kind in (
        (["enrol", "nonsense"], "EnrolmentError"),
        (["run"], "EnrolmentError"),
        (["ask", "hello"], "EnrolmentError"),
    ):
        assert cli.main(["edge", *arguments, "--config", str(path), "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["error"] == kind


def test_status_and_explain_work_before_enrolment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "edge.toml"
    cli.main(["edge", "init", "--config", str(path)])
    capsys.readouterr()

    assert cli.main(["edge", "status", "--config", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["enrolled"] is False
    assert cli.main(["edge", "explain", "--config", str(path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["leaving"]
    assert {row["message"] for row in rows} >= {"Enrol", "AdapterUpdate", "ModelReport"}
    assert cli.main(["edge", "explain", "--config", str(path), "--set", "train.threads=1"]) == 0
    assert "AdapterUpdate" in capsys.readouterr().out


def test_a_code_comes_from_a_file_as_well(tmp_path: Path) -> None:
    (tmp_path / "code").write_text(" symbiont1:abc \n")

    assert commands._code("", str(tmp_path / "code")) == "symbiont1:abc"


def test_a_group_without_its_extra_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = [EntryPoint("coordinator", "no_such_module_anywhere", cli.GROUP)]
    monkeypatch.setattr(cli, "entry_points", lambda group: points)

    assert cli.main(["coordinator", "serve", "--port", "1"]) == 1
    assert "pip install 'symbiont[coordinator]'" in capsys.readouterr().err
    cli.main([])
    assert "coordinator" in capsys.readouterr().err


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return set(done.stdout.split())


def test_importing_the_package_loads_next_to_nothing() -> None:
    loaded = loaded_after("import edge_sdk")

    assert not {"numpy", "msgspec", "sqlite3", "cryptography", "torch", "tuf"} & loaded


def test_the_device_loads_no_runtime_before_it_is_needed() -> None:
    statement = "from edge_sdk import EdgeDevice, EdgeConfig, SlmSession\nimport edge_sdk.cli"

    loaded = {name.split(".")[0] for name in loaded_after(statement)}

    heavy = {"torch", "transformers", "peft", "onnxruntime", "onnxruntime_genai", "tokenizers"}
    assert not heavy & loaded


def test_telemetry_of_the_runtime_is_off_from_the_first_import() -> None:
    code = "import edge_sdk, os\nprint(os.environ['ORT_DISABLE_TELEMETRY'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )

    assert done.stdout.strip() == "1"
