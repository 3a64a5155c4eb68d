"""Child processes that are waited for by what they say, and killed.

Knows pipes, lines and signals. Does not know what any line means.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from edge_sdk.errors import FleetError

ROOT = Path(__file__).resolve().parents[2]


class Slow(FleetError):  # noqa: N818 - what it was, not a fault of its own
    """A child did not say in time what was waited for."""


class Child:
    """A process of `python -m MODULE ARGUMENTS`; its lines are kept with the time they came at."""

    def __init__(self, module: str, arguments: Sequence[object], log: Path) -> None:
        self.started = time.monotonic()
        self._log = log
        with open(log, "ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
        self.pid = self._process.pid
        self._lines: list[tuple[float, str]] = []
        self._heard = threading.Condition()
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def wait_for(self, start: str, timeout_s: float, *, after: float = 0.0) -> float:
        """Return when (monotonic clock) the first line that begins with `start` came.

        Only lines later than `after` count.

        Raises:
            Slow: there was none in time, or the process ended; the message holds its last words.
        """
        deadline = time.monotonic() + timeout_s
        seen = 0
        with self._heard:
            while True:
                for at, line in self._lines[seen:]:
                    if line.startswith(start) and at > after:
                        return at
                seen = len(self._lines)
                left_s = deadline - time.monotonic()
                ended = not self._reader.is_alive()
                if ended or not self._heard.wait_for(lambda: len(self._lines) > seen, left_s):  # noqa: B023
                    if len(self._lines) > seen:
                        continue
                    what = "it ended" if ended else f"{timeout_s:.0f} s passed"
                    raise Slow(f"no {start!r}: {what}; {self.last_words()}")

    def said(self, start: str) -> bool:
        """Whether a line that begins with `start` came."""
        with self._heard:
            return any(line.startswith(start) for _, line in self._lines)

    def tell(self, line: str) -> None:
        """Write one line to the child's standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def kill(self) -> float:
        """SIGKILL it, wait until it is gone, and return when it was killed."""
        at = time.monotonic()
        os.kill(self.pid, signal.SIGKILL)
        self._reap()
        return at

    def end(self, timeout_s: float) -> None:
        """Close its standard input and wait until it has ended by itself.

        Raises:
            Slow: it did not, or not well.
        """
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired as exc:
            self.kill()
            raise Slow(f"it did not end within {timeout_s:.0f} s; {self.last_words()}") from exc
        self._reap()
        if status:
            raise Slow(f"it ended with status {status}; {self.last_words()}")

    def last_words(self) -> str:
        """Return the end of what it wrote to standard error."""
        text = self._log.read_text("utf-8", errors="replace").strip()
        return f"last words: {text.splitlines()[-1] if text else 'none'}"

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._heard:
                self._lines.append((time.monotonic(), line.rstrip("\n")))
                self._heard.notify_all()
        with self._heard:
            self._heard.notify_all()

    def _reap(self) -> None:
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
