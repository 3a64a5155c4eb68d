"""Starts a broker on loopback: mosquitto where it is installed, else amqtt.

Knows processes, ports and strict configuration. Does not know what travels through the broker.
For demos, tests and a first deployment on one machine; larger fleets bring their own broker.
"""

import logging
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from edge_sdk.errors import ConfigError, LinkError
from edge_sdk.link.broker_files import Listener, check_users, drop_user, write_broker
from edge_sdk.link.passwords import write_password_file

logger = logging.getLogger(__name__)

Kind = Literal["mosquitto", "amqtt"]

_START_S = 15.0  # amqtt imports for two seconds on a slow machine
_STOP_S = 5.0
_PORT_TRIES = 5


class Broker:
    """A running broker process. `url` has no password; `url_for` adds a user's."""

    def __init__(
        self,
        kind: Kind,
        port: int,
        process: subprocess.Popen[bytes],
        folder: Path,
        users: Mapping[str, str],
    ) -> None:
        self.kind = kind
        self.port = port
        self.pid = process.pid
        self.url = f"mqtt://127.0.0.1:{port}"
        self._process = process
        self._folder = folder
        self._users = dict(users)

    def __enter__(self) -> "Broker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def running(self) -> bool:
        """Whether the process is still there."""
        return self._process.poll() is None

    def url_for(self, user: str) -> str:
        """Return the url with this user's name and password in it.

        Raises:
            ConfigError: no such user.
        """
        if user not in self._users:
            raise ConfigError(f"the broker has no user {user!r}; add it with add_user")
        password = quote(self._users[user], safe="")
        return f"mqtt://{quote(user, safe='')}:{password}@127.0.0.1:{self.port}"

    def add_user(self, user: str, password: str) -> None:
        """Let one more user in; those connected stay connected."""
        check_users({user: password})
        self._users[user] = password
        write_password_file(self._folder / "passwords", self._users)
        if self.kind == "mosquitto":
            self._process.send_signal(signal.SIGHUP)

    def drop_user(self, user: str) -> None:
        """Let `user` in no more and end its session.

        Raises:
            ConfigError: no such user.
        """
        self._users.pop(user, None)
        drop_user(self._folder, user)
        if self.kind == "mosquitto":
            self._process.send_signal(signal.SIGHUP)

    def close(self) -> None:
        """End the process. Closing twice is harmless."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def start_broker(
    folder: Path | str,
    *,
    users: Mapping[str, str],
    port: int = 0,
    prefer: Kind | None = None,
    tenants: Sequence[str] = (),
) -> Broker:
    """Start a broker on 127.0.0.1 that lets in `users` ({name: password}) and nobody else.

    User `<device>` may write `v1/+/<device>/up` and read `v1/+/<device>/down` and
    `v1/+/coordinator/keys`; user `coordinator` may use everything under `v1`. The configuration
    and a log are written to `folder`. `tenants` are those whose topics mosquitto carries, empty for
    any; user `coordinator.<tenant>` may use everything of that tenant. `port` 0 picks a free one.
    Without `prefer`, mosquitto is used if it is installed, else amqtt.

    Raises:
        ConfigError: no broker is installed, or a user name or password cannot be used.
        LinkError: the broker did not start; the message holds the end of its log.
    """
    check_users(users)
    kind, command = _choose(prefer)
    home = Path(folder).absolute()
    home.mkdir(parents=True, exist_ok=True)
    failure = ""
    for _ in range(_PORT_TRIES if port == 0 else 1):
        chosen = port or _free_port()
        if not _is_free(chosen):
            failure = f"port {chosen} is in use; choose another, or 0 for any"
            continue
        process = _launch(kind, command, home, chosen, users, tenants)
        if _wait_until_it_listens(process, chosen):
            logger.info("%s listens on 127.0.0.1:%d", kind, chosen)
            return Broker(kind, chosen, process, home, users)
        failure = _end_of_log(process, home)
    raise LinkError(f"{kind} did not start on 127.0.0.1: {failure} (log: {home / 'broker.log'})")


def find_mosquitto() -> str | None:
    """Return the path of mosquitto; distributions put it where a user's PATH does not look."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


def _choose(prefer: Kind | None) -> tuple[Kind, list[str]]:
    mosquitto = find_mosquitto()
    if mosquitto and prefer != "amqtt":
        return "mosquitto", [mosquitto]
    if prefer == "mosquitto":
        raise ConfigError("mosquitto is not installed; install it, or use the amqtt broker")
    if find_spec("amqtt") is None:
        raise ConfigError(
            "no broker is installed; install mosquitto, or amqtt: pip install 'symbiont[broker]'"
        )
    return "amqtt", [sys.executable, "-m", "edge_sdk.link.amqtt_broker"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    # Asked first, or a connect would find the other broker while ours is still failing to start.
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _launch(
    kind: Kind,
    command: list[str],
    home: Path,
    port: int,
    users: Mapping[str, str],
    tenants: Sequence[str],
) -> subprocess.Popen[bytes]:
    with open(home / "broker.log", "wb") as log:
        if kind == "mosquitto":
            config = write_broker(home, [Listener(port)], users=users, keep=False, tenants=tenants)
            return subprocess.Popen(
                [*command, "-c", str(config)], stdout=subprocess.DEVNULL, stderr=log
            )
        write_password_file(home / "passwords", users)
        return subprocess.Popen(
            [*command, str(home), str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=Path(__file__).parents[2],
        )


def _wait_until_it_listens(process: subprocess.Popen[bytes], port: int) -> bool:
    if process.stdout is not None:  # amqtt prints its port when it is ready, or ends
        return process.stdout.readline().strip() == str(port).encode()
    deadline = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1.0):
                return process.poll() is None
        except OSError:
            time.sleep(0.005)  # refused at once while nobody listens
    return False


def _end_of_log(process: subprocess.Popen[bytes], home: Path) -> str:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    lines = (home / "broker.log").read_text("utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it ended without a word"
