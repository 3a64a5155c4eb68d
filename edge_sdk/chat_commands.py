"""`symbiont ask` and `symbiont chat`: a model on this machine, used at a terminal.

Knows the terminal. Does not know which model is meant (arguments.py) or how answers are made
(runtime.py, conversation.py). `symbiont serve-local` is registered along (serve_commands.py).
"""

import argparse
import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from edge_sdk import serve_commands
from edge_sdk.arguments import (
    Parsers,
    add_command,
    add_device,
    given_text,
    model_name,
    open_bundle,
    open_device,
    positive,
    read_given,
    seconds,
)
from edge_sdk.errors import DataError, RuntimeFailure
from edge_sdk.serve_commands import DeviceModels

if TYPE_CHECKING:
    from edge_sdk.answer import Answer

__all__ = ["DeviceModels", "is_chat_model", "register"]

HELP = """\
/reset  forget the conversation     /stats  show or hide tokens and speed after each answer
/help   these lines                 /quit   end (Ctrl-D too); Ctrl-C ends an answer only"""


def register(subparsers: "Parsers[argparse.ArgumentParser]") -> None:
    """Add the three commands to the command line."""
    ask = add_command(subparsers, "ask", _ask, "put one question to a model on this machine")
    ask.add_argument("text", help='the text, or "-" to read it from stdin')
    ask.add_argument("--classify", action="store_true", help="answer with a label of the task")
    ask.add_argument("--raw", action="store_true", help="continue the text, without chat template")
    ask.add_argument("--schema", metavar="FILE", help="JSON schema that the answer shall fit")
    _add_model(ask)
    _add_sampling(ask)

    chat = add_command(subparsers, "chat", _chat, "talk with a model on this machine")
    _add_model(chat)
    _add_sampling(chat)

    serve_commands.register(subparsers)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", metavar="DIR", help="this bundle, not the device's model")
    parser.add_argument("--adapter", metavar="FILE", help="with this adapter")
    parser.add_argument("--system", default="", help="what the model shall be told first")
    parser.add_argument("--stats", action="store_true", help="tokens and speed, on stderr")
    add_device(parser)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-tokens", type=positive, help="length of the answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest (0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from this share (1)")
    parser.add_argument("--seed", type=int, help="makes a sampled answer repeatable")
    parser.add_argument("--stop", action="append", default=[], help="end before this text")
    parser.add_argument("--time", type=seconds, help="most seconds of an answer")


@contextmanager
def _model(arguments: argparse.Namespace) -> Iterator[Any]:
    """The session that the arguments mean, closed at the end."""
    with ExitStack() as stack:
        if arguments.bundle:
            session = stack.enter_context(open_bundle(arguments.bundle, arguments.threads))
        else:
            session = stack.enter_context(open_device(arguments)).session
        if arguments.adapter:
            session.set_adapter(arguments.adapter)
        yield session


def _ask(arguments: argparse.Namespace) -> int:
    text = given_text(arguments.text)
    options = _options(arguments)
    if arguments.schema:
        options["schema"] = read_given(arguments.schema, "schema")
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
