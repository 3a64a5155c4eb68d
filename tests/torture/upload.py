"""Upload as fast as it goes: publisher processes, a broker, and a coordinator that counts.

Knows how to start the parties, how long to measure and what each of them used. Does not know any
goal; L1, L2 and F5 are this with other brokers. Run as `python -m tests.torture.upload ROLE SETUP`
for the processes.

Every publisher keeps a few messages in its outbox, each sealed anew and none like another. The
coordinator takes letters as the product does: durable first, then `Done`, and a consumer that marks
them read, here with a line in its history for each group. What is measured are bytes of accepted
updates per second, sealed, sent, confirmed and consumed.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_sdk.link.broker import Broker, Kind, start_broker
from edge_sdk.link.courier import Courier
from edge_sdk.link.mqtt import MqttLink
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire.messages import AdapterUpdate, decode
from edge_sdk.wire.seal import Identity, PublicIdentity
from tests.torture.history import Did, History, Verdict, check
from tests.torture.result import Result, say

ROOT = Path(__file__).resolve().parent.parent.parent
TENANT = "home"
DEPTH = 3
"""Messages that a publisher keeps in its outbox."""
_WARM_S = 4.0
_DRAIN_S = 60.0
_LOOK_S = 0.02


@dataclass(frozen=True, slots=True)
class Setup:
    """What the processes are told. Sizes in bytes."""

    folder: str
    urls: dict[str, str]
    seconds: float
    size: int
    seed: int
    mqtt_version: str = "5"


@dataclass(slots=True)
class Measured:
    """One run. `rate` in MB/s (10^6 bytes) of accepted updates after the warm-up."""

    rate: float
    slowest: float
    seconds: float
    messages: int
    verdict: Verdict
    cpu_s: dict[str, float]
    peak_mb: dict[str, float]
    resent: float

    def result(
        self,
        code: str,
        title: str,
        goal: str,
        *,
        reached: bool,
        notes: Mapping[str, Any] | None = None,
    ) -> Result:
        """A figure that passes when its goal is `reached` and not one update went astray."""
        verdict = self.verdict
        return Result(
            code=code,
            title=title,
            value=round(self.rate, 1),
            unit="MB/s of accepted updates",
            goal=goal,
            passed=verdict.ok and not verdict.waiting and not verdict.held and reached,
            lost=len(verdict.lost),
            doubled=len(verdict.doubled),
            notes={**self._figures(), **(notes or {})},
        )

    def _figures(self) -> dict[str, object]:
        return {
            "slowest_5_s": round(self.slowest, 1),
            "messages": self.messages,
            "history": str(self.verdict),
            "cpu_share_of_two_cores": {
                name: round(used / self.seconds / 2, 3) for name, used in self.cpu_s.items()
            },
            "peak_mb": {name: round(mb) for name, mb in self.peak_mb.items()},
            "sent_per_received_byte": round(self.resent, 3),
        }


def upload(
    folder: Path,
    kind: Kind,
    *,
    seconds: float,
    publishers: int = 8,
    size: int = 2 * 1024 * 1024,
    seed: int = 7,
    code: str = "L1",
    prepare: Callable[[Broker], Broker] = lambda broker: broker,
) -> Measured:
    """Run it and return what was measured; `prepare` may exchange the broker's configuration."""
    names = [f"device-{number}" for number in range(publishers)]
    users = {name: f"secret-{name}" for name in ("coordinator", *names)}
    (folder / "history").mkdir()
    for name in users:
        identity = Identity.generate()
        (folder / f"{name}.key").write_bytes(identity.to_bytes())
        (folder / f"{name}.pub").write_bytes(identity.public.to_bytes())
    broker = prepare(start_broker(folder / "broker", users=users, prefer=kind))
    setup = Setup(
        folder=str(folder),
        urls={name: broker.url_for(name) for name in users},
        seconds=seconds + _WARM_S,
        size=size,
        seed=seed,
        mqtt_version="5" if kind == "mosquitto" else "3.1.1",
    )
    (folder / "setup.json").write_text(json.dumps(asdict(setup)))
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        processes["coordinator"] = _start("coordinator", folder)
        processes |= {name: _start(name, folder) for name in names}
        began = time.monotonic()
        while any(processes[name].poll() is None for name in names):
            if time.monotonic() - began > setup.seconds + _DRAIN_S:
                say(code, "publishers did not finish; they are ended")
                break
            time.sleep(0.5)
        cpu = {"broker": _cpu_s(broker.pid)}
        peak = {"broker": peak_mb(broker.pid)}
        (folder / "stop").touch()
        processes["coordinator"].wait(_DRAIN_S)
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()
        broker.close()
    return _measured(folder, names, seconds, cpu, peak)


def _measured(
    folder: Path, names: list[str], seconds: float, cpu: dict[str, float], peak: dict[str, float]
) -> Measured:
    told = {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    mine: dict[str, Any] = json.loads((folder / "coordinator.json").read_text())
    marks: list[tuple[float, int, int]] = [tuple(mark) for mark in mine["marks"]]
    start = marks[0][0] + _WARM_S
    inside = [mark for mark in marks if start <= mark[0] <= start + seconds]
    rate = (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0]) / 1e6
    wire = sum(one["wire"] for one in told.values())
    return Measured(
        rate=rate,
        slowest=_slowest(inside, 5.0),
        seconds=marks[-1][0] - marks[0][0],
        messages=mine["letters"],
        verdict=check(folder / "history"),
        cpu_s={
            **cpu,
            "coordinator": mine["cpu_s"],
            "publishers": sum(one["cpu_s"] for one in told.values()),
        },
        peak_mb={
            **peak,
            "coordinator": mine["peak_mb"],
            "publisher": max(one["peak_mb"] for one in told.values()),
        },
        resent=wire / max(1, mine["wire"]),
    )


def _slowest(marks: list[tuple[float, int, int]], span_s: float) -> float:
    worst = float("inf")
    for at, done, _ in marks:
        later = next((mark for mark in marks if mark[0] >= at + span_s), None)
        if later is None:
            break
        worst = min(worst, (later[1] - done) / (later[0] - at) / 1e6)
    return 0.0 if worst == float("inf") else worst


def _start(name: str, folder: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "tests.torture.upload", name, str(folder / "setup.json")]
    return subprocess.Popen(command, cwd=ROOT)


def peak_mb(pid: int | str = "self") -> float:
    """Return the most memory a process ever had resident, in MB (10^6 bytes)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def value_of(codes: bytes) -> int:
    """Return the integer of an update: a hash of every 4096th byte. AEAD guards the rest."""
    return int.from_bytes(hashlib.sha256(codes[::4096] + codes[:16]).digest()[:5], "big")


# --- the processes ------------------------------------------------------------------------------


def _courier(setup: Setup, name: str, **options: Any) -> tuple[Courier, Mailbox]:
    folder = Path(setup.folder)
    keys = {
        path.stem: PublicIdentity.from_bytes(path.read_bytes()) for path in folder.glob("*.pub")
    }
    version: Any = setup.mqtt_version
    link = MqttLink(setup.urls[name], first_retry_s=0.1, last_retry_s=1.0, mqtt_version=version)
    mailbox = Mailbox(folder / f"{name}.db")
    courier = Courier(
        link,
        mailbox,
        Identity.from_bytes((folder / f"{name}.key").read_bytes()),
        tenant=TENANT,
        me=name,
        lookup=keys.get,
        now=time.time,
        rng=random.Random(f"{setup.seed} {name}"),
        **options,
    )
    return courier, mailbox


def _publish(setup: Setup, name: str) -> None:
    courier, mailbox = _courier(setup, name)
    base = random.Random(f"{setup.seed} {name}").randbytes(setup.size)
    open_: dict[bytes, str] = {}
    deadline = time.monotonic() + setup.seconds
    number = 0
    with courier, History(Path(setup.folder) / "history" / f"{name}.jsonl") as history:
        while open_ or time.monotonic() < deadline:
            waiting = set(mailbox.waiting())
            for stream in [stream for stream in open_ if stream not in waiting]:
                parked = mailbox.posted(stream)
                did, why = (Did.PARKED, parked.parked) if parked else (Did.DONE, "")
                history(did, update=open_.pop(stream), reason=why)
            while len(open_) < DEPTH and time.monotonic() < deadline:
                number += 1
                codes = number.to_bytes(16, "big") + base[16:]
                update = f"{name}/t{number}"
                history(Did.SENT, update=update, value=value_of(codes))
                message = _update(f"t{number}", number, codes)
                open_[courier.send("coordinator", message, task=f"t{number}")] = update
            with courier.mail:
                courier.mail.wait(_LOOK_S)
            if time.monotonic() > deadline + _DRAIN_S:
                break
    mailbox.close()
    _tell(setup, name, {"wire": sum(courier.bytes_up.values())})


def _update(task: str, number: int, codes: bytes) -> AdapterUpdate:
    return AdapterUpdate(
        task_id=task,
        round=number,
        release="base",
        codec_id="identity",
        codes=codes,
        examples=3,
        raw_bytes=len(codes),
        cosine=0.9,
        seconds={"train": 0.1},
        peak_mb=10.0,
    )


def _coordinate(setup: Setup) -> None:
    folder = Path(setup.folder)
    courier, mailbox = _courier(setup, "coordinator")
    marks: list[tuple[float, int, int]] = []
    taken = last = step = 0
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with courier, History(folder / "history" / "coordinator.jsonl") as history:
        while not stop.is_set():
            letters = mailbox.unread(after=last)
            if letters:
                parts = []
                for letter in letters:
                    message = decode(letter.message)
                    assert isinstance(message, AdapterUpdate)
                    parts.append((f"{letter.sender}/{letter.task}", value_of(message.codes)))
                    taken += len(message.codes)
                    last = letter.id
                attempt = f"step-{step}"
                history(Did.ATTEMPT, run="sum", step=step, attempt=attempt, parts=parts)
                with mailbox.transaction():
                    for letter in letters:
                        mailbox.mark_read(letter.id)
                history(Did.COMMITTED, run="sum", step=step, attempt=attempt)
                step += 1
                marks.append((time.monotonic(), taken, last))
            elif (folder / "stop").exists():
                stop.set()
            else:
                courier.wait_for_mail(_LOOK_S)
    wire = sum(courier.bytes_up.values())
    mailbox.close()
    _tell(setup, "coordinator", {"marks": marks, "letters": last, "wire": wire})


def _tell(setup: Setup, name: str, more: dict[str, Any]) -> None:
    used = {"cpu_s": time.process_time(), "peak_mb": peak_mb()}
    (Path(setup.folder) / f"{name}.json").write_text(json.dumps(used | more))


def main(name: str, setup_file: str) -> None:
    """One of the processes."""
    setup = Setup(**json.loads(Path(setup_file).read_text()))
    if name == "coordinator":
        _coordinate(setup)
    else:
        _publish(setup, name)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
