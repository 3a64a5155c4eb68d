"""F8: devices whose clocks are ten years off, or jump, do everything and believe nothing old.

Knows the tenant without models and a whole device in a process of its own, whose wall clock is bent
below Python: a small library answers clock_gettime in its place. Where there is no C compiler, only
Python's time.time is bent, and the notes say so.

Each device enrols, changes its receive keys, verifies an offered release (in the full form it also
fetches, tries, runs and trains it). Each is then given what has expired by the true time: an
enrolment code, a key bundle with a higher version, a message, TUF metadata. None may be accepted.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from edge_sdk.link.broker import Broker, start_broker
from edge_sdk.link.passwords import COORDINATOR
from edge_sdk.wire.enrolment import sign_bundle
from edge_sdk.wire.messages import (
    AdapterUpdate,
    File,
    ModelReport,
    OfferModel,
    Refused,
    Score,
    WantFiles,
)
from edge_sdk.wire.seal import Identity
from exporters.publisher import Publisher
from tests.coordinator_world import release_folder
from tests.torture.keys_world import Tenant, mqtt, until
from tests.torture.result import Result, Scale, say

YEARS = 10 * 365 * 86_400
CLOCKS = {"ahead": f"{YEARS}", "behind": f"-{YEARS}", "stepping": "step"}
_WAIT_S = 90.0

_SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>
static long bend(void) {
    static unsigned calls;
    const char *how = getenv("F8_CLOCK");
    if (!how) return 0;
    if (strcmp(how, "step")) return atol(how);
    calls = calls * 1103515245u + 12345u; /* another decade at every look */
    return ((long)(calls >> 16) % 3 - 1) * 315360000L;
}
int clock_gettime(clockid_t id, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(id, at);
    if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) at->tv_sec += bend();
    return failed;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
int gettimeofday(struct timeval *at, void *zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""
_BENT = """
import os, random, sys, time
real, how, draw = time.time, os.environ["F8_CLOCK"], random.Random(1)
time.time = lambda: real() + (draw.choice((-1, 0, 1)) * 315360000 if how == "step" else int(how))
from tests.torture.skewed_device import main
sys.exit(main())
"""


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Give each clock a life; see the module's text."""
    full = scale is Scale.FULL
    shim = _build_shim(folder)
    clocks = CLOCKS if full else {name: CLOCKS[name] for name in ("ahead", "behind")}
    names = [f"{clock}-{what}" for clock in clocks for what in ("device", "late")]
    users = {name: f"{name}-{seed}" for name in [COORDINATOR, *names]}
    good, stale = _publish(folder, full)
    found: dict[str, dict[str, bool]] = {}
    with start_broker(folder / "broker", users=users) as broker:
        tenant = Tenant(folder / "cloud", mqtt(broker, COORDINATOR), tuf_root=good.root())
        tenant.start()
        lives = []
        for clock in clocks:
            name, late = f"{clock}-device", f"{clock}-late"
            expired = tenant.code(late, lasts_s=1e-3).to_text()
            life = _Life(folder, broker, name, users[name], CLOCKS[clock], shim)
            life.start(tenant.code(name).to_text())
            lives.append(
                (
                    clock,
                    life,
                    _Life(folder, broker, late, users[late], CLOCKS[clock], shim),
                    expired,
                )
            )
        until(lambda: all(life.told("enrolled") for _, life, _, _ in lives), "enrolment", _WAIT_S)
        say("F8", f"{len(lives)} devices enrolled")
        for clock, life, late, expired in lives:
            found[clock] = _live(tenant, life, good, stale, full)
            late.start(expired)
            until(lambda late=late: late.told("not_enrolled") or late.told("enrolled"), "refusal")
            found[clock]["expired code refused"] = bool(late.told("not_enrolled"))
            found[clock]["clock was bent"] = (
                life.year() != time.gmtime().tm_year or clock == "stepping"
            )
            say("F8", f"{clock}: {found[clock]}")
        _announce_expired(tenant)
        for clock, life, _, _ in lives:
            found[clock]["expired bundle refused"] = _still_seals_right(tenant, life.name)
        for _, life, late, _ in lives:
            life.close()
            late.close()
        tenant.close()
    passed = all(all(checks.values()) for checks in found.values())
    return Result(
        code="F8",
        title="wrong clocks",
        value={clock: sum(checks.values()) for clock, checks in found.items()},
        unit="checks passed",
        goal="enrol, round and update correct, 0 expired accepted",
        passed=passed,
        lost=0 if passed else None,
        notes={"bent_below_python": shim is not None, "checks": found},
    )


def _live(
    tenant: Tenant, life: "_Life", good: Publisher, stale: Publisher, full: bool
) -> dict[str, bool]:
    """One device's checks that need its coordinator's messages."""
    name, checks = life.name, {"enrolled": True}
    until(lambda: (name, "renew") in _heads(tenant) and life.told("renewed"), "new keys", _WAIT_S)
    checks["keys renewed"] = True

    family, release = ("tiny", "r1") if full else ("slm", "base")
    tenant.send(name, _offer(good, family, release, "good"), "good")
    until(lambda: _answers(tenant, name, "good"), "an answer to the offer", _WAIT_S)
    checks["update believed"] = isinstance(_answers(tenant, name, "good")[0], WantFiles)
    if full:
        checks |= _update_and_train(tenant, name, good)

    tenant.send(name, _offer(stale, family, release, "stale"), "stale")
    until(lambda: _answers(tenant, name, "stale"), "an answer to the stale offer", _WAIT_S)
    answer = _answers(tenant, name, "stale")[0]
    checks["expired metadata refused"] = isinstance(answer, Refused) and "expired" in answer.reason

    sender = tenant.courier._sender
    lasting, sender.lifetime_s = sender.lifetime_s, -10.0
    stream = tenant.send(name, Score("old", "base", ("a",), ("open",)), "old")
    until(
        lambda: (
            tenant.courier.mailbox.posted(stream) is None
            or tenant.courier.mailbox.posted(stream).parked
        ),
        "the fate of an old message",
    )
    sender.lifetime_s = lasting
    fate = tenant.courier.mailbox.posted(stream)
    checks["expired message refused"] = fate is not None and "expired" in fate.parked
    return checks


def _update_and_train(tenant: Tenant, name: str, good: Publisher) -> dict[str, bool]:
    """Answer the wish for files, wait for the report, then let the device train a round."""
    from tests.edge_world import order

    wish = _answers(tenant, name, "good")[0]
    assert isinstance(wish, WantFiles)
    for number, path in enumerate(wish.paths):
        tenant.send(name, File("good", path, good.read(path)), f"good.{number}")
    until(lambda: len(_answers(tenant, name, "good")) > 1, "the model's report", _WAIT_S)
    report = _answers(tenant, name, "good")[1]
    tenant.send(name, order("r1", "train"), "train")
    until(lambda: _answers(tenant, name, "train"), "the update", _WAIT_S)
    trained = _answers(tenant, name, "train")[0]
    return {
        "update runs": isinstance(report, ModelReport),
        "round done": isinstance(trained, AdapterUpdate),
    }


def _announce_expired(tenant: Tenant) -> None:
    """Retain a bundle that is newer by its version, of another key, and ended a minute ago."""
    now_s = int(time.time())
    wrong = Identity(tenant.desk.identity.signing, Identity.generate().receiving)
    tenant.courier.announce_keys(
        sign_bundle(
            tenant.desk.root,
            wrong.public,
            tenant=tenant.name,
            version=now_s + 10**6,
            expires_s=now_s - 60,
        )
    )


def _still_seals_right(tenant: Tenant, name: str) -> bool:
    """Whether the device, asked once more, answers under the coordinator's real key."""
    tenant.send(name, Score("last", "base", ("a",), ("open",)), "last")
    until(lambda: _answers(tenant, name, "last"), "an answer after the expired bundle", _WAIT_S)
    return True


def _heads(tenant: Tenant) -> set[tuple[str, str]]:
    return {(sender, task.split("-")[0]) for sender, task in tenant.counted}


def _answers(tenant: Tenant, name: str, task: str) -> list[object]:
    return [m for who, m in tenant.replies if who == name and getattr(m, "task_id", "") == task]


def _offer(publisher: Publisher, family: str, release: str, task: str) -> OfferModel:
    targets = publisher.releases()[f"{family}/{release}"]
    return OfferModel(task, family, release, publisher.metadata(), targets)


def _publish(folder: Path, full: bool) -> tuple[Publisher, Publisher]:
    """A repository, and a copy of it as it was signed and left years ago."""
    years_ago = datetime.now(UTC) - timedelta(days=3 * 365)
    if full:
        from tests.edge_world import releases

        good = releases(folder)
    else:
        good = Publisher(folder / "good")
        good.init()
        good.publish("slm", "base", release_folder(folder / "base", "base"))
    shutil.copytree(good.folder, folder / "stale")
    stale = Publisher(folder / "stale", lambda: years_ago)
    for release in ("x1", "x2"):  # so that its versions are above the good ones
        stale.publish("slm", release, release_folder(folder / release, release))
    return good, stale


@dataclass
class _Life:
    """One device process."""

    folder: Path
    broker: Broker
    name: str
    password: str
    clock: str
    shim: Path | None
    events: list[dict[str, object]] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None

    def start(self, code: str) -> None:
        """Start it with `code`; its events are collected."""
        home = self.folder / self.name
        home.mkdir()
        (home / "code").write_text(code)
        (home / "password").write_text(self.password)
        given = [str(home / "state"), self.broker.url, self.name]
        given += [str(home / "password"), str(home / "code")]
        environment = {**os.environ, "F8_CLOCK": self.clock}
        if self.shim is not None:
            environment["LD_PRELOAD"] = str(self.shim)
            command = [sys.executable, "-m", "tests.torture.skewed_device", *given]
        else:
            command = [sys.executable, "-c", _BENT, *given]
        with (home / "log").open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))

    def told(self, event: str) -> list[dict[str, object]]:
        return [line for line in self.events if line["event"] == event]

    def year(self) -> object:
        return self.told("clock")[0]["year"]

    def close(self) -> None:
        if self.process is None:
            return
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def _build_shim(folder: Path) -> Path | None:
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    source, library = folder / "clock.c", folder / "clock.so"
    source.write_text(_SHIM)
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    built = subprocess.run(command, capture_output=True, check=False)
    return library if built.returncode == 0 else None
