"""A TCP proxy that makes a network bad on request: one thread, any number of connections.

Knows bytes, delays and connections. Does not know MQTT. `tc netem` needs a kernel module and root;
this needs neither, and a seed repeats a schedule.

A `Weather` holds for everything that passes until the next `set`: latency and bandwidth in each
direction, half-open (a connection that carries bytes meanwhile is dead for good, and nobody is
told), corruption, and for new connections refusal or being served in reverse order. `cut` ends the
connections that there are.
"""

import asyncio
import contextlib
import random
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Literal

Way = Literal["up", "down"]

PIECE = 16 * 1024
BACKLOG_BYTES = 64 * 1024
"""What waits in the proxy per direction before it stops reading: a modest network buffer."""


@dataclass(frozen=True, slots=True)
class Weather:
    """How bad the network is.

    latency_s delays each direction; bytes_per_s (0: no limit) slows it down; corrupt is the chance
    per piece of at most 16 KiB that one of its bytes is changed; half_open lets bytes vanish
    and a connection that lost some carries none any more, which only its ends' own timers find out;
    refuse closes new connections at once; reorder holds new connections back for up to so many
    seconds and serves the latest first.
    """

    latency_s: float = 0.0
    bytes_per_s: float = 0.0
    corrupt: float = 0.0
    half_open: bool = False
    refuse: bool = False
    reorder_s: float = 0.0


CLEAR = Weather()


class Roof:
    """The thread and event loop that the proxies share."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="proxy", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Roof":
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def do(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` on the loop and return when it is done."""
        asyncio.run_coroutine_threadsafe(work, self.loop).result()


class Proxy:
    """Listens on `port` of 127.0.0.1 and passes everything on to `target`, another port there.

    Attributes:
        passed: bytes taken from clients ("up") and from the target ("down") since the start.
        connections: how many were served.
    """

    def __init__(self, roof: Roof, target: int, rng: random.Random) -> None:
        self.passed: dict[Way, int] = {"up": 0, "down": 0}
        self.connections = 0
        self._marks: list[tuple[Way, int, threading.Event]] = []
        self._roof, self._target, self._rng = roof, target, rng
        self._weather = CLEAR
        self._changed = asyncio.Event()
        self._live: set[asyncio.Task[None]] = set()
        self._held: list[asyncio.Event] = []
        roof.do(self._open())

    def set(self, weather: Weather) -> None:
        """Let `weather` hold from now on; bytes that vanished or changed stay so."""
        self._roof.loop.call_soon_threadsafe(self._turn, weather)

    def cut(self) -> None:
        """End every connection now."""
        self._roof.loop.call_soon_threadsafe(lambda: [task.cancel() for task in self._live])

    def mark(self, way: Way, more: int) -> threading.Event:
        """Return an event that is set once `more` bytes have passed that way from now on."""
        event = threading.Event()
        self._marks.append((way, self.passed[way] + more, event))
        return event

    def close(self) -> None:
        """Stop listening and end every connection."""
        self._roof.do(self._shut())

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=PIECE)
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def _shut(self) -> None:
        self._server.close()
        self._turn(CLEAR)
        for task in self._live:
            task.cancel()
        await asyncio.gather(*self._live, return_exceptions=True)

    def _turn(self, weather: Weather) -> None:
        self._weather = weather
        self._changed.set()
        self._changed = asyncio.Event()
        for held in self._held:
            held.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._live.add(task)
        other: asyncio.StreamWriter | None = None
        try:
            await self._wait_for_my_turn()
            if self._weather.refuse:
                return
            source, other = await asyncio.open_connection("127.0.0.1", self._target, limit=PIECE)
            self.connections += 1
            dead = [False]
            both = [
                asyncio.ensure_future(self._pass(reader, other, "up", dead)),
                asyncio.ensure_future(self._pass(source, writer, "down", dead)),
            ]
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for half in both:
                    half.cancel()
                await asyncio.gather(*both, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass  # a cut, or the other end went away: the client sees its connection end
        finally:
            self._live.discard(task)
            for end in (writer, other):
                if end is not None:
                    end.transport.abort()

    async def _wait_for_my_turn(self) -> None:
        """Under `reorder_s`, wait until a later connection came or the time is over."""
        if self._weather.reorder_s <= 0:
            return
        earlier, self._held = self._held, []
        mine = asyncio.Event()
        self._held.append(mine)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(mine.wait(), self._weather.reorder_s if not earlier else 0.0)
        for held in earlier:  # they were first; now they come after us
            self._roof.loop.call_later(0.01, held.set)

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        way: Way,
        dead: list[bool],
    ) -> None:
        """One direction: pieces wait in a queue until their time has come."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(BACKLOG_BYTES // PIECE)
        sender = asyncio.ensure_future(self._send(queue, writer))
        try:
            while piece := await reader.read(PIECE):
                self._count(way, len(piece))
                dead[0] = dead[0] or self._weather.half_open
                if dead[0]:
                    continue
                due = self._roof.loop.time() + self._weather.latency_s
                putting = asyncio.ensure_future(queue.put((due, self._spoilt(piece))))
                await asyncio.wait({putting, sender}, return_when=asyncio.FIRST_COMPLETED)
                if sender.done():
                    putting.cancel()
                    return
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    async def _send(
        self, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        while True:
            due, piece = await queue.get()
            await self._until(due)
            while piece:
                rate = self._weather.bytes_per_s
                size = max(1, int(rate / 20)) if rate else len(piece)
                part, piece = piece[:size], piece[size:]
                if rate:
                    await self._until(self._roof.loop.time() + len(part) / rate)
                writer.write(part)
                await writer.drain()

    async def _until(self, due: float) -> None:
        """Wait for `due`, or until the weather changes."""
        left_s = due - self._roof.loop.time()
        if left_s > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left_s)

    def _spoilt(self, piece: bytes) -> bytes:
        if self._rng.random() >= self._weather.corrupt:
            return piece
        at = self._rng.randrange(len(piece))
        return piece[:at] + bytes([piece[at] ^ self._rng.randrange(1, 256)]) + piece[at + 1 :]

    def _count(self, way: Way, size: int) -> None:
        self.passed[way] += size
        for mark in [m for m in self._marks if m[0] == way and m[1] <= self.passed[way]]:
            self._marks.remove(mark)
            mark[2].set()
