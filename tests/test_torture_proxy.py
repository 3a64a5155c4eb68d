"""The fault proxy makes each of its faults, and none that was not asked for."""

import random
import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest

from tests.torture.proxy import CLEAR, Proxy, Roof, Weather

SOON_S = 5.0


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        try:
            while data := self.request.recv(65536):
                self.request.sendall(data)
        except OSError:
            return


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Roof() as roof, _Server(("127.0.0.1", 0), _Echo) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        one = Proxy(roof, server.server_address[1], random.Random(3))
        yield one
        one.close()
        server.shutdown()
        thread.join()


def dial(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=SOON_S)


def echo(client: socket.socket, data: bytes) -> bytes:
    client.sendall(data)
    return take(client, len(data))


def take(client: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size and (more := client.recv(65536)):
        got += more
    return got


def ended(client: socket.socket) -> bool:
    """Whether the connection ends, either way, before anything arrives."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def test_clear_weather_changes_nothing_and_counts(proxy: Proxy) -> None:
    data = random.Random(1).randbytes(300_000)
    with dial(proxy) as client:
        sender = threading.Thread(target=client.sendall, args=(data,))
        sender.start()
        assert take(client, len(data)) == data
        sender.join()

    assert (proxy.passed, proxy.connections) == ({"up": 300_000, "down": 300_000}, 1)


def test_latency_holds_both_ways_and_ends_with_the_weather(proxy: Proxy) -> None:
    with dial(proxy) as client:
        echo(client, b"warm")
        proxy.set(Weather(latency_s=0.1))
        began = time.monotonic()
        assert echo(client, b"slow") == b"slow"
        assert time.monotonic() - began >= 0.2

        proxy.set(Weather(latency_s=60.0))
        client.sendall(b"stuck")
        proxy.set(CLEAR)
        assert take(client, 5) == b"stuck"


def test_bandwidth_is_kept(proxy: Proxy) -> None:
    with dial(proxy) as client:
        echo(client, b"warm")
        proxy.set(Weather(bytes_per_s=20_000))
        began = time.monotonic()
        echo(client, bytes(4_000))

    assert 0.2 <= time.monotonic() - began < SOON_S


def test_a_cut_ends_the_connection_and_a_new_one_works(proxy: Proxy) -> None:
    with dial(proxy) as client:
        echo(client, b"warm")
        proxy.cut()
        assert ended(client)
    with dial(proxy) as client:
        assert echo(client, b"again") == b"again"


def test_a_half_open_connection_is_dead_for_good_and_nobody_is_told(proxy: Proxy) -> None:
    with dial(proxy) as client:
        echo(client, b"warm")
        proxy.set(Weather(half_open=True))
        client.sendall(b"gone")
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)
        proxy.set(CLEAR)
        client.sendall(b"still gone")
        with pytest.raises(TimeoutError):
            client.recv(1)
        with dial(proxy) as other:
            assert echo(other, b"here") == b"here"


def test_corruption_changes_bytes_but_not_their_number(proxy: Proxy) -> None:
    data = bytes(10_000)
    with dial(proxy) as client:
        echo(client, b"warm")
        proxy.set(Weather(corrupt=1.0))
        got = echo(client, data)

    assert len(got) == len(data)
    assert 1 <= sum(byte != 0 for byte in got) <= 20


def test_refusal_closes_new_connections_only(proxy: Proxy) -> None:
    with dial(proxy) as old:
        echo(old, b"warm")
        proxy.set(Weather(refuse=True))
        with dial(proxy) as new:
            assert ended(new)
        assert echo(old, b"still") == b"still"


def test_the_latest_connection_is_served_first(proxy: Proxy) -> None:
    proxy.set(Weather(reorder_s=SOON_S))
    with dial(proxy) as first:
        first.sendall(b"first")
        first.settimeout(0.1)
        with pytest.raises(TimeoutError):
            first.recv(1)
        with dial(proxy) as second:
            assert echo(second, b"second") == b"second"
            first.settimeout(SOON_S)
            assert take(first, 5) == b"first"
