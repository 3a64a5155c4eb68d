"""An OpenAI-compatible endpoint on this machine: HTTP around `openai_api`, by the standard library.

Knows connections, turns and server-sent events. Does not know what a request means (openai_api.py)
nor who may ask (door.py).
"""

import logging
import secrets
import selectors
import socket
import socketserver
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec

from edge_sdk.door import LOOPBACK_NAMES, Door, is_loopback
from edge_sdk.errors import ConfigError, FleetError, LinkError
from edge_sdk.openai_answers import Events, Json
from edge_sdk.openai_api import Api, Job, Limits
from edge_sdk.openai_requests import ApiError
from edge_sdk.turns import Full, GivenUp, Turns

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 4 << 20
"""A context of 128 thousand tokens is half a megabyte of text; embeddings come by the hundred."""
DRAINED_BYTES = 64 << 20
"""Read and thrown away of a body that is refused, so that the client gets to read why."""
MAX_CONNECTIONS = 64
IDLE_S = 30.0
"""Seconds a connection may say nothing, and that a client may take to read what was written."""
_WATCH_S = 0.1
_JOBS = {"/v1/chat/completions": Api.chat, "/v1/completions": Api.completion}
_JOBS["/v1/embeddings"] = Api.embedding


class Server:
    """A running endpoint; also a context manager.

    Attributes:
        url: base URL for clients, e.g. "http://127.0.0.1:8321/v1".
        port: the port it listens on.
    """

    def __init__(self, http: "_Http", host: str) -> None:
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
        http = _Http(host, port, Api(sessions, limits=limits), door, turns)
    except OSError as exc:
        raise LinkError(f"cannot listen on {host} port {port}: {exc.strerror or exc}") from exc
    return Server(http, host)


class _Http(ThreadingHTTPServer):
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
        super().__init__((host, port), _Handler)

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


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "symbiont", ""
    timeout = IDLE_S
    disable_nagle_algorithm = True
    server: _Http

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def do_OPTIONS(self) -> None:
        """A page's browser asks whether the page may; the key comes with the request itself."""
        self._answer(self._preflight)

    def _answer(self, act: Any) -> None:
        self._started, self._status = time.perf_counter(), 0
        self._id = secrets.token_hex(8)
        path = urlsplit(self.path).path
        self._route = path if path in _JOBS or path == "/v1/models" else "another path"
        self._unread = self.headers.get("Content-Length") or "0"
        try:
            act(path)
        except GivenUp:
            self.close_connection = True
        except ApiError as exc:
            self._refuse(exc)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except FleetError as exc:
            self._refuse(ApiError(503, str(exc), code="model_failed"))
        except Exception as exc:  # its text may quote the request, so only the place is logged
            *_, place = traceback.extract_tb(exc.__traceback__)
            logger.error("%s at %s:%s", type(exc).__name__, place.filename, place.lineno)
            self._refuse(ApiError(500, "the endpoint failed; see its log", code="internal_error"))
        taken = time.perf_counter() - self._started
        logger.info("%s %s %s %.2f s", self.command, self._route, self._status or "gone", taken)

    def _get(self, path: str) -> None:
        self.server.door.check(self.headers)
        if path == "/v1/models":
            self._send(200, self.server.api.models())
        elif path.startswith("/v1/models/"):
            self._send(200, self.server.api.model(unquote(path.removeprefix("/v1/models/"))))
        else:
            raise _not_found(path, "GET")

    def _post(self, path: str) -> None:
        self.server.door.check(self.headers)
        prepare = _JOBS.get(path)
        if prepare is None:
            raise _not_found(path, "POST")
        if self.headers.get_content_type() != "application/json":
            raise ApiError(415, "Content-Type must be application/json", code="not_json")
        job: Job = prepare(self.server.api, self._body())
        with self.server.watched(self.connection) as cancel:
            try:
                with self.server.turns.take(cancel):
                    found = job(cancel)
                    if not isinstance(found, dict):
                        self._stream(found, cancel)
            except Full as exc:
                raise ApiError(
                    429, "too many requests are waiting; try again", code="queue_full"
                ) from exc
            if cancel.is_set():
                raise GivenUp
        if isinstance(found, dict):
            self._send(200, found)

    def _preflight(self, path: str) -> None:
        self.server.door.check(self.headers, keyed=False)
        if not self.headers.get("Origin"):
            raise _not_found(path, "OPTIONS")
        self._head(
            204,
            {
                "Access-Control-Allow-Methods": "GET, POST",
                "Access-Control-Allow-Headers": self.headers.get(
                    "Access-Control-Request-Headers", "Authorization, Content-Type"
                ),
                "Access-Control-Max-Age": "600",
            },
        )

    def _body(self) -> bytes:
        """The request's body, read once its size is known to be bearable."""
        if self.headers.get("Transfer-Encoding"):
            raise ApiError(411, "the body needs a Content-Length", code="length_required")
        size = _size(self._unread)
        if size > MAX_BODY_BYTES:
            raise ApiError(
                413,
                f"the request has {size} bytes; at most {MAX_BODY_BYTES} are read",
                code="request_too_large",
            )
        self._unread = "0"
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionError("the client hung up within its request")
        return body

    def _stream(self, events: Events, cancel: threading.Event) -> None:
        head = {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        if self.request_version == "HTTP/1.0":
            self.close_connection = True
        else:
            head["Transfer-Encoding"] = "chunked"
        try:
            self._head(200, head)
            for event in events:
                self._event(msgspec.json.encode(event))
                if cancel.is_set():
                    raise GivenUp
            self._event(b"[DONE]")
        except FleetError as exc:  # the status is sent already
            self._event(msgspec.json.encode(ApiError(500, str(exc), code="model_failed").body()))
        finally:
            events.close()
        if not self.close_connection:
            self.wfile.write(b"0\r\n\r\n")

    def _event(self, text: bytes) -> None:
        data = b"data: %b\n\n" % text
        framed = b"%x\r\n%b\r\n" % (len(data), data)
        self.wfile.write(data if self.request_version == "HTTP/1.0" else framed)

    def _send(self, status: int, found: Json) -> None:
        data = msgspec.json.encode(found)
        more = {"Retry-After": "1"} if status == 429 else {}
        length = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        self._head(status, length | more, data)

    def _head(self, status: int, fields: Mapping[str, str], data: bytes = b"") -> None:
        self._status = status
        self.send_response_only(status)
        fields = {"x-request-id": self._id, "X-Content-Type-Options": "nosniff"} | dict(fields)
        if (origin := self.headers.get("Origin")) in self.server.door.origins:
            fields |= {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        if self.close_connection:
            fields["Connection"] = "close"
        for name, value in fields.items():
            self.send_header(name, value)
        self._headers_buffer += [b"\r\n", data]  # type: ignore[attr-defined]
        self.flush_headers()

    def _refuse(self, exc: ApiError) -> None:
        """Send the refusal; a body that was not read is thrown away, or the client misses it."""
        if self._status:  # an answer is on its way already
            self.close_connection = True
            return
        size = _size(self._unread, otherwise=DRAINED_BYTES + 1)
        self.close_connection |= size > 0 or "Transfer-Encoding" in self.headers
        with suppress(ConnectionError, TimeoutError):
            self._send(exc.status, exc.body())
            while 0 < size <= DRAINED_BYTES and (piece := self.rfile.read(min(size, 1 << 16))):
                size -= len(piece)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses: what is no HTTP, and methods nobody knows."""
        self._id, self._status, self.close_connection = secrets.token_hex(8), 0, True
        self.headers = getattr(self, "headers", None) or {}  # type: ignore[assignment]
        refusal = ApiError(int(code), message or "refused", code="bad_request")
        with suppress(ConnectionError, TimeoutError):
            self._send(int(code), refusal.body())

    def log_message(self, *_: object) -> None:
        """Nothing: request lines are the user's; `_answer` logs what may be known."""


def _not_found(path: str, method: str) -> ApiError:
    served = ", ".join(["GET /v1/models", *(f"POST {known}" for known in _JOBS)])
    return ApiError(
        404, f"nothing answers {method} {path[:80]}; there is {served}", code="not_found"
    )


def _size(text: str, *, otherwise: int | None = None) -> int:
    if text.isascii() and text.isdigit() and len(text) < 16:
        return int(text)
    if otherwise is None:
        raise ApiError(400, "Content-Length is not a number", code="bad_request")
    return otherwise
