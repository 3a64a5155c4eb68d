"""One HTTP request to this machine's endpoint: read within bounds, answered whole or in events.

Knows routes, bodies, server-sent events and refusals. Does not know connections (serve.py), what a
request means (openai_api.py) nor who may ask (door.py).
"""

import logging
import secrets
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import msgspec

from edge_sdk.errors import FleetError
from edge_sdk.openai_answers import Events, Json
from edge_sdk.openai_api import Api, Job
from edge_sdk.openai_requests import ApiError
from edge_sdk.turns import Full, GivenUp

if TYPE_CHECKING:
    from edge_sdk.serve import Http

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 4 << 20
"""A context of 128 thousand tokens is half a megabyte of text; embeddings come by the hundred."""
DRAINED_BYTES = 64 << 20
"""Read and thrown away of a body that is refused, so that the client gets to read why."""
IDLE_S = 30.0
"""Seconds a connection may say nothing, and that a client may take to read what was written."""
_JOBS = {"/v1/chat/completions": Api.chat, "/v1/completions": Api.completion}
_JOBS["/v1/embeddings"] = Api.embedding


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection, one after the other."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "symbiont", ""
    timeout = IDLE_S
    disable_nagle_algorithm = True
    server: "Http"

    def do_GET(self) -> None:
        """What is served: `/v1/models`, or one of them."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """A question: chat, completion or embedding."""
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
