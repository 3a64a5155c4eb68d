"""F4: seeded schedules of network faults between devices, broker and coordinator.

Knows the faults and when they begin and end. Does not know what is right: the history checker
judges what devices and coordinator wrote down.

Each schedule is a world of its own: a mosquitto, a coordinator and two devices, each behind its own
fault proxy, several worlds at a time. For some seconds the weather of one or all of the three links
changes (latency up to 2 s, 2 KB/s, half-open, corrupt bytes, refused and reordered connections,
cuts) while rounds run; then it clears, and everything that was sent must be acknowledged. Time is
made shorter than in life by a keepalive of 2 s, patience of 0.3 s and retries within 0.5 s.
"""

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from edge_sdk.errors import FleetError
from edge_sdk.link.broker import Broker, start_broker
from edge_sdk.link.mqtt import MqttLink
from tests.torture.history import Did, History, Verdict, check
from tests.torture.parties import RUN, Device, Headquarters, counting
from tests.torture.proxy import CLEAR, Proxy, Roof, Weather
from tests.torture.result import Result, Scale, say

NAMES = ("a", "b")
PLACES = (*NAMES, "coordinator")
SCHEDULES = {Scale.SHORT: 4, Scale.FULL: 500}
AT_ONCE = {Scale.SHORT: 4, Scale.FULL: 12}
PHASES = (1, 4)
PHASE_S = (0.2, 1.2)
BYTES = (1_000, 200_000)
LONGEST_S = 300.0
"""The goal: no schedule over five minutes."""
PATIENCE_S = 90.0
"""This suite itself gives up on a schedule earlier than that."""
LAST_STEPS = 2


@dataclass(frozen=True, slots=True)
class Phase:
    """One fault: `places` have `weather` for `seconds`; `cut` ends their connections at first."""

    places: tuple[str, ...]
    weather: Weather
    cut: bool
    seconds: float


def schedule(rng: random.Random) -> Iterator[Phase]:
    """Yield the phases of one schedule."""
    for _ in range(rng.randint(*PHASES)):
        places = PLACES if rng.random() < 0.25 else (rng.choice(PLACES),)
        kind = rng.choice(("cut", "half-open", "slow", "late", "corrupt", "refuse", "reorder"))
        weather = {
            "cut": CLEAR,
            "half-open": Weather(half_open=True),
            "slow": Weather(bytes_per_s=2_000),
            "late": Weather(latency_s=rng.uniform(0.05, 2.0)),
            "corrupt": Weather(corrupt=rng.uniform(0.01, 0.5)),
            "refuse": Weather(refuse=True),
            "reorder": Weather(reorder_s=0.5),
        }[kind]
        cut = kind in ("cut", "refuse", "reorder") or rng.random() < 0.2
        yield Phase(places, weather, cut, rng.uniform(*PHASE_S))


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Run every schedule and judge each by its own history."""
    count = SCHEDULES[scale]
    finishing: list[float] = []
    verdicts: dict[int, Verdict] = {}
    failures: dict[int, str] = {}

    def one(number: int) -> None:
        home = folder / str(number)
        try:
            finishing.append(_world(home, random.Random(f"{seed} {number}"), roof))
            verdicts[number] = check(home / "history")
        except FleetError as exc:
            failures[number] = f"{type(exc).__name__}: {exc}"
            say("F4", f"schedule {number}: {failures[number]}")
        tried = len(verdicts) + len(failures)
        if tried % 50 == 0:
            say("F4", f"{tried} of {count} schedules, slowest end {max(finishing):.1f} s")

    with Roof() as roof, ThreadPoolExecutor(AT_ONCE[scale]) as pool:
        list(pool.map(one, range(count)))
    bad = {n: str(v) for n, v in verdicts.items() if not v.ok or v.waiting or v.held}
    slowest = max(finishing, default=LONGEST_S)
    return Result(
        code="F4",
        title="schedules of network faults",
        value={"schedules": count, "slowest_end_s": round(slowest, 2)},
        unit="schedules",
        goal="500 schedules, 0 lost, all finish once faults stop, none over 300 s",
        passed=not bad and not failures and slowest < LONGEST_S,
        lost=sum(len(v.lost) for v in verdicts.values()),
        doubled=sum(len(v.doubled) for v in verdicts.values()),
        notes={
            "updates": sum(v.sent for v in verdicts.values()),
            "median_end_s": round(sorted(finishing)[len(finishing) // 2], 2) if finishing else 0,
            **({"bad": bad} if bad else {}),
            **({"unfinished": failures} if failures else {}),
        },
    )


def _world(folder: Path, rng: random.Random, roof: Roof) -> float:
    """Live through one schedule; return how long everything took once the weather was clear."""
    users = {name: f"{name}-secret" for name in PLACES}
    with start_broker(folder / "broker", users=users, prefer="mosquitto") as broker:
        proxies = {place: Proxy(roof, broker.port, random.Random(rng.random())) for place in PLACES}
        history = History(folder / "history" / "coordinator.jsonl")
        office = Headquarters(
            folder / "hq", _link(broker, proxies, "coordinator"), NAMES, patience_s=0.3
        )
        devices = [
            Device(
                name,
                folder / "hq",
                _link(broker, proxies, name),
                folder / "history",
                size=lambda drawn: drawn.randint(*BYTES),
                seed=rng.randrange(2**31),
                patience_s=0.3,
            )
            for name in NAMES
        ]
        try:
            return _rounds(office, devices, history, proxies, rng)
        finally:
            for device in devices:
                device.close()
            office.close()
            for proxy in proxies.values():
                proxy.close()


def _rounds(
    office: Headquarters,
    devices: list[Device],
    history: History,
    proxies: dict[str, Proxy],
    rng: random.Random,
) -> float:
    begun, ending = threading.Event(), threading.Event()
    last: list[int] = []

    def over(step: int) -> bool:
        if ending.is_set() and not last:
            last.append(step + LAST_STEPS)
        return bool(last) and step >= last[0]

    def told(text: str) -> None:
        if text.startswith(Did.COMMITTED):
            begun.set()

    office.start()
    for device in devices:
        device.start()
    need = rng.choice((1, len(NAMES)))
    program = counting(NAMES, history, need=need, within_s=5.0, over=over, told=told)
    thread = office.runner.start(program, run=RUN)
    if not begun.wait(PATIENCE_S):
        raise FleetError("no first commit in clear weather")
    for phase in schedule(rng):
        for place in phase.places:
            proxies[place].set(phase.weather)
            if phase.cut:
                proxies[place].cut()
        time.sleep(phase.seconds)  # the schedule
        for place in phase.places:
            proxies[place].set(CLEAR)
    cleared = time.monotonic()
    ending.set()
    thread.join(PATIENCE_S)
    if thread.is_alive() or office.runner.failure is not None:
        raise FleetError(f"the program did not finish: {office.runner.failure}")
    office.wait_until_delivered(PATIENCE_S)
    for device in devices:
        device.wait_until_idle(PATIENCE_S)
    took = time.monotonic() - cleared
    office.account(history)
    return took


def _link(broker: Broker, proxies: dict[str, Proxy], name: str) -> MqttLink:
    url = broker.url_for(name).replace(f":{broker.port}", f":{proxies[name].port}")
    return MqttLink(url, keepalive_s=2, first_retry_s=0.05, last_retry_s=0.5)
