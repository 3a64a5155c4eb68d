"""`symbiont ask`, `symbiont chat` and `symbiont serve-local`: a model on this machine, used.

Knows arguments, the terminal and which model is meant. Does not know how answers are made
(runtime.py, conversation.py) or served (serve.py).

The model is a bundle folder (`--bundle`), or the one this machine's device runs (`--config`).
"""

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdk.config import EdgeConfig
from edge_sdk.errors import ConfigError, DataError, FleetError, RuntimeFailure
from edge_sdk.wire.config_rules import parse_overrides
from edge_sdk.wire.manifest import MANIFEST_FILE, decode_manifest

if TYPE_CHECKING:
    from edge_sdk.agent import EdgeDevice
    from edge_sdk.answer import Answer

Parsers = argparse._SubParsersAction  # argparse offers no public name for it

PORT = 8321
"""Where `serve-local` listens unless told otherwise; not one that other model servers use."""
HELP = """\
/reset  forget the conversation     /stats  show or hide tokens and speed after each answer
/help   these lines                 /quit   end (Ctrl-D too); Ctrl-C ends an answer only"""


def register(subparsers: "Parsers[argparse.ArgumentParser]") -> None:
    """Add the three commands to the command line."""
    ask = _command(subparsers, "ask", _ask, "put one question to a model on this machine")
    ask.add_argument("text", help='the text, or "-" to read it from stdin')
    ask.add_argument("--classify", action="store_true", help="answer with a label of the task")
    ask.add_argument("--raw", action="store_true", help="continue the text, without chat template")
    ask.add_argument("--schema", metavar="FILE", help="JSON schema that the answer shall fit")
    _add_model(ask)
    _add_sampling(ask)

    chat = _command(subparsers, "chat", _chat, "talk with a model on this machine")
    _add_model(chat)
    _add_sampling(chat)

    serve = _command(subparsers, "serve-local", _serve, "serve models to OpenAI clients, locally")
    serve.add_argument("bundles", nargs="*", metavar="[NAME=]BUNDLE", help="bundle folders")
    _add_device(serve)
    serve.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[MODEL:]NAME=FILE",
        help="serve this adapter as MODEL:NAME",
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    serve.add_argument("--port", type=int, default=PORT, help=f"port, 0 for a free one ({PORT})")
    serve.add_argument("--key-file", default="", help="file with the API key clients must send")
    serve.add_argument("--allow-host", action="append", default=[], metavar="NAME")
    serve.add_argument("--allow-origin", action="append", default=[], metavar="URL")
    serve.add_argument("--max-tokens", type=_positive, default=1024, help="per answer (1024)")
    serve.add_argument("--time", type=_seconds, default=300.0, help="seconds per answer (300)")
    serve.add_argument("--at-once", type=_positive, default=1, help="answers made at a time (1)")
    serve.add_argument("--waiting", type=_whole, default=16, help="requests that may wait (16)")


def _command(
    commands: "Parsers[argparse.ArgumentParser]", name: str, run: object, summary: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    parser.add_argument("--json", action="store_true", help="print JSON, one object per answer")
    parser.set_defaults(run=run)
    return parser


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="edge.toml", help="the device's settings (edge.toml)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--threads", type=_whole, default=1, help="with bundles: threads (1)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", metavar="DIR", help="this bundle, not the device's model")
    parser.add_argument("--adapter", metavar="FILE", help="with this adapter")
    parser.add_argument("--system", default="", help="what the model shall be told first")
    parser.add_argument("--stats", action="store_true", help="tokens and speed, on stderr")
    _add_device(parser)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-tokens", type=_positive, help="length of the answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest (0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from this share (1)")
    parser.add_argument("--seed", type=int, help="makes a sampled answer repeatable")
    parser.add_argument("--stop", action="append", default=[], help="end before this text")
    parser.add_argument("--time", type=_seconds, help="most seconds of an answer")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _whole(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


# --- which model ------------------------------------------------------------------------------


@contextmanager
def _model(arguments: argparse.Namespace) -> Iterator[Any]:
    """The session that the arguments mean, closed at the end."""
    with ExitStack() as stack:
        if arguments.bundle:
            session = stack.enter_context(_open(arguments.bundle, arguments.threads))
        else:
            session = stack.enter_context(_device(arguments)).session
        if arguments.adapter:
            session.set_adapter(arguments.adapter)
        yield session


def _open(bundle: str, threads: int) -> Any:
    from edge_sdk.sessions import open_session

    return open_session(bundle, threads=threads)


def _device(arguments: argparse.Namespace) -> "EdgeDevice":
    from edge_sdk.agent import EdgeDevice

    if not Path(arguments.config).exists():
        raise ConfigError(
            f"there is no settings file {arguments.config}; name a bundle folder, or write the "
            "file with `symbiont edge init`"
        )
    overrides = parse_overrides([f"--{item}" for item in arguments.set])
    return EdgeDevice(EdgeConfig.load(arguments.config, overrides))


def model_name(session: Any) -> str:
    """Return the name a model is served under: its family, which stays when its release changes."""
    folder: Path = session.folder
    try:
        return decode_manifest((folder / MANIFEST_FILE).read_bytes()).family
    except (OSError, FleetError):
        return folder.resolve().name


# --- ask and chat -----------------------------------------------------------------------------


def _ask(arguments: argparse.Namespace) -> int:
    text = given_text(arguments.text)
    options = _options(arguments)
    if arguments.schema:
        options["schema"] = _read(arguments.schema, "schema")
    with _model(arguments) as session:
        if arguments.classify:
            label = session.classify(text)
            print(json.dumps({"answer": label}) if arguments.json else label)
            return 0
        _require_writer(session)
        with _interruptible() as cancel, session.conversation(arguments.system) as talk:
            # In the form of a conversation where the model was made for those.
            plain = arguments.raw or not (is_chat_model(session) or arguments.system)
            answer = (session.stream if plain else talk.say)(text, cancel=cancel, **options)
            return _show(answer, arguments)


def given_text(text: str) -> str:
    """Return `text`, or what stdin holds where it is "-".

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        text = sys.stdin.read() if text == "-" else text
        text.encode()
    except UnicodeError as exc:
        raise DataError("the text is not UTF-8; convert it") from exc
    return text


def is_chat_model(session: Any) -> bool:
    """Return whether the model brought a form for conversations."""
    from edge_sdk.chat_template import ChatTemplate

    return not ChatTemplate(session.folder).stops


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("max_tokens", "temperature", "top_p", "seed")
    options = {name: getattr(arguments, name) for name in names}
    return options | {"stop": tuple(arguments.stop), "time_s": arguments.time}


def _require_writer(session: Any) -> None:
    if not hasattr(session, "conversation"):
        raise RuntimeFailure("this model is an encoder and writes no text; use --classify")


def _show(answer: "Answer", arguments: argparse.Namespace) -> int:
    """Print an answer as it comes, or as one object."""
    if arguments.json:
        text = "".join(answer)
        print(json.dumps({"answer": text, **_figures(answer)}), flush=True)
    else:
        for piece in answer:
            print(_printable(piece), end="", flush=True)
        print(flush=True)
        if arguments.stats:
            print(
                f"[{answer.prompt_tokens} tokens read, {len(answer.tokens)} written, "
                f"first after {answer.first_token_s * 1000:.0f} ms, "
                f"then {answer.tokens_per_s:.0f} tokens/s, {answer.finish}]",
                file=sys.stderr,
            )
    return 130 if answer.finish == "cancelled" else 0


def _printable(text: str) -> str:
    """A model must not move the cursor or retitle the window of whoever reads its answer."""
    return text.translate(_CONTROLS) if sys.stdout.isatty() else text


_CONTROLS = {i: "\ufffd" for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"}


def _figures(answer: "Answer") -> dict[str, object]:
    return {
        "finish": answer.finish,
        "prompt_tokens": answer.prompt_tokens,
        "tokens": len(answer.tokens),
        "first_token_s": round(answer.first_token_s, 4),
        "tokens_per_s": round(answer.tokens_per_s, 1),
    }


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, which then does nothing else."""
    cancel = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: cancel.set())
    try:
        yield cancel
    finally:
        signal.signal(signal.SIGINT, before)


def _chat(arguments: argparse.Namespace) -> int:
    options = _options(arguments)
    at_terminal = sys.stdin.isatty() and not arguments.json
    with _model(arguments) as session:
        _require_writer(session)
        with session.conversation(arguments.system) as talk:
            if at_terminal:
                print(f"{model_name(session)}, {session.context} tokens\n{HELP}", file=sys.stderr)
            for line in _lines(at_terminal):
                if line == "/quit":
                    break
                if line.startswith("/"):
                    _command_in_chat(line, talk, arguments)
                    continue
                try:
                    with _interruptible() as cancel:
                        _show(talk.say(line, cancel=cancel, **options), arguments)
                except RuntimeFailure as exc:
                    if not at_terminal:
                        raise
                    print(f"{exc} (/reset begins anew)", file=sys.stderr)
    return 0


def _lines(at_terminal: bool) -> Iterator[str]:
    """What the user says, without empty lines."""
    if at_terminal:
        import readline  # noqa: F401 - editing and history, by being imported
    while True:
        try:
            line = input("> ") if at_terminal else sys.stdin.readline()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            print("\n/quit ends", file=sys.stderr)
            continue
        except UnicodeDecodeError as exc:
            raise DataError(f"a line is not UTF-8: {exc.reason}; convert it") from exc
        if not line and not at_terminal:
            return
        if line.strip():
            yield line.strip()


def _command_in_chat(line: str, talk: Any, arguments: argparse.Namespace) -> None:
    if line == "/reset":
        talk.reset()
    elif line == "/stats":
        arguments.stats = not arguments.stats
    else:
        print(HELP, file=sys.stderr)


# --- serve-local ------------------------------------------------------------------------------


class DeviceModels(Mapping[str, Any]):
    """The one model of a device, by its family; a release that arrives meanwhile is taken up."""

    def __init__(self, device: "EdgeDevice") -> None:
        self._device = device
        self._pointer = Path(device.config.device.state_dir) / "models" / "current.json"
        self._looking = threading.Lock()
        self._seen = self._mark()
        self._session: Any = device.session
        self._name = model_name(self._session)

    def _mark(self) -> tuple[int, int]:
        seen = os.stat(self._pointer)
        return seen.st_ino, seen.st_mtime_ns

    def __getitem__(self, name: str) -> Any:
        with self._looking:
            if self._mark() != self._seen:
                self._session = self._device.refresh()
                self._seen, self._name = self._mark(), model_name(self._session)
            if name != self._name:
                raise KeyError(name)
            return self._session

    def __iter__(self) -> Iterator[str]:
        yield self._name

    def __len__(self) -> int:
        return 1


def _serve(arguments: argparse.Namespace) -> int:
    from edge_sdk.door import is_loopback
    from edge_sdk.openai_api import Limits
    from edge_sdk.serve import serve

    key = _read(arguments.key_file, "key").strip() if arguments.key_file else ""
    if arguments.key_file and not key:
        raise ConfigError(f"the key file {arguments.key_file} is empty")
    with ExitStack() as stack:
        models = _models(arguments, stack)
        for adapter in arguments.adapter:
            _load_adapter(adapter, models)
        server = stack.enter_context(
            serve(
                models,
                host=arguments.host,
                port=arguments.port,
                key=key,
                hosts=tuple(arguments.allow_host),
                origins=tuple(arguments.allow_origin),
                at_once=arguments.at_once,
                waiting=arguments.waiting,
                limits=Limits(arguments.max_tokens, arguments.time),
            )
        )
        stop = threading.Event()
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda *_: stop.set())
        found = server.models()
        if arguments.json:
            print(json.dumps({"url": server.url, "models": found}), flush=True)
        else:
            print(f"{', '.join(found)} at {server.url}", flush=True)
            print(_reach(is_loopback(arguments.host), bool(key)), file=sys.stderr, flush=True)
        stop.wait()
    return 0


def _reach(loopback: bool, keyed: bool) -> str:
    """Who can ask, in one sentence."""
    if not loopback:
        return "other machines can reach it; key and texts travel unencrypted: put TLS before it"
    who = "whoever holds the key" if keyed else "every user and program of this machine"
    return f"only this machine can reach it; {who} may ask"


def _models(arguments: argparse.Namespace, stack: ExitStack) -> Mapping[str, Any]:
    if not arguments.bundles:
        return DeviceModels(stack.enter_context(_device(arguments)))
    models: dict[str, Any] = {}
    for given in arguments.bundles:
        name, _, folder = given.rpartition("=")
        session = stack.enter_context(_open(folder, arguments.threads))
        name = name or model_name(session)
        if name in models or ":" in name:
            raise ConfigError(f"two models are called {name}; give one a name: NAME={folder}")
        models[name] = session
    return models


def _load_adapter(given: str, models: Mapping[str, Any]) -> None:
    name, _, path = given.partition("=")
    base, _, name = name.rpartition(":")
    fitting = [known for known in models if base in ("", known)]
    if not name or not path or len(fitting) != 1:
        raise ConfigError(
            f"--adapter {given!r} is not NAME=FILE, or with several models MODEL:NAME=FILE; "
            f"the models are {', '.join(models)}"
        )
    session = models[fitting[0]]
    if not hasattr(session, "conversation"):
        raise ConfigError(f"{fitting[0]} is an encoder, whose adapters are not served")
    session.load_adapter(name, path)


def _read(path: str, what: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read the {what} file {path}: {exc}") from exc
