"""Settings are strict and name the nearest key; bad examples are named by file, line and byte."""

import json
import lzma
import tomllib
from pathlib import Path

import pytest

from edge_sdk.agent import EdgeDevice
from edge_sdk.collect import Example, ExampleStore, read_examples
from edge_sdk.config import DeviceSection, EdgeConfig
from edge_sdk.errors import ConfigError, DataError, StorageError
from edge_sdk.store.outbox import OutboxRules
from edge_sdk.store.settings import read_secret
from edge_sdk.wire.config_rules import parse_overrides, parse_toml, template


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[trian]\n", r"unknown key 'trian'; did you mean 'train'\?"),
        ("[train]\nthread = 1", r"unknown key 'train.thread'; did you mean 'threads'\?"),
        ("[train]\nzzz = 1", "unknown key 'train.zzz'; known here: checkpoint_s, enabled"),
        ('[train]\nthreads = "1"', r"'train.threads' is '1'; allowed: a whole number >= 0"),
        (
            "[train]\nthreads = -1",
            "'train.threads' is -1; allowed: a whole number >= 0 and <= 1024",
        ),
        ("[train]\nthreads = true", "'train.threads' is True; allowed: a whole number"),
        ("[train]\nenabled = 1", "'train.enabled' is 1; allowed: true or false"),
        ("[data]\nheld_out = nan", "'data.held_out' is nan; allowed: a number >= 0.0 and <= 0.9"),
        ('[link]\nbroker = "somewhere"', "'link.broker' is 'somewhere'; allowed: text matching"),
        ('[link]\nmqtt_version = "4"', "allowed: one of '3.1.1', '5'"),
        ('[device]\nfamilies = ["a", "b c"]', "allowed: a list, each text matching"),
        ("train = 3", r"'train' must be a section \[train\]"),
        ("[train\n", "is not valid TOML"),
    ],
)
def test_a_wrong_setting_names_file_key_and_range(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "edge.toml"
    path.write_text(text)

    with pytest.raises(ConfigError, match=said) as caught:
        EdgeConfig.load(path)

    assert str(path) in str(caught.value)


def test_overrides_are_typed_by_the_settings() -> None:
    given = parse_overrides(
        ["--train.threads=8", "--train.enabled=false", "--link.username=007", "--data.held_out=0"]
    )

    config = parse_toml("[train]\nthreads = 2", EdgeConfig, "edge.toml", overrides=given)

    assert config.train.threads == 8
    assert config.train.enabled is False
    assert config.link.username == "007"
    assert config.data.held_out == 0.0


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--train.threds=8", "unknown key 'threds'; did you mean 'threads'"),
        ("--train.threads=8x", "'8x' is not a whole number"),
        ("--train.threads=9999", "'train.threads' is 9999"),
    ],
)
def test_a_wrong_override_is_named(argument: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_toml("", EdgeConfig, "edge.toml", overrides=parse_overrides([argument]))


@pytest.mark.parametrize("argument", ["train.threads=8", "--threads=8", "--train.threads"])
def test_what_is_no_override_is_refused(argument: str) -> None:
    with pytest.raises(ConfigError, match="not an override"):
        parse_overrides([argument])


def test_the_template_is_valid_and_names_every_setting() -> None:
    text = template(EdgeConfig, {"link.broker": "mqtts://broker:8883"})

    config = parse_toml(text, EdgeConfig, "template")
    without_marks = "\n".join(
        line.removeprefix("# ") if " = " in line else line for line in text.splitlines()
    )

    assert config.link.broker == "mqtts://broker:8883"
    assert tomllib.loads(without_marks)["train"]["threads"] == EdgeConfig().train.threads


def test_paths_start_at_the_settings_file(tmp_path: Path) -> None:
    path = tmp_path / "edge.toml"
    path.write_text('[device]\nstate_dir = "state"\n[data]\nexamples = "own.jsonl"')

    config = EdgeConfig.load(path)

    assert config.device.state_dir == str(tmp_path / "state")
    assert config.data.examples == str(tmp_path / "own.jsonl")
    assert config.link.ca_file == ""


def test_a_missing_or_binary_settings_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the settings file"):
        EdgeConfig.load(tmp_path / "absent.toml")
    (tmp_path / "edge.toml").write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigError, match="not UTF-8 text: byte 5"):
        EdgeConfig.load(tmp_path / "edge.toml")


def test_a_secret_is_the_first_line_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hunter2\nrest")

    assert read_secret(str(tmp_path / "secret")) == "hunter2"
    assert read_secret("") == ""


# --- examples ---------------------------------------------------------------------------------


def _lines(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def test_examples_are_read_plain_and_compressed(tmp_path: Path) -> None:
    data = _lines({"q": "hello", "kind": "greeting"}, {"q": "who?", "kind": "question"})
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(data))

    found = [
        read_examples(tmp_path / name, text_column="q", label_column="kind")
        for name in ("a.jsonl", "a.jsonl.xz")
    ]

    assert found[0] == found[1] == [Example("hello", "greeting"), Example("who?", "question")]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "holds no examples"),
        (b"\n\n", "holds no examples"),
        (
            _lines({"text": "a", "label": "b"}) + b'{"text": "\xe9"}\n',
            "line 2 is not UTF-8: byte 38",
        ),
        (_lines({"text": "a"}), "line 1 has no column 'label'; it has text"),
        (_lines({"text": " ", "label": "b"}), "line 1: column 'text' is not a non-empty text"),
        (_lines({"text": 3, "label": "b"}), "column 'text' is not a non-empty text"),
        (_lines(["a"]), "line 1 is not a JSON object"),
        (b"{nonsense\n", "line 1 is not JSON"),
        (b"[" * 100_000 + b"\n", "line 1 is not JSON"),
        (b"x" * (2 << 20), "line 1 is over"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_bad_examples_are_named_by_line(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_bytes(data)

    with pytest.raises(DataError, match=said) as caught:
        read_examples(path)

    assert str(path) in str(caught.value)


def test_a_missing_or_broken_example_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        read_examples(tmp_path / "absent.jsonl")
    (tmp_path / "cut.jsonl.xz").write_bytes(
        lzma.compress(_lines({"text": "a", "label": "b"}))[:-20]
    )
    with pytest.raises(DataError, match="cannot read"):
        read_examples(tmp_path / "cut.jsonl.xz")


def test_the_split_survives_reopening_and_shares_no_text(tmp_path: Path) -> None:
    examples = [Example(f"text {i}", "a" if i % 2 else "b") for i in range(200)]
    with_store = ExampleStore(tmp_path / "e.db", held_out=0.25)
    assert with_store.add(examples) == 200
    before = with_store.held_out()
    with_store.close()

    store = ExampleStore(tmp_path / "e.db", held_out=0.25)
    assert store.add(examples) == 0
    held, training = store.held_out(), store.training()
    store.close()

    assert held == before
    assert 30 <= len(held) <= 70
    assert len(held) + len(training) == 200
    assert not {x.text for x in held} & {x.text for x in training}


def test_the_store_is_bounded_private_and_refuses_bad_examples_whole(tmp_path: Path) -> None:
    store = ExampleStore(tmp_path / "e.db", held_out=0.0, limit=10)

    store.add([Example(f"text {i}", "a") for i in range(25)])
    for bad in (Example("", "a"), Example("x", " "), Example("\ud800", "a")):
        with pytest.raises(DataError, match="example 1 "):
            store.add([Example("never kept", "a"), bad])
    kept = [example.text for example in store.training()]
    store.close()

    assert kept == [f"text {i}" for i in range(15, 25)]
    assert (tmp_path / "e.db").stat().st_mode & 0o077 == 0


def test_a_damaged_example_store_says_so(tmp_path: Path) -> None:
    (tmp_path / "e.db").write_bytes(b"not a database" * 100)

    with pytest.raises(StorageError, match=r"e\.db refused"):
        ExampleStore(tmp_path / "e.db")


def test_the_outbox_obeys_the_settings(tmp_path: Path) -> None:
    text = f'[device]\nstate_dir = "{tmp_path / "state"}"\noutbox_mb = 1\n'
    config = parse_toml(text, EdgeConfig, "edge.toml")

    with EdgeDevice(config) as device:
        device._mailbox.put("coordinator", "Scores", "a", bytes(600_000))
        with pytest.raises(StorageError, match="cap of 1048576"):
            device._mailbox.put("coordinator", "Scores", "b", b"b" * 600_000)

    defaults = DeviceSection()
    assert OutboxRules() == OutboxRules(
        defaults.outbox_mb * 2**20, defaults.outbox_days * 86_400, defaults.when_full
    )
