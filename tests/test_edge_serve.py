"""The endpoint with the real openai client: a process of its own, and one here to look inside."""

import contextlib
import http.client
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openai
import pydantic
import pytest

from edge_sdk.errors import ConfigError, LinkError
from edge_sdk.openai_requests import MAX_CHOICES
from edge_sdk.runtime import Answer, SlmSession
from edge_sdk.serve import MAX_BODY_BYTES, Server, serve
from edge_sdk.turns import Full, GivenUp, Turns
from tests.chat_world import CONTEXT, encoder, world

ROOT = Path(__file__).resolve().parent.parent
KEY = "an-api-key-nobody-shall-see"
SECRET = "the cellar door is blue"
HELLO: Any = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["bill", "letter"]}, "urgent": {"type": "boolean"}},
    "required": ["kind", "urgent"],
    "additionalProperties": False,
}


class Endpoint:
    """`symbiont serve-local` in a process of its own."""

    def __init__(self, folder: Path) -> None:
        (folder / "key").write_text(KEY + "\n")
        self.log = folder / "log.txt"
        command = ["serve-local", str(world().bundle), "--adapter", f"kind={world().adapter}"]
        options = ["--port", "0", "--json", "--key-file", str(folder / "key")]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "edge_sdk", *command, *options],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        self.said = json.loads(self.process.stdout.readline())
        self.url = self.said["url"]
        self.client = openai.OpenAI(base_url=self.url, api_key=KEY, max_retries=0, timeout=60)

    def close(self) -> int:
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    made = Endpoint(tmp_path_factory.mktemp("endpoint"))
    yield made
    assert made.close() == 0
    log = made.log.read_text()
    assert "Traceback" not in log
    assert not [word for word in (KEY, SECRET, "hello") if word in log]


@pytest.fixture(scope="module")
def client(endpoint: Endpoint) -> openai.OpenAI:
    return endpoint.client


@pytest.fixture(scope="module")
def session() -> Iterator[SlmSession]:
    with SlmSession(world().bundle) as opened:
        yield opened


def chat(client: openai.OpenAI, **options: Any) -> Any:
    options = {"model": "tiny", "messages": HELLO, "max_completion_tokens": 16} | options
    return client.chat.completions.create(**options)


def test_models_and_their_adapters_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "tiny:kind"]
    assert client.models.retrieve("tiny:kind").owned_by == "symbiont"


def test_a_chat_is_what_the_session_says(client: openai.OpenAI, session: SlmSession) -> None:
    found = chat(client)

    with session.conversation() as talk:
        expected = talk.say("hello", max_tokens=16)
        text = "".join(expected)
    assert found.choices[0].message.content == text
    assert found.choices[0].message.role == "assistant"
    assert found.choices[0].finish_reason == "length"
    assert found.usage.completion_tokens == 16
    assert found.usage.prompt_tokens == expected.prompt_tokens
    assert (found.model, found.system_fingerprint) == ("tiny", "long")


def test_a_stream_is_the_same_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = chat(client)

    events = list(chat(client, stream=True, stream_options={"include_usage": True}))

    *pieces, last, usage = events
    assert "".join(event.choices[0].delta.content or "" for event in pieces) == (
        whole.choices[0].message.content
    )
    assert pieces[0].choices[0].delta.role == "assistant"
    assert len(pieces) > 3
    assert last.choices[0].finish_reason == "length"
    assert usage.choices == []
    assert usage.usage.completion_tokens == 16
    assert all(event.usage is None for event in [*pieces, last])
    assert len({event.id for event in events}) == 1


class Post(pydantic.BaseModel):
    kind: Literal["bill", "letter"]
    urgent: bool


def test_the_clients_own_helpers_take_ours(client: openai.OpenAI) -> None:
    whole = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Post)
    with client.chat.completions.stream(
        model="tiny", messages=HELLO, response_format=Post
    ) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_completion()

    assert isinstance(whole.choices[0].message.parsed, Post)
    assert streamed.choices[0].message.parsed == whole.choices[0].message.parsed
    assert {"chunk", "content.delta", "content.done"} <= set(kinds)


def test_a_later_turn_is_not_read_from_its_start(client: openai.OpenAI) -> None:
    first = chat(client, messages=[{"role": "user", "content": "one " * 50}])
    again: Any = [
        {"role": "user", "content": "one " * 50},
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "two"},
    ]

    second = chat(client, messages=again)

    known = second.usage.prompt_tokens_details.cached_tokens
    assert first.usage.prompt_tokens <= known < second.usage.prompt_tokens


def test_sampling_follows_its_seed(client: openai.OpenAI) -> None:
    options = {"temperature": 1.5, "top_p": 0.9, "max_completion_tokens": 12}
    texts = [
        chat(client, seed=seed, **options).choices[0].message.content for seed in (1, 1, 2, -3)
    ]

    both = chat(client, seed=1, n=2, **options)

    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    assert [choice.message.content for choice in both.choices] == [texts[0], texts[2]]
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.usage.completion_tokens == 24


def test_a_stop_string_ends_the_answer_and_is_not_shown(client: openai.OpenAI) -> None:
    whole = chat(client, max_completion_tokens=24).choices[0].message.content
    stop = whole[5:7]

    found = chat(client, max_completion_tokens=24, stop=[stop]).choices[0]

    assert found.message.content == whole[: whole.index(stop)]
    assert found.finish_reason == "stop"


def test_completions_of_several_prompts(client: openai.OpenAI, session: SlmSession) -> None:
    found = client.completions.create(model="tiny", prompt=["abc", "xyz"], max_tokens=6, echo=True)

    texts = [choice.text for choice in found.choices]
    expected = [text + session.generate(text, max_tokens=6) for text in ("abc", "xyz")]
    assert texts == expected
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (6, 12)
    events = list(
        client.completions.create(
            model="tiny", prompt=["abc", "xyz"], max_tokens=6, stream=True, echo=True
        )
    )
    for index in (0, 1):
        pieces = [e.choices[0].text for e in events if e.choices[0].index == index]
        assert "".join(pieces) == expected[index]


def test_an_answer_fits_its_schema(client: openai.OpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "post", "schema": SCHEMA}}

    found = chat(client, response_format=wanted, max_completion_tokens=80)
    some = chat(client, response_format={"type": "json_object"}, max_completion_tokens=12)

    answer = json.loads(found.choices[0].message.content)
    assert answer["kind"] in ("bill", "letter")
    assert answer["urgent"] in (True, False)
    assert found.choices[0].finish_reason == "stop"
    assert some.choices[0].message.content.startswith("{")


def test_an_adapter_is_a_model_of_its_own(client: openai.OpenAI, session: SlmSession) -> None:
    plain = chat(client).choices[0].message.content

    changed = chat(client, model="tiny:kind").choices[0].message.content

    assert changed != plain
    assert chat(client).choices[0].message.content == plain
    session.load_adapter("kind", world().adapter)
    with session.conversation() as talk:
        assert changed == "".join(talk.say("hello", max_tokens=16, adapter="kind"))


IMAGE = [{"type": "image_url", "image_url": {"url": "data:"}}]
REFUSED: list[tuple[dict[str, Any], int, str, str]] = [
    ({"model": "gpt-9"}, 404, "model_not_found", "there is tiny, tiny:kind"),
    ({"model": "tiny:nothing"}, 404, "model_not_found", "tiny:kind"),
    (
        {"messages": [{"role": "user", "content": "x" * 5000}]},
        400,
        "context_length_exceeded",
        f"has 5017 tokens and this model's context is {CONTEXT}; send less",
    ),
    ({"messages": []}, 400, "invalid_value", "messages"),
    ({"messages": [{"role": "user", "content": " "}]}, 400, "invalid_value", "are empty"),
    ({"messages": [{"role": "tool", "content": "3"}]}, 400, "unsupported_value", "no tools"),
    ({"messages": [{"role": "user", "content": IMAGE}]}, 400, "unsupported_value", "text only"),
    ({"tools": [{"type": "function"}]}, 400, "unsupported_parameter", "response_format"),
    ({"logprobs": True}, 400, "unsupported_parameter", "log-probabilities"),
    ({"frequency_penalty": 0.5}, 400, "unsupported_parameter", "repetition_penalty"),
    ({"temperature": 3}, 400, "invalid_value", "temperature: expected `float` <= 2.0"),
    ({"max_completion_tokens": 0}, 400, "invalid_value", "max_completion_tokens: expected"),
    ({"n": MAX_CHOICES + 1}, 400, "invalid_value", f"<= {MAX_CHOICES}"),
    ({"stop": ["x"] * 17}, 400, "invalid_value", "<= 16"),
    ({"extra_body": {"temprature": 1}}, 400, "unknown_parameter", "did you mean temperature?"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        400,
        "missing_required_parameter",
        "json_schema.schema",
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "nonsense"}},
            }
        },
        400,
        "invalid_value",
        "nonsense",
    ),
]


@pytest.mark.parametrize(("options", "status", "code", "said"), REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_have_openais_form(
    options: dict[str, Any],
    status: int,
    code: str,
    said: str,
    stream: bool,
    client: openai.OpenAI,
) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        chat(client, stream=stream, **options)

    assert refused.value.status_code == status
    assert refused.value.code == code
    assert said in refused.value.message
    assert refused.value.request_id


def test_what_changes_nothing_is_let_pass(client: openai.OpenAI) -> None:
    harmless: Any = {"user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto"}

    found = chat(client, tools=[], tool_choice="none", presence_penalty=0, **harmless)

    assert found.choices[0].message.content == chat(client).choices[0].message.content


def test_a_decoder_has_no_embeddings_and_tokens_are_no_text(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="serve an encoder bundle"):
        client.embeddings.create(model="tiny", input="hello")
    with pytest.raises(openai.BadRequestError, match="token ids"):
        client.completions.create(model="tiny", prompt=[1, 2, 3])


def raw(
    url: str,
    method: str = "POST",
    path: str = "/v1/chat/completions",
    body: bytes = b"",
    **headers: str,
) -> tuple[int, dict[str, str], Any]:
    """One request with exactly these headers; names are written with underscores."""
    host, port = url.split("/")[2].split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    defaults = {
        "Authorization": f"Bearer {KEY}",
        "Content-Type": "application/json",
        "Host": f"{host}:{port}",
    }
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in (defaults | {"Content-Length": str(len(body))} | named).items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        data = answer.read()
        return answer.status, dict(answer.headers), json.loads(data) if data else None
    finally:
        connection.close()


ASK = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 2}).encode()


def test_who_may_ask(endpoint: Endpoint) -> None:
    """Another site's name for this address, its pages, forms, and wrong keys stay outside."""
    cases: list[tuple[dict[str, str], int]] = [
        ({}, 200),
        ({"Host": "localhost"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Host": "192.0.2.7:8321"}, 200),
        ({"Host": "rebound.example"}, 403),
        ({"Host": "localhost.example:8321"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "https://site.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": f"http://{endpoint.url.split('/')[2]}"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "none"}, 200),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": ""}, 401),
    ]
    for headers, expected in cases:
        status, back, found = raw(endpoint.url, body=ASK, **headers)
        assert status == expected, headers
        assert not [name for name in back if name.lower().startswith("access-control")]
        assert ("error" in found) is (expected != 200)
    status, back, _ = raw(endpoint.url, "OPTIONS", Origin="https://site.example")
    assert (status, "Access-Control-Allow-Origin" in back) == (403, False)


def test_requests_that_are_no_requests(endpoint: Endpoint) -> None:
    big = b" " * (MAX_BODY_BYTES + 1)
    cases: list[tuple[dict[str, Any], int]] = [
        ({"body": b"{"}, 400),
        ({"body": b"[]"}, 400),
        ({"body": b'{"model": "\xff"}'}, 400),
        ({"body": b"[" * 100_000}, 400),
        ({"body": big}, 413),
        ({"Content_Length": "many"}, 400),
        ({"Content_Length": "-1"}, 400),
        ({"Transfer_Encoding": "chunked"}, 411),
        ({"path": "/v1/nonsense"}, 404),
        ({"method": "GET", "path": "/"}, 404),
        ({"method": "GET", "path": "/v1/models/nonsense"}, 404),
        ({"method": "DELETE", "path": "/v1/models"}, 501),
    ]
    for options, expected in cases:
        status, _, found = raw(endpoint.url, **options)
        assert status == expected, options
        assert found["error"]["message"]
    assert raw(endpoint.url, body=ASK)[0] == 200


JUNK: list[Any] = [
    *(None, True, -1, 0, 1e308, 2**70, "", "x" * 100, "\ud800", [], [1], {}, {"a": {}}, [[]]),
    *("m:", "tiny:x", {"type": "text"}, [{"role": "assistant", "content": None}]),
    {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}},
]


def test_mangled_requests_never_find_a_fault_of_ours(endpoint: Endpoint) -> None:
    rng = random.Random(1)
    names = [*json.loads(ASK), "prompt", "input", "stop", "seed", "n", "response_format", "tools"]
    counts: Counter[int] = Counter()
    for _ in range(150):
        request = json.loads(ASK) | {"prompt": "a", "input": "a"}
        del request[rng.choice(["messages", "prompt", "input"])]
        for _ in range(rng.randrange(3)):
            request[rng.choice(names)] = rng.choice(JUNK)
        request |= {"max_tokens": 2}
        body = bytearray(json.dumps(request).encode())
        if rng.random() < 0.3:
            body[rng.randrange(len(body))] = rng.randrange(256)
        path = rng.choice(["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
        status, _, found = raw(endpoint.url, path=path, body=bytes(body))
        counts[status] += 1
        assert status < 500, request
        assert (status == 200) != ("error" in found)

    assert counts[400] > 100
    assert raw(endpoint.url, body=ASK)[0] == 200


def test_bytes_that_are_no_http(endpoint: Endpoint) -> None:
    host, port = endpoint.url.split("/")[2].split(":")
    for data in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"POST /v1/models HTTP/9.9\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=10) as raw_socket:
            raw_socket.sendall(data)
            raw_socket.shutdown(socket.SHUT_WR)
            while raw_socket.recv(4096):
                pass
    assert raw(endpoint.url, body=ASK)[0] == 200


def test_an_old_http_client_can_stream_too(endpoint: Endpoint) -> None:
    host, port = endpoint.url.split("/")[2].split(":")
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 3, "stream": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.0\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head.encode() + body)
        received = b"".join(iter(lambda: connection.recv(4096), b""))

    assert b"chunked" not in received
    assert received.endswith(b"data: [DONE]\n\n")


# --- one in this process, to look inside ------------------------------------------------------


class Recorded(SlmSession):
    """Remembers the answers it began, tells when one has begun, and writes at an even pace: a full
    answer then takes seconds on any machine."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.answers: list[Answer] = []
        self.begun = threading.Semaphore(0)

    def answer(self, *arguments: Any, **options: Any) -> Answer:
        answer = super().answer(*arguments, **options)
        answer._pieces = _paced(answer._pieces)
        self.answers.append(answer)
        self.begun.release()
        return self.answers[-1]

    def wait_for_end(self) -> str:
        """How the last answer ended."""
        for _ in range(1000):
            if self.answers[-1].finish:
                return self.answers[-1].finish
            threading.Event().wait(0.01)
        raise AssertionError("the answer did not end within ten seconds")


def _paced(pieces: Iterator[str]) -> Iterator[str]:
    pace = threading.Event()
    with contextlib.closing(pieces):  # type: ignore[type-var]  # a generator
        for piece in pieces:
            pace.wait(0.002)
            yield piece


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    with Recorded(world().bundle) as opened:
        yield opened


LONG: Any = {"model": "m", "prompt": SECRET, "max_tokens": CONTEXT}


def to(server: Server, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="x", max_retries=0, timeout=60, **options)


def test_whoever_hangs_up_within_a_stream_stops_the_model(
    recorded: Recorded, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with serve({"m": recorded}) as server, to(server) as client:
        stream = client.completions.create(stream=True, **LONG)
        next(stream)
        stream.close()

        assert recorded.wait_for_end() == "cancelled"
        assert len(recorded.answers[-1].tokens) < CONTEXT - 100
        assert client.completions.create(model="m", prompt="next", max_tokens=2).choices
    assert SECRET not in caplog.text


def test_whoever_hangs_up_while_waiting_for_the_whole_stops_it_too(recorded: Recorded) -> None:
    with serve({"m": recorded}) as server:
        host, port = server.url.split("/")[2].split(":")
        connection = http.client.HTTPConnection(host, int(port))
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(LONG), headers)
        assert recorded.begun.acquire(timeout=20)
        connection.close()

        assert recorded.wait_for_end() == "cancelled"


def test_several_requests_take_turns(recorded: Recorded) -> None:
    expected = [recorded.generate(f"number {i}", max_tokens=12) for i in range(6)]
    found: dict[int, str] = {}

    def ask(i: int) -> None:
        answer = client.completions.create(model="m", prompt=f"number {i}", max_tokens=12)
        found[i] = answer.choices[0].text

    for at_once in (1, 3):
        with serve({"m": recorded}, at_once=at_once) as server, to(server) as client:
            threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert [found.pop(i) for i in range(6)] == expected


def test_a_full_line_says_so(recorded: Recorded) -> None:
    with serve({"m": recorded}, waiting=0) as server, to(server) as client:
        with client.completions.create(stream=True, **LONG) as stream:
            next(stream)
            with pytest.raises(openai.RateLimitError, match="too many requests") as refused:
                client.completions.create(model="m", prompt="next", max_tokens=2)
            assert refused.value.response.headers["Retry-After"] == "1"
        recorded.wait_for_end()


def test_whoever_hangs_up_in_the_line_leaves_it(recorded: Recorded) -> None:
    with serve({"m": recorded}, waiting=1) as server, to(server) as client:
        with client.completions.create(stream=True, **LONG) as stream:
            next(stream)
            with pytest.raises(openai.APITimeoutError):  # the client gives up and hangs up
                client.completions.create(model="m", prompt="a", max_tokens=2, timeout=0.1)
            while server._http.turns._line:
                threading.Event().wait(0.001)
        recorded.wait_for_end()

        assert client.completions.create(model="m", prompt="b", max_tokens=2).choices
    assert len(recorded.answers) == 2  # nobody wrote to the one who had left


def test_turns_come_in_order_and_the_line_has_an_end() -> None:
    turns, cancel, order = Turns(at_once=1, waiting=2), threading.Event(), []

    def wait(name: str) -> None:
        with turns.take(threading.Event()):
            order.append(name)

    threads = [threading.Thread(target=wait, args=(name,)) for name in "ab"]
    with turns.take(cancel):
        for count, thread in enumerate(threads, start=1):
            thread.start()
            while len(turns._line) < count:
                threading.Event().wait(0.001)
        with pytest.raises(Full), turns.take(cancel):
            pass
    for thread in threads:
        thread.join()
    assert order == ["a", "b"]
    cancel.set()
    with pytest.raises(GivenUp), turns.take(cancel):
        pass
    with turns.take(threading.Event()):
        order.append("c")
    assert order[-1] == "c"


def test_closing_ends_what_is_being_answered(recorded: Recorded) -> None:
    server = serve({"m": recorded})
    with to(server) as client:
        stream = client.completions.create(stream=True, **LONG)
        next(stream)

        server.close()
        server.close()

        with pytest.raises(openai.APIError):
            list(stream)
        assert recorded.wait_for_end() == "cancelled"
        with pytest.raises(openai.APIConnectionError):
            client.models.list()


def test_an_allowed_page_may_ask_and_no_other(recorded: Recorded) -> None:
    origin = "http://notes.example"
    with serve({"m": recorded}, origins=(origin,), hosts=("box.local",), key=KEY) as server:
        status, back, _ = raw(
            server.url, "OPTIONS", Origin=origin, Host="box.local", Authorization=""
        )
        assert (status, back["Access-Control-Allow-Origin"]) == (204, origin)
        status, back, _ = raw(server.url, "GET", "/v1/models", Origin=origin)
        assert (status, back["Access-Control-Allow-Origin"], back["Vary"]) == (
            200,
            origin,
            "Origin",
        )
        assert raw(server.url, "GET", "/v1/models", Origin=origin, Authorization="")[0] == 401
        assert raw(server.url, "GET", "/v1/models", Origin=origin + ".evil.example")[0] == 403


def test_an_answer_may_take_so_long_and_no_longer(recorded: Recorded) -> None:
    from edge_sdk.openai_api import Limits

    with serve({"m": recorded}, limits=Limits(time_s=0.05)) as server, to(server) as client:
        found = client.completions.create(**LONG)

    assert found.choices[0].finish_reason == "length"
    assert recorded.answers[-1].finish == "time"


def test_an_encoder_gives_embeddings_and_no_text(recorded: Recorded) -> None:
    from edge_sdk.sessions import open_session

    texts = ["hello", "good morning", "x" * 500]  # the last is cut at the context, 64 tokens
    with open_session(encoder()) as reader:
        expected = reader.embed(texts)  # type: ignore[union-attr]
        alone = reader.embed(texts[:1])  # type: ignore[union-attr]
        with serve({"m": recorded, "reader": reader}) as server, to(server) as client:
            packed = client.embeddings.create(model="reader", input=texts)
            plain = client.embeddings.create(
                model="reader", input=texts[0], encoding_format="float", dimensions=32
            )
            refusals: list[tuple[dict[str, Any], str]] = [
                ({"input": ""}, "a text to read is empty"),
                ({"input": []}, "input"),
                ({"input": [1, 2]}, "token ids"),
                ({"input": "a", "dimensions": 8}, "reader has 32, not 8"),
                ({"input": ["a"] * 513}, "at most 512"),
            ]
            for options, said in refusals:
                with pytest.raises(openai.BadRequestError, match=said):
                    client.embeddings.create(model="reader", **options)
            with pytest.raises(openai.BadRequestError, match="is an encoder and writes no text"):
                chat(client, model="reader")

    np.testing.assert_allclose([row.embedding for row in packed.data], expected, atol=1e-6)
    np.testing.assert_allclose(plain.data[0].embedding, alone[0], atol=1e-6)
    assert packed.usage.prompt_tokens == len("hello") + len("good morning") + 64


def test_addresses_that_are_not_served(recorded: Recorded) -> None:
    with pytest.raises(ConfigError, match="no key"):
        serve({"m": recorded}, host="0.0.0.0")
    with pytest.raises(ConfigError, match="no model"):
        serve({})
    with serve({"m": recorded}) as server, pytest.raises(LinkError, match="cannot listen"):
        serve({"m": recorded}, port=server.port)
