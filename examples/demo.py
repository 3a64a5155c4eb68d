"""The whole loop on this machine: `symbiont demo`, or `make demo` from a fresh clone.

    symbiont demo                                  # a broker of its own, four devices, two rounds
    symbiont demo --broker mqtt://host:1883        # another broker
    symbiont demo --devices 2 --rounds 1 --json    # smaller; prints one JSON object

Knows which processes make up a fleet, and shows what they say. Does not know learning, sealing or
transfer: the coordinator and every device are processes of their own, started by the same commands
an operator uses, and everything shown comes from their event lines.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import platform
import queue
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from rich.console import Console

from edge_sdk.errors import ConfigError, FleetError
from edge_sdk.link.broker import Broker, start_broker
from examples.live_view import LiveView
from examples.report import DeviceResult, Results, mean, terminal, write_html

DATA = Path(__file__).resolve().parent / "data"
FAMILY = "slm-a"
MAX_DEVICES = 4
"""The published split's clients 0 to 3 play the devices."""
CODE_HOURS = 1
PUBLIC_PER_SAMPLE = 4
"""Unlabelled public requests the coordinator reads for each text its LLM writes."""
SILENCE_S = 300.0
"""A fleet that says nothing for this long is stuck; every stage reports more often."""
PROCESS_ENV = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""One thread a process: four devices and a coordinator share the machine's cores."""

SYMBIONT = (sys.executable, "-m", "edge_sdk")
WORDS = {
    "brainstorming": "brainstorming",
    "classification": "classification",
    "closed_qa": "closed",
    "creative_writing": "creative",
    "general_qa": "general",
    "information_extraction": "information",
    "open_qa": "open",
    "summarization": "summarization",
}
"""Dolly's categories and the word that stands for each in a prompt."""

Event = dict[str, Any]


def register(subparsers: Any) -> None:
    """Add `demo` to the command line."""
    parser = subparsers.add_parser("demo", help="run the whole loop on this machine")
    parser.add_argument(
        "--broker", default="", help="use this broker: mqtt://[user:pass@]host:port"
    )
    parser.add_argument("--devices", type=int, default=4, help="1 to 4 (default 4)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of learning (default 2)")
    parser.add_argument("--seed", type=int, default=7, help="same seed, same table up to timing")
    parser.add_argument(
        "--steps", type=int, default=60, help="optimizer steps a round (default 60)"
    )
    parser.add_argument("--samples", type=int, default=128, help="texts the LLM writes a round")
    parser.add_argument("--work", type=Path, default=Path(".symbiont-demo"), help="working folder")
    parser.add_argument("--report", type=Path, default=Path("demo-report.html"), help="report file")
    parser.add_argument(
        "--memory-mb", type=int, default=0, help="training memory of a device, 0: any"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; returns the exit code.

    Raises:
        ConfigError: an argument out of its range.
        FleetError: a process of the fleet failed; names it and its log.
    """
    if not 1 <= arguments.devices <= MAX_DEVICES:
        raise ConfigError(f"--devices {arguments.devices} is outside 1 to {MAX_DEVICES}")
    if not 1 <= arguments.rounds <= 50:
        raise ConfigError(f"--rounds {arguments.rounds} is outside 1 to 50")
    work: Path = arguments.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    console = Console(stderr=arguments.json)
    names = [f"device-{i + 1}" for i in range(arguments.devices)]
    began = time.monotonic()
    with Fleet(work, names, arguments) as fleet:
        fleet.start()
        with LiveView(console, names, arguments.rounds, broker=fleet.broker_kind) as view:
            for event in fleet.events():
                view.show(event)
        fleet.finish()
    seconds = time.monotonic() - began
    results = collect(fleet.log, names, arguments, broker=fleet.broker_kind, seconds=seconds)
    write_html(results, arguments.report)
    if arguments.json:
        print(json.dumps(asdict(results)))
    else:
        console.print(terminal(results))
        console.print(f"The report with plots: {arguments.report.resolve()}")
    return 0


class Fleet:
    """The broker, the coordinator and the devices as processes, and the events they print."""

    def __init__(self, work: Path, names: list[str], arguments: argparse.Namespace) -> None:
        self.work, self.names, self.arguments = work, names, arguments
        self.log: list[Event] = []
        self._queue: queue.Queue[Event] = queue.Queue()
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._readers: list[threading.Thread] = []
        self._broker: Broker | None = None
        self.broker_kind = "external"

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for reader in self._readers:
            reader.join()
        if self._broker is not None:
            self._broker.close()

    def start(self) -> None:
        """Start the broker, write every role's settings, enrol and start the processes."""
        logins = self._open_broker()
        slices = device_slices(len(self.names))
        for name, rows in zip(self.names, slices, strict=True):
            self._prepare_device(name, rows, logins[name])
        self._prepare_coordinator(logins["coordinator"])
        codes = {name: self._code(name) for name in self.names}
        self._spawn(
            "coordinator", "coordinator", "serve", "--config", "coordinator.toml", "--events"
        )
        for name in self.names:
            (self.work / name / "code").write_text(codes[name], encoding="utf-8")
            self._spawn(name, "edge", "run", "--config", "edge.toml", "--enrol", "code", "--events")

    def events(self) -> Any:
        """Yield events as the processes print them, until the coordinator says it is done."""
        while True:
            try:
                event = self._queue.get(timeout=SILENCE_S)
            except queue.Empty as exc:
                raise FleetError(
                    f"no process of the fleet said anything for {SILENCE_S:.0f} s; "
                    f"their logs are in {self.work}"
                ) from exc
            self.log.append(event)
            yield event
            if event.get("event") == "exit":
                raise FleetError(self._failure(event["who"], event["code"]))
            if event.get("who") == "coordinator" and event.get("event") == "done":
                return

    def finish(self) -> None:
        """Let every process end by itself and keep the last lines it prints."""
        for name in [*self.names, "coordinator"]:
            self._processes[name].terminate()
        for process in self._processes.values():
            process.wait(30)
        for reader in self._readers:
            reader.join()
        while not self._queue.empty():
            self.log.append(self._queue.get())

    def _open_broker(self) -> dict[str, tuple[str, str, str]]:
        """Return (url without login, user, password) of every role."""
        roles = [*self.names, "coordinator"]
        given = self.arguments.broker
        if given:
            parts = urlsplit(given)
            if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname:
                raise ConfigError(
                    f"--broker {given!r} is not mqtt://host:port or mqtts://host:port"
                )
            url = f"{parts.scheme}://{parts.hostname}:{parts.port or 1883}"
            user, password = unquote(parts.username or ""), unquote(parts.password or "")
            return dict.fromkeys(roles, (url, user, password))
        passwords = {role: secrets.token_urlsafe(16) for role in roles}
        self._broker = start_broker(self.work / "broker", users=passwords)
        self.broker_kind = self._broker.kind
        return {role: (self._broker.url, role, passwords[role]) for role in roles}

    def _prepare_device(self, name: str, rows: list[dict[str, str]], login: Any) -> None:
        folder = self.work / name
        folder.mkdir(mode=0o700)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "examples.jsonl").write_text(lines, encoding="utf-8")
        (folder / "edge.toml").write_text(
            link_section(folder, login)
            + f"""
[device]
state_dir = "state"
families = ["{FAMILY}"]

[train]
memory_mb = {self.arguments.memory_mb}
threads = 1

[runtime]
threads = 1

[data]
examples = "examples.jsonl"
held_out = 0.2
""",
            encoding="utf-8",
        )

    def _prepare_coordinator(self, login: Any) -> None:
        from examples.models import materialize  # loads torch

        folder = self.work / "coordinator"
        folder.mkdir(mode=0o700)
        url, user, password = login
        write_secret(folder / "password", password)
        named = 'password_file = "password"\n' if password else ""
        (folder / "coordinator.toml").write_text(
            f"""
[service]
tenant = "demo"
state_dir = "state"
broker = "{url}"
username = "{user or "coordinator"}"
{named}
threads = 2

[program]
name = "crosslm"
cohort = {len(self.names)}
rounds = {self.arguments.rounds}
seed = {self.arguments.seed}
samples = {self.arguments.samples}

[adapter]
steps = {self.arguments.steps}

[llm]
path = "{materialize("llm")}"

[[families]]
name = "{FAMILY}"
path = "{materialize(FAMILY)}"

[public]
path = "{DATA / "dolly_public.jsonl.xz"}"
most = {PUBLIC_PER_SAMPLE * self.arguments.samples}

[evaluation]
path = "{DATA / "dolly_test.jsonl.xz"}"

[task]
name = "requests"
prompt = "Request: {{text}}\\nKind:"
generation_prompt = "Kind: {{label}}\\nRequest:"
labels = {json.dumps(list(WORDS))}
words = {json.dumps([" " + word for word in WORDS.values()])}
""",
            encoding="utf-8",
        )

    def _code(self, name: str) -> str:
        """The one-time enrolment code of a device, made by the operator's command."""
        done = subprocess.run(
            [*SYMBIONT, "device", "token", "--device", name, "--json"],
            cwd=self.work / "coordinator",
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise FleetError(f"no enrolment code for {name}: {done.stderr.strip()}")
        return str(json.loads(done.stdout)["code"])

    def _spawn(self, who: str, *command: str) -> None:
        folder = self.work / who
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                [*SYMBIONT, *command],
                cwd=folder,
                env=os.environ | PROCESS_ENV,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._processes[who] = process
        reader = threading.Thread(target=self._read, args=(who, process), daemon=True)
        self._readers.append(reader)
        reader.start()

    def _read(self, who: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                try:
                    event = json.loads(line)
                except ValueError:
                    continue
                self._queue.put({"who": who, **event})
        code = process.wait()
        if code not in (0, -15):
            self._queue.put({"who": who, "event": "exit", "code": code})

    def _failure(self, who: str, code: int) -> str:
        log = self.work / who / "log.txt"
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1] if lines else "it said nothing"
        return f"{who} ended with code {code}: {last} (its log: {log})"


def link_section(folder: Path, login: tuple[str, str, str]) -> str:
    """The [link] part of a settings file; the password goes into a file of its own."""
    url, user, password = login
    write_secret(folder / "password", password)
    named = 'password_file = "password"\n' if password else ""
    return f'[link]\nbroker = "{url}"\nusername = "{user}"\n{named}'


def write_secret(path: Path, value: str) -> None:
    """Write `value` to a file that only its user can read."""
    path.touch(mode=0o600)
    path.write_text(value, encoding="utf-8")


def device_slices(n: int) -> list[list[dict[str, str]]]:
    """The requests of clients 0 to n-1 of the published split, one list a device."""
    slices: dict[int, list[dict[str, str]]] = defaultdict(list)
    with lzma.open(DATA / "dolly_devices.jsonl.xz", "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            slices[row["client"]].append({"text": row["text"], "label": row["label"]})
    return [slices[i] for i in range(n)]


def collect(
    log: list[Event],
    names: list[str],
    arguments: argparse.Namespace,
    *,
    broker: str,
    seconds: float,
) -> Results:
    """Everything the run's events say, as results."""
    devices = {name: DeviceResult(name, FAMILY) for name in names}
    stages: dict[str, float] = defaultdict(float)
    llm: list[tuple[str, float]] = []
    rounds: list[dict[str, float]] = []
    releases: list[dict[str, str]] = []
    up = down = 0
    updates: list[Event] = []
    for event in log:
        if event["who"] != "coordinator":
            continue
        kind = event["event"]
        if kind == "reply" and event["device"] in devices:
            take_reply(devices[event["device"]], event, stages)
            if event["kind"] == "AdapterUpdate":
                updates.append(event)
        elif kind == "llm":
            llm.append(("base", event["llm_accuracy"]))
        elif kind == "stage_end" and event["stage"] not in ("crosslm", "enrolment"):
            if not event["stage"].startswith("offer"):
                stages[f"coordinator: {event['stage']}"] += event["seconds"]
        elif kind == "note" and "round" in event:
            rounds.append(round_row(event, updates))
            updates = []
            if "llm_accuracy" in event:
                llm.append((f"round {event['round'] + 1}", event["llm_accuracy"]))
        elif kind == "published":
            releases.append({"family": event["family"], "release": event["release"]})
        elif kind == "bytes":
            up, down = sum(event["up"].values()), sum(event["down"].values())
    facts = {
        "command": f"symbiont demo --devices {len(names)} --rounds {arguments.rounds} "
        f"--seed {arguments.seed} --steps {arguments.steps}",
        "seconds in all": f"{seconds:.0f}",
        "broker": broker,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "onnxruntime", "onnxruntime-genai")},
        "data": "Dolly-15k (Databricks, CC BY-SA 3.0), clients 0 to 3 of a published non-IID split",
    }
    return Results(
        title=f"Symbiont: {len(names)} devices and one large model, {arguments.rounds} rounds",
        facts=facts,
        devices=list(devices.values()),
        llm=llm,
        rounds=rounds,
        stages=dict(stages),
        releases=releases,
        wire_up=up,
        wire_down=down,
    )


def take_reply(device: DeviceResult, event: Event, stages: dict[str, float]) -> None:
    """Add what one reply of `device` says."""
    for name, seconds in event.get("seconds", {}).items():
        stages[f"devices: {name}"] += seconds
    device.peak_mb = max(device.peak_mb, event.get("peak_mb", 0.0))
    if event["kind"] == "ModelReport":
        device.accuracy.append((event["release"], event["accuracy"]))
        device.heldout, device.tokens_per_s = event["examples"], event["tokens_per_s"]
    elif event["kind"] == "AdapterUpdate":
        device.examples = event["examples"]
        device.raw_bytes += event["raw_bytes"]
        device.sent_bytes += event["sent_bytes"]
        device.cosine.append(event["cosine"])


def round_row(note: Event, updates: list[Event]) -> dict[str, float]:
    """One line of the report's table of rounds."""
    raw, sent = (sum(u[key] for u in updates) for key in ("raw_bytes", "sent_bytes"))
    return {
        "round": note["round"] + 1,
        "bytes raw": raw,
        "bytes sent": sent,
        "bytes down": note.get("bytes_down", 0),
        "fidelity": mean([u["cosine"] for u in updates]),
        "mean score": note.get("score", 0.0),
        "kept": note.get("kept", 0),
        "synthetic": note.get("pool", 0),
        "devices": note.get("accuracy") or 0.0,
        "LLM": note.get("llm_accuracy", 0.0),
    }
