"""An OpenAI-compatible endpoint on this machine: HTTP around `openai_api`, by the standard library.

Knows addresses, connections and who hung up. Does not know what is in a request (http_requests.py).
"""

import logging
import selectors
import socket
import socketserver
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import ThreadingHTTPServer
from typing import Any

from edge_sdk.door import LOOPBACK_NAMES, Door, is_loopback
from edge_sdk.errors import ConfigError, LinkError
from edge_sdk.http_requests import MAX_BODY_BYTES, Handler
from edge_sdk.openai_api import Api, Limits
from edge_sdk.turns import Turns

__all__ = ["MAX_BODY_BYTES", "Server", "serve"]

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
_WATCH_S = 0.1


class Server:
    """A running endpoint; also a context manager.

    Attributes:
        url: base URL for clients, e.g. "http://127.0.0.1:8321/v1".
        port: the port it listens on.
    """

    def __init__(self, http: "Http", host: str) -> None:
        self._http = http
        self.port: int = http.server_address[1]
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.port}/v1"
        self._thread = threading.Thread(target=http.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening, cancel what is being answered, and hang up. Twice is harmless."""
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()
        self._http.hang_up()
        self._http.api.close()

    def models(self) -> list[str]:
        """Return the names of what is served."""
        return [card["id"] for card in self._http.api.models()["data"]]


def serve(
    sessions: Mapping[str, Any],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    key: str | None = None,
    hosts: tuple[str, ...] = (),
    origins: tuple[str, ...] = (),
    at_once: int = 1,
    waiting: int = 16,
    limits: Limits | None = None,
) -> Server:
    """Serve `sessions`, name to session, until the server is closed; they stay the caller's.

    `port` 0 takes a free one. `hosts` are further names under which this machine is asked,
    `origins` web pages that may ask. `at_once` requests are answered at a time and `waiting` more
    wait in line; whoever comes then is told 429.

    Raises:
        ConfigError: no model, or an address beyond loopback without a key.
        LinkError: the address cannot be listened on.
    """
    if not sessions:
        raise ConfigError("there is no model to serve")
    if not key and not is_loopback(host):
        raise ConfigError(
            f"{host} can be reached from other machines and there is no key; "
            "give --key-file, or listen on 127.0.0.1"
        )
    door = Door(
        LOOPBACK_NAMES | {host.lower(), *map(str.lower, hosts)}, frozenset(origins), key or ""
    )
    turns = Turns(at_once=at_once, waiting=waiting)
    try:
        http = Http(host, port, Api(sessions, limits=limits), door, turns)
    except OSError as exc:
        raise LinkError(f"cannot listen on {host} port {port}: {exc.strerror or exc}") from exc
    return Server(http, host)


class Http(ThreadingHTTPServer):
    """The connections: how many, who hung up, and an end to all of them."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, host: str, port: int, api: Api, door: Door, turns: Turns) -> None:
        if ":" in host:
            self.address_family = socket.AF_INET6
        self.api, self.door, self.turns = api, door, turns
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._working: set[threading.Event] = set()
        super().__init__((host, port), Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own asks a name server who we are
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            with suppress(OSError):
                request.sendall(b"HTTP/1.1 503 Too many connections\r\nContent-Length: 0\r\n\r\n")
            self.shutdown_request(request)
            return
        with self._lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._open.discard(request)
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a connection ended badly")

    @contextmanager
    def watched(self, connection: socket.socket) -> Iterator[threading.Event]:
        """An event that is set when the client hangs up or the server closes."""
        cancel, done = threading.Event(), threading.Event()
        with self._lock:
            self._working.add(cancel)
        watcher = threading.Thread(target=_watch, args=(connection, cancel, done), daemon=True)
        watcher.start()
        try:
            yield cancel
        finally:
            done.set()
            with self._lock:
                self._working.discard(cancel)

    def hang_up(self) -> None:
        """Cancel every answer and end every connection."""
        with self._lock:
            for cancel in self._working:
                cancel.set()
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


def _watch(connection: socket.socket, cancel: threading.Event, done: threading.Event) -> None:
    with selectors.DefaultSelector() as selector, suppress(OSError, ValueError, KeyError):
        selector.register(connection, selectors.EVENT_READ)
        while not done.is_set():
            if selector.select(_WATCH_S):
                if not connection.recv(1, socket.MSG_PEEK):
                    cancel.set()
                return  # hung up, or the next request is here already
