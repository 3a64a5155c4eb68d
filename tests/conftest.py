"""What watches over every session: no key in any log (P7), and no pickle is read (B12).

Knows when a session starts and ends. Does not know any test.
"""

import json
import os
from pathlib import Path

import pytest

from tests.key_scan import SCAN
from tests.no_pickle import ALARM

REPORT = "SYMBIONT_KEY_SCAN"
"""Environment variable: a file to write what was scanned to, as JSON, for the torture suite."""


def pytest_configure(config: pytest.Config) -> None:
    """Watch from before the first import of a test."""
    SCAN.listen()
    ALARM.on = True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """What a failed test printed is shown to people, so it is a log too."""
    if report.failed:
        SCAN.lines += [report.longreprtext, report.capstdout, report.capstderr]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Search, and fail the session if anything is found."""
    factory = getattr(session.config, "_tmp_path_factory", None)
    folder = Path(factory.getbasetemp()) if factory is not None else None
    hits = SCAN.hits(folder)
    if path := os.environ.get(REPORT):
        summary = {
            "hits": hits,
            "secrets": len(SCAN.secrets),
            "log lines": len(SCAN.lines),
            "scanned bytes": SCAN.scanned_bytes,
            "pickles": ALARM.calls,
        }
        Path(path).write_text(json.dumps(summary), encoding="utf-8")
    problems = [f"P7: {hit}" for hit in hits] + [f"B12: {call}" for call in ALARM.calls]
    if problems:
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            for problem in problems:
                reporter.write_line(problem, red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
