"""`symbiont ask` and `symbiont chat`, as a user types them and as a script pipes them."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import openai
import pytest

from edge_sdk import chat_commands, cli
from edge_sdk.agent import EdgeDevice
from edge_sdk.runtime import SlmSession
from tests.chat_world import CONTEXT, world
from tests.edge_world import Coordinator, config, offer, releases
from tests.test_edge_device import enrolled

ROOT = Path(__file__).resolve().parent.parent
SYMBIONT = [sys.executable, "-m", "edge_sdk"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def bundle() -> list[str]:
    return ["--bundle", str(world().bundle)]


@pytest.fixture(scope="module")
def session() -> Iterator[SlmSession]:
    with SlmSession(world().bundle) as opened:
        yield opened


def piped(arguments: list[str], text: str | bytes) -> subprocess.CompletedProcess[bytes]:
    data = text if isinstance(text, bytes) else text.encode()
    return subprocess.run(
        [*SYMBIONT, *arguments], input=data, cwd=ROOT, capture_output=True, check=False, timeout=60
    )


def test_ask_prints_the_answer(
    bundle: list[str], session: SlmSession, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["ask", "hello", *bundle, "--max-tokens", "12"]) == 0
    assert capsys.readouterr().out == session.generate("hello", max_tokens=12) + "\n"


def test_ask_prints_one_object(
    bundle: list[str], session: SlmSession, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["ask", "hello", *bundle, "--max-tokens", "12", "--json", "--stop", "zzzz"])

    found = json.loads(capsys.readouterr().out)
    assert found["answer"] == session.generate("hello", max_tokens=12)
    assert (found["finish"], found["prompt_tokens"], found["tokens"]) == ("length", 5, 12)
    assert found["tokens_per_s"] > 0


def test_ask_with_an_adapter_a_system_a_label_and_a_schema(
    bundle: list[str],
    session: SlmSession,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def asked(*more: str) -> str:
        assert cli.main(["ask", "hello", *bundle, "--max-tokens", "40", *more]) == 0
        return capsys.readouterr().out.removesuffix("\n")

    (tmp_path / "schema.json").write_text('{"enum": ["yes", "no"]}')
    plain = asked()

    assert asked("--adapter", str(world().adapter)) != plain
    with session.conversation("Be kind.") as talk:
        assert asked("--system", "Be kind.") == "".join(talk.say("hello", max_tokens=40))
    assert asked("--classify") == session.classify("hello")
    assert json.loads(asked("--schema", str(tmp_path / "schema.json"))) in ("yes", "no")
    assert asked("--temperature", "1.5", "--seed", "3") == session.generate(
        "hello", max_tokens=40, temperature=1.5, seed=3
    )


def test_a_chat_model_is_asked_in_its_own_form(
    bundle: list[str], session: SlmSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chatty = tmp_path / "chatty"
    chatty.mkdir()
    for path in world().bundle.iterdir():
        if path.name != "symbiont.json":  # it lists the files, and here is one more
            (chatty / path.name).symlink_to(path)
    (chatty / "chat_template.jinja").write_text("<{{ messages[0].content }}>")

    assert cli.main(["ask", "hello", "--bundle", str(chatty), "--max-tokens", "9"]) == 0
    assert capsys.readouterr().out == session.generate("<hello>", max_tokens=9) + "\n"
    assert cli.main(["ask", "hello", "--bundle", str(chatty), "--max-tokens", "9", "--raw"]) == 0
    assert capsys.readouterr().out == session.generate("hello", max_tokens=9) + "\n"


def test_ask_reads_stdin(bundle: list[str], session: SlmSession) -> None:
    done = piped(["ask", "-", *bundle, "--max-tokens", "9", "--stats"], "grüße")

    assert done.stdout.decode() == session.generate("grüße", max_tokens=9) + "\n"
    assert b"7 tokens read, 9 written" in done.stderr
    refused = piped(["ask", "-", *bundle], b"\xff\xfe")
    assert refused.returncode == 1
    assert refused.stderr == b"symbiont: the text is not UTF-8; convert it\n"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["ask", "x"], 2, "no settings file edge.toml; name a bundle folder"),
        (["ask", "x", "--bundle", "nowhere"], 1, "nowhere is not a model bundle"),
        (["ask", " ", "BUNDLE"], 1, "the prompt is empty"),
        (["ask", "x" * 5000, "BUNDLE"], 1, f"5000 tokens and the model's context is {CONTEXT}"),
        (["ask", "x", "BUNDLE", "--adapter", "nowhere"], 1, "nowhere"),
        (["ask", "x", "BUNDLE", "--schema", "nowhere"], 2, "cannot read the schema file nowhere"),
        (["ask", "x", "BUNDLE", "--top-p", "7"], 1, "top_p is 7.0; allowed: above 0, at most 1"),
        (["serve-local"], 2, "no settings file edge.toml"),
        (["serve-local", "nowhere"], 1, "nowhere is not a model bundle"),
        (["serve-local", "DIR", "DIR"], 2, "two models are called tiny; give one a name"),
        (["serve-local", "DIR", "--adapter", "x"], 2, "is not NAME=FILE"),
        (["serve-local", "DIR", "--key-file", "nowhere"], 2, "cannot read the key file nowhere"),
        (["serve-local", "DIR", "--host", "0.0.0.0", "--port", "0"], 2, "there is no key"),
    ],
)
def test_what_goes_wrong_is_one_sentence(
    arguments: list[str],
    code: int,
    said: str,
    bundle: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = []
    for argument in arguments:
        given += bundle if argument == "BUNDLE" else [argument.replace("DIR", bundle[1])]

    assert cli.main(given) == code

    complaint = capsys.readouterr().err
    assert said in complaint
    assert complaint.startswith("symbiont: ")
    assert complaint.count("\n") == 1


@pytest.mark.parametrize("options", [["--max-tokens", "0"], ["--time", "-1"], ["--seed", "x"]])
def test_misuse_is_2(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["ask", "x", *options])
    assert ended.value.code == 2


def test_a_piped_chat_is_a_conversation(bundle: list[str], session: SlmSession) -> None:
    said = "hello\n\nand you?\n/stats\nwhy\n/reset\nhello\n/quit\nnever read\n"
    done = piped(["chat", *bundle, "--max-tokens", "8", "--json"], said)

    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    with session.conversation() as talk:
        expected = ["".join(talk.say(x, max_tokens=8)) for x in ("hello", "and you?", "why")]
    assert [answer["answer"] for answer in answers] == [*expected, expected[0]]
    assert answers[2]["prompt_tokens"] > answers[1]["prompt_tokens"] > answers[0]["prompt_tokens"]


def test_a_piped_chat_fails_when_the_context_is_full(bundle: list[str]) -> None:
    done = piped(["chat", *bundle, "--max-tokens", "8"], f"hello\n{'x' * 5000}\nhello\n")

    assert done.returncode == 1
    assert done.stdout.count(b"\n") >= 1
    assert b"begin anew with reset()" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_chat_whose_reader_has_gone_ends_quietly(bundle: list[str]) -> None:
    process = subprocess.Popen(
        [*SYMBIONT, "chat", *bundle, "--max-tokens", "2000"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    process.stdout.read(1)
    process.stdout.close()
    process.stdin.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(30) == 0


class Terminal:
    """A chat at a terminal of its own."""

    def __init__(self, arguments: list[str]) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [*SYMBIONT, "chat", *arguments],
            cwd=ROOT,
            env=ENVIRONMENT | {"TERM": "dumb"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_own_terminal,
        )
        os.close(slave)
        self.seen = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()  # nothing, if the test has seen it end
        self.process.wait()

    def wait_for(self, text: bytes) -> bytes:
        """What was shown up to `text`, which must come within half a minute."""
        assert self._comes(text, 30), self.seen
        shown, _, self.seen = self.seen.partition(text)
        return shown

    def interrupt(self, answer: bytes) -> None:
        """Ctrl-C at a prompt, again if need be: Python's readline forgets to look at a signal that
        comes between showing the prompt and waiting for a key."""
        for _ in range(10):
            self.type(b"\x03")
            if self._comes(answer, 3):
                self.wait_for(answer)
                return
        pytest.fail(f"ten Ctrl-C and no {answer!r}: {self.seen!r}")

    def _comes(self, text: bytes, within_s: float) -> bool:
        deadline = time.monotonic() + within_s
        while text not in self.seen:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._master], [], [], left)[0]:
                return False
            self.seen += os.read(self._master, 4096)
        return True

    def type(self, text: bytes) -> None:
        os.write(self._master, text)

    def close(self) -> int:
        drain = threading.Thread(target=self._drain, daemon=True)
        drain.start()
        code = self.process.wait(30)
        drain.join(10)
        os.close(self._master)
        return code

    def _drain(self) -> None:
        try:
            while os.read(self._master, 4096):
                pass
        except OSError:
            pass


def _own_terminal() -> None:
    import fcntl
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs begin without it
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_ctrl_c_ends_the_answer_and_not_the_program(bundle: list[str]) -> None:
    with Terminal([*bundle, "--max-tokens", str(CONTEXT - 100), "--stats"]) as terminal:
        terminal.wait_for(b"> ")
        terminal.type(b"hello\n")
        terminal.wait_for(b"hello\r\n")
        while len(terminal.seen) < 50:  # the answer is on its way
            terminal.seen += os.read(terminal._master, 4096)
        terminal.type(b"\x03")

        shown = terminal.wait_for(b"cancelled]")
        assert b"\x1b" not in shown
        terminal.wait_for(b"> ")
        terminal.interrupt(b"/quit ends")  # at the prompt it only clears the line
        terminal.wait_for(b"> ")
        terminal.type(b"/reset\n")
        terminal.wait_for(b"> ")
        terminal.type(b"/help\n")
        terminal.wait_for(b"forget the conversation")
        terminal.wait_for(b"> ")
        terminal.type(b"\x04")
        assert terminal.close() == 0


def test_ctrl_c_ends_ask_with_130(bundle: list[str]) -> None:
    process = subprocess.Popen(
        [*SYMBIONT, "ask", "hello", *bundle, "--max-tokens", str(CONTEXT - 100)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    with process.stdout:
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
    assert process.wait(30) == 130


# --- the device's own model -------------------------------------------------------------------


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    made = Coordinator(tmp_path, releases(tmp_path))
    yield made
    made.close()


def test_the_devices_model_is_asked_and_served_and_followed(
    coordinator: Coordinator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A release that arrives in another process is served from the next request on."""
    settings = tmp_path / "edge.toml"
    settings.write_text(f'[device]\nstate_dir = "{tmp_path / "state"}"\n')
    link = coordinator.broker.link("kitchen-1")
    with EdgeDevice(config(tmp_path), link=link) as device:
        enrolled(coordinator, device)
        coordinator.send("kitchen-1", offer(coordinator.publisher, "r1"))
        coordinator.talk(device, until=2)
        ask = ["ask", "hello", "--config", str(settings), "--max-tokens", "8"]
        assert cli.main(ask) == 0
        plain = device.session.generate("hello", max_tokens=8)
        assert capsys.readouterr().out == plain + "\n"

        from edge_sdk.serve import serve

        with EdgeDevice(config(tmp_path), link=coordinator.broker.link("none")) as reader:
            models = chat_commands.DeviceModels(reader)
            with (
                serve(models) as server,
                openai.OpenAI(base_url=server.url, api_key="x", max_retries=0) as client,
            ):

                def asked() -> str:
                    found = client.completions.create(model="tiny", prompt="hello", max_tokens=8)
                    return found.choices[0].text

                assert asked() == plain
                coordinator.replies.clear()
                coordinator.send("kitchen-1", offer(coordinator.publisher, "a1"))
                coordinator.talk(device, until=2)
                changed = device.session.generate("hello", max_tokens=8)
                assert changed != plain
                assert asked() == changed
