"""F6: the disk of a device, of the coordinator or of the broker is full amid a run.

Knows small disks (a tmpfs each) and when they are full. Does not know what is right: the history
checker judges what devices and coordinator wrote down.

Each time rounds run until a step is committed; then a file takes all room but a random rest. The
one whose disk it is must refuse a large message with a StorageError, a program that ends must have
ended with one, the store must open again while the disk is still full, and once the file is gone
everything goes on to the end. The broker is a mosquitto that keeps its state on the full disk and
is killed and started there too.
"""

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_sdk.errors import ConfigError, FleetError, StorageError
from edge_sdk.link.base import Link
from edge_sdk.link.broker import Broker, find_mosquitto, start_broker
from edge_sdk.link.courier import Courier
from edge_sdk.link.memory import MemoryBroker
from edge_sdk.link.mqtt import MqttLink
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire.messages import File
from tests.torture.history import History, check
from tests.torture.parties import RUN, Device, Headquarters, counting
from tests.torture.result import Result, Scale, say

NAMES = ("a", "b")
PLACES = ("device", "coordinator", "broker")
RUNS = {Scale.SHORT: 1, Scale.FULL: 50}
"""For each place."""
DISK_BYTES = 6 * 2**20
REST_BYTES = 96 * 1024
BYTES = (1_000, 100_000)
FULL_S = 0.5
DEADLINE_S = 30.0
LARGE = File(task_id="large", path="p", data=bytes(2**20))
"""More than what is left of any disk that is full."""
LAST_STEPS = 2
BROKER_STATE = "persistence true\npersistence_location {folder}/\nautosave_interval 1\n"


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Fill each disk as often as `scale` says, and judge every run by its own history."""
    problems: list[str] = []
    lost = doubled = updates = 0
    for place in PLACES:
        for number in range(RUNS[scale]):
            home = folder / f"{place}-{number}"
            home.mkdir()
            rng = random.Random(f"{seed} {place} {number}")
            with small_disk(home / "disk") as disk:
                try:
                    _World(home, disk, place, rng).live()
                except FleetError as exc:
                    problems.append(f"{place} {number}: {type(exc).__name__}: {exc}")
                    say("F6", problems[-1])
            verdict = check(home / "history")
            lost, doubled = lost + len(verdict.lost), doubled + len(verdict.doubled)
            updates += verdict.sent
            if not verdict.ok or verdict.waiting or verdict.held:
                problems.append(f"{place} {number}: {verdict}")
        say("F6", f"{place}: {RUNS[scale]} runs, {len(problems)} problems so far")
    return Result(
        code="F6",
        title="disk full at device, coordinator and broker",
        value={"runs": RUNS[scale] * len(PLACES), "problems": len(problems)},
        unit="runs",
        goal="50 runs each: typed error, store opens, resumes when freed, 0 lost",
        passed=not problems,
        lost=lost,
        doubled=doubled,
        notes={"updates": updates, **({"problems": problems[:10]} if problems else {})},
    )


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a small disk in `folder` while the block lasts.

    Raises:
        ConfigError: this user may not mount.
    """
    folder.mkdir()
    size = f"size={DISK_BYTES},mode=0700"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        raise ConfigError(f"cannot mount a small disk ({mounted.stderr.strip()}); run it as root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


class _World:
    """One run: a coordinator and two devices, one of the three places on the small disk."""

    def __init__(self, home: Path, disk: Path, place: str, rng: random.Random) -> None:
        self._disk, self._place, self._rng = disk, place, rng
        self._hq = disk / "hq" if place == "coordinator" else home / "hq"
        self._history = home / "history"
        self._record = History(self._history / "coordinator.jsonl")
        self._memory = MemoryBroker()
        self._broker = _FullBroker(home, disk) if place == "broker" else None
        self._begun, self._ending = threading.Event(), threading.Event()
        self._last: list[int] = []
        self._seed = rng.randrange(2**31)
        self._office = self._headquarters()
        self._devices = {name: self._device(name) for name in NAMES}

    def live(self) -> None:
        """Live through the full disk, to the end."""
        try:
            self._office.start()
            for device in self._devices.values():
                device.start()
            thread = self._start()
            _need(self._begun.wait(DEADLINE_S), "no first commit")
            self._fill()
            thread = getattr(self, f"_full_{self._place}")(thread)
            self._free()
            self._ending.set()
            if thread is None:
                thread = self._start()
            thread.join(DEADLINE_S)
            _need(not thread.is_alive(), "the program did not go on when there was room")
            if self._office.runner.failure is not None:
                raise FleetError(f"the program ended: {self._office.runner.failure}")
            self._office.wait_until_delivered(DEADLINE_S)
            for device in self._devices.values():
                device.wait_until_idle(DEADLINE_S)
        finally:
            for device in self._devices.values():
                device.close()
            self._office.account(self._record)
            self._office.close()
            self._record.close()
            if self._broker is not None:
                self._broker.close()

    # --- while the disk is full ---------------------------------------------------------------

    def _full_device(self, thread: threading.Thread) -> threading.Thread:
        device = self._devices["a"]
        device.refused.wait(self._rng.uniform(0.0, FULL_S))  # or its courier alone was refused
        _refuses(device.courier, "coordinator")
        device.close()
        with Mailbox(self._disk / "a.db") as store:
            store.pending()
            store.unread()
        self._devices["a"] = self._device("a")
        self._devices["a"].start()
        return thread

    def _full_coordinator(self, thread: threading.Thread) -> None:
        thread.join(self._rng.uniform(0.0, FULL_S))  # or its courier alone was refused
        _refuses(self._office.courier, NAMES[0])
        failure = self._office.runner.failure
        if failure is not None and not isinstance(failure, StorageError):
            raise FleetError(f"not a StorageError but {type(failure).__name__}: {failure}")
        self._office.close()
        self._office = self._headquarters()
        try:
            self._office.start()
        except StorageError:  # it may also say so at its start, and be started again later
            self._office.close()
            self._free()
            self._office = self._headquarters()
            self._office.start()

    def _full_broker(self, thread: threading.Thread) -> threading.Thread:
        assert self._broker is not None
        self._broker.kill()
        self._broker.start()
        self._begun.clear()
        _need(self._begun.wait(DEADLINE_S), "no commit with the broker's disk full")
        return thread

    # --- parts --------------------------------------------------------------------------------

    def _start(self) -> threading.Thread:
        program = counting(
            NAMES,
            self._record,
            need=len(NAMES),
            within_s=5.0,
            over=self._over,
            told=lambda text: self._begun.set() if text.startswith("committed") else None,
        )
        return self._office.runner.start(program, run=RUN)

    def _over(self, step: int) -> bool:
        if self._ending.is_set() and not self._last:
            self._last.append(step + LAST_STEPS)
        return bool(self._last) and step >= self._last[0]

    def _fill(self) -> None:
        with open(self._disk / "ballast", "wb", buffering=0) as ballast:
            piece = bytes(64 * 1024)
            try:
                while piece:
                    ballast.write(piece)
            except OSError:
                size = os.fstat(ballast.fileno()).st_size
            ballast.truncate(max(0, size - self._rng.randrange(REST_BYTES)))

    def _free(self) -> None:
        (self._disk / "ballast").unlink(missing_ok=True)

    def _headquarters(self) -> Headquarters:
        return Headquarters(self._hq, self._link("coordinator"), NAMES, patience_s=0.2)

    def _device(self, name: str) -> Device:
        return Device(
            name,
            self._hq,
            self._link(name),
            self._history,
            size=lambda drawn: drawn.randint(*BYTES),
            seed=self._seed,
            store=self._disk if (name, self._place) == ("a", "device") else None,
            patience_s=0.2,
        )

    def _link(self, name: str) -> Link:
        if self._broker is None:
            return self._memory.link(name)
        return MqttLink(self._broker.url_for(name), first_retry_s=0.02, last_retry_s=0.2)


class _FullBroker:
    """A mosquitto as `start_broker` configures it, but with its state kept, on the small disk."""

    def __init__(self, home: Path, disk: Path) -> None:
        users = {name: f"{name}-secret" for name in (*NAMES, "coordinator")}
        self._first: Broker = start_broker(home / "broker", users=users, prefer="mosquitto")
        self.url_for: Callable[[str], str] = self._first.url_for
        text = (home / "broker" / "mosquitto.conf").read_text()
        self._config = home / "broker" / "full.conf"
        self._config.write_text(
            text.replace("persistence false\n", BROKER_STATE.format(folder=disk))
        )
        self._log = home / "broker" / "full.log"
        self._first.close()
        self.start()

    def start(self) -> None:
        """Start it; the links' own retries wait for it."""
        program = find_mosquitto()
        assert program is not None
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen([program, "-c", str(self._config)], stderr=log)

    def kill(self) -> None:
        """SIGKILL it, once it has had time to save."""
        time.sleep(0.1)
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()


def _refuses(courier: Courier, to: str) -> None:
    try:
        courier.send(to, LARGE, task="large")
    except StorageError:
        return
    raise FleetError("a message was taken that the disk has no room for")


def _need(happened: bool, otherwise: str) -> None:
    if not happened:
        raise FleetError(f"{otherwise} within {DEADLINE_S:.0f} s")
