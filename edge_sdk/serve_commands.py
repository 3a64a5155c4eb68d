"""`symbiont serve-local`: models on this machine behind OpenAI's interface, until interrupted.

Knows arguments, names of models and signals. Does not know how they are served (serve.py).
"""

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdk.arguments import (
    Parsers,
    add_command,
    add_device,
    model_name,
    open_bundle,
    open_device,
    positive,
    read_given,
    seconds,
    whole,
)
from edge_sdk.errors import ConfigError

if TYPE_CHECKING:
    from edge_sdk.agent import EdgeDevice

PORT = 8321
"""Where `serve-local` listens unless told otherwise; not one that other model servers use."""


def register(subparsers: "Parsers[argparse.ArgumentParser]") -> None:
    """Add `serve-local` to the command line."""
    summary = "serve models to OpenAI clients, locally"
    serve = add_command(subparsers, "serve-local", _serve, summary)
    serve.add_argument("bundles", nargs="*", metavar="[NAME=]BUNDLE", help="bundle folders")
    add_device(serve)
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
    serve.add_argument("--max-tokens", type=positive, default=1024, help="per answer (1024)")
    serve.add_argument("--time", type=seconds, default=300.0, help="seconds per answer (300)")
    serve.add_argument("--at-once", type=positive, default=1, help="answers made at a time (1)")
    serve.add_argument("--waiting", type=whole, default=16, help="requests that may wait (16)")


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

    key = read_given(arguments.key_file, "key").strip() if arguments.key_file else ""
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
        return DeviceModels(stack.enter_context(open_device(arguments)))
    models: dict[str, Any] = {}
    for given in arguments.bundles:
        name, _, folder = given.rpartition("=")
        session = stack.enter_context(open_bundle(folder, arguments.threads))
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
