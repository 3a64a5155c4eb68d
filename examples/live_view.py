"""The demo's live view: what every process of the fleet is doing now, from their event lines.

Knows events and how they look in a terminal. Does not know where they come from.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from examples.report import percent, size

STAGES = {
    "export": "exporting the small model to ONNX",
    "enrolment": "waiting for the devices to enrol",
    "load": "loading the large model",
    "llm_score": "testing the large model",
    "aggregate": "decoding and aggregating",
    "generate": "the large model writes",
    "score": "the twins judge what it wrote",
    "update": "the large model learns from their judgement",
    "distil": "distilling the small model",
    "package": "exporting and signing a release",
}
"""What a coordinator stage is called on the screen."""

ASKED = {
    "TrainAdapter": "devices train on their own text",
    "OfferModel": "devices fetch, verify, swap and measure",
    "Score": "devices judge what the large model wrote",
}
"""What the coordinator waits for, by the kind of message it asked with."""


@dataclass(slots=True)
class _Row:
    doing: str = "starting"
    done: float = 0.0
    release: str = "-"
    accuracy: float | None = None
    sent: int = 0


class LiveView:
    """A context manager; `show` takes one event. Plain lines where there is no terminal."""

    def __init__(self, console: Console, names: list[str], rounds: int, *, broker: str) -> None:
        self._console, self._rounds, self._broker = console, rounds, broker
        self._rows = {name: _Row() for name in names}
        self._stage, self._round = "starting", 0
        self._llm: float | None = None
        self._began = time.monotonic()
        self._live = Live(self._render(), console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> LiveView:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, event: dict[str, Any]) -> None:
        """Take in one event and redraw."""
        row = self._rows.get(event["who"])
        line = self._device(row, event) if row is not None else self._coordinator(event)
        if self._console.is_terminal:
            self._live.update(self._render())
        if line:
            seconds = time.monotonic() - self._began
            self._console.print(
                f"[dim]{seconds:6.1f} s[/dim]  {event['who']:12} {line}", highlight=False
            )

    def _device(self, row: _Row, event: dict[str, Any]) -> str:
        match event["event"]:
            case "enrolled":
                row.doing = "enrolled"
                return "enrolled with its one-time code"
            case "task":
                row.doing, row.done = event["kind"], 0.0
            case "training":
                row.doing, row.done = "training", event["done"] / event["total"]
            case "trained":
                row.doing, row.done = "update sent", 1.0
                row.sent += event["bytes"]
                return f"trained; its update left as {size(event['bytes'])}, sealed"
            case "model":
                row.doing, row.done = "measured", 1.0
                row.release, row.accuracy = event["release"], event["accuracy"]
                speed = event["tokens_per_s"]
                return (
                    f"runs {event['release']}: {percent(event['accuracy'])} on its own held-out "
                    f"text, {speed:,.0f} tokens/s"
                )
            case "refused" | "paused":
                row.doing = "refused a task"
                return f"[yellow]{event['event']}: {event['reason']}[/yellow]"
        return ""

    def _coordinator(self, event: dict[str, Any]) -> str:
        match event["event"]:
            case "stage_start" if event["stage"] in STAGES:
                self._stage = STAGES[event["stage"]]
            case "asked":
                self._stage = ASKED.get(event["kind"], event["kind"])
            case "published":
                return f"signed and published {event['family']}/{event['release']}"
            case "llm":
                return self._score(event["llm_accuracy"])
            case "note" if "round" in event:
                self._round = event["round"] + 1
                kept = f"kept {event['kept']} of its texts; " if "kept" in event else ""
                score = event.get("llm_accuracy")
                return f"round {self._round}: {kept}{self._score(score) if score else ''}"
        return ""

    def _score(self, value: float) -> str:
        self._llm = value
        return f"the large model is right on {percent(value)} of the test requests"

    def _render(self) -> RenderableType:
        seconds = time.monotonic() - self._began
        llm = f", large model {percent(self._llm)}" if self._llm is not None else ""
        head = Text.assemble(
            (f"{seconds:5.0f} s  ", "dim"),
            (f"round {self._round} of {self._rounds}", "bold"),
            f"  {self._stage}{llm}  ",
            (f"(broker: {self._broker})", "dim"),
        )
        table = Table(box=None, padding=(0, 2))
        for name in ("device", "doing", "", "model", "accuracy", "sent"):
            table.add_column(name)
        for name, row in self._rows.items():
            table.add_row(
                name,
                row.doing,
                ProgressBar(total=1.0, completed=row.done, width=20),
                row.release,
                "" if row.accuracy is None else percent(row.accuracy),
                size(row.sent) if row.sent else "",
            )
        return Group(head, table)
