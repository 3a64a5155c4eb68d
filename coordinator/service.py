"""The coordinator as one running service: opens everything, waits for devices, runs the program.

Knows the order of a life: keys, link, first bundle, cohort, program, report. Does not know any
algorithm (`assembly.py` builds it), how messages travel, or how a roll-out goes (`staging.py`).

A device that enrols after the cohort is fixed is offered the promoted release, and each that
follows; it takes part in the rounds from the next start of the service on.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Self, TextIO

from coordinator.algorithms.fedavg import mean_accuracy, measured
from coordinator.config import CoordinatorConfig, FamilySection
from coordinator.desk import Desk
from coordinator.events import Events
from coordinator.kinds import check_kinds, kind_of, model_folder, targets_of
from coordinator.programs import Ask, Commit, Note, Program, ProgramFactory, Publish, Release
from coordinator.replies import MOST_BYTES
from coordinator.rollout import Book
from coordinator.runner import Runner
from coordinator.staging import Stager
from coordinator.warden import Warden
from edge_sdk.errors import FleetError
from edge_sdk.link.base import Link
from edge_sdk.link.courier import Courier
from edge_sdk.link.dial import dial
from edge_sdk.link.mqtt import MqttLink
from exporters.bundle import read_manifest

logger = logging.getLogger(__name__)

BASE = "base"
"""Name of each family's first release, before any round."""
Crews = Mapping[str, tuple[str, ...]]
"""Family -> its devices."""
LOOK_AGAIN_S = 0.5
"""How often the service looks for new devices, decisions and changed byte counts."""
REFRESH_S = 3600.0
"""How often it looks whether signed metadata is half expired."""


class Service:
    """A coordinator that serves until `stop` or until its program is done."""

    def __init__(
        self,
        config: CoordinatorConfig,
        *,
        link: Link | None = None,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        """`link` replaces the broker of the settings; events are written to `stream`."""
        config.check_paths()
        check_kinds(config)
        self.config = config
        self.desk = Desk(config, now=now)
        self.registry = self.desk.registry()
        self.registry.prepare()
        self.events = Events(now, stream=stream, store=self.desk.store)
        self.runner = Runner(
            self.desk.store, self.desk.fleet, self.registry, self.events, task=config.task
        )
        self.courier = Courier(
            link or link_of(config),
            self.desk.mailbox,
            self.desk.ring,
            tenant=config.service.tenant,
            me="coordinator",
            lookup=self.desk.fleet.lookup,
            now=now,
            rng=rng or random.Random(),
            accept=self.runner.accept,
            admit=self.desk.fleet.admit,
            progress=self.runner.progress,
            refused=self.runner.refused,
            limits=MOST_BYTES,
        )
        self._now = now
        self._stop = threading.Event()
        self.warden = Warden(self.desk, self.courier, self.events)
        self.runner.certify_with(lambda device, csr: self.desk.authority.certify(device, csr))
        store, fleet = self.desk.store, self.desk.fleet
        self.book = Book(store, self.registry, now)
        self.stager = Stager(store, self.book, self.registry, fleet, self.runner, self.events, now)
        self._cohort: tuple[str, ...] | None = None  # None: not fixed yet
        self._busy = True  # a program runs or will run
        self._refreshed = now()
        self._bytes: tuple[Mapping[str, int], Mapping[str, int]] = ({}, {})

    @classmethod
    def from_config(cls, path: str | Path, **options: Any) -> Self:
        """Return the service that the settings file describes.

        Raises:
            ConfigError: a bad setting; nothing was started.
        """
        return cls(CoordinatorConfig.load(path), **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stop(self) -> None:
        """Ask `serve` to end; safe from a signal handler and from other threads."""
        self._stop.set()

    def close(self) -> None:
        """Close link and database; what is unfinished resumes at the next start."""
        self._stop.set()
        self.runner.close()
        self.courier.close()
        self.desk.close()

    # --- the life -----------------------------------------------------------------------------

    def serve(self, *, stay: bool = False) -> bool:
        """Run the whole life; return whether the program reached its end.

        `stay`: go on answering devices afterwards, until `stop`.

        Raises:
            FleetError: what ended the program, or a failed export of the first bundle.
        """
        self.start()
        bases = {family.name: self.publish_base(family) for family in self.config.families}
        if not self.desk.store.finished(self.config.program.name):
            crews = self.wait_for_devices()
            self._cohort = tuple(sorted(device for crew in crews.values() for device in crew))
            if not self._cohort or not self._learn(bases, crews):
                return False
        self._report()
        self._cohort, self._busy = (), False  # from now on every device is served alike
        while stay and not self._stop.wait(LOOK_AGAIN_S):
            self._tick()
        return True

    def _learn(self, bases: Mapping[str, Release], crews: Crews) -> bool:
        """Offer each family its base and run the program over all; return whether it ended."""
        for base in bases.values():
            self.registry.allow(base.family, base.release)
        offers = {device: bases[name] for name, crew in crews.items() for device in crew}
        if not self._run(self._offering(offers), f"offer-{_crowd(sorted(offers))}"):
            return False
        with self.events.stage("load"):
            from coordinator.assembly import program_of  # torch is loaded only now

            about = self.desk.fleet.abilities.about
            factory = program_of(self.config, self.desk.folder, BASE, crews, self.events, about)
        return self._run(factory, self.config.program.name)

    def start(self) -> None:
        """Connect, announce the keys and take mail from now on."""
        self.courier.start()
        self.runner.start_mail(self.courier)
        self.warden.announce()
        if self.config.llm.verify:
            self._verify_drafts()
        self.events("started", tenant=self.config.service.tenant)

    def _verify_drafts(self) -> None:
        with self.events.stage("load", verifier=Path(self.config.llm.path).name):
            import numpy as np

            from coordinator.torch_target import TorchTarget  # torch is loaded only if asked for
            from coordinator.verifier import Verifier

            target = TorchTarget(Path(self.config.llm.path))
        Verifier(target, rng=np.random.default_rng()).serve(self.courier.calls)

    def publish_base(self, family: FamilySection) -> Release:
        """Return the family's first release, exported and signed now if there is none yet.

        Raises:
            ExportError: the model cannot be exported, or does not agree with torch.
            ConfigError: it has none of the layers that are to be adapted.
        """
        found = self.registry.release(family.name, BASE)
        if found is not None:
            return found
        folder = bundle_folder(self.desk.folder, family.name, BASE)
        with self.events.stage("export", family=family.name, release=BASE):
            if not folder.exists():
                self._export_base(family, folder)
            targets_of(self.config, family, read_manifest(folder))
            release = self.registry.publish(Publish(family.name, BASE, folder))
        self.events("published", family=family.name, release=BASE)
        return release

    def _export_base(self, family: FamilySection, folder: Path) -> None:
        task, seed = self.config.task, self.config.program.seed
        model = model_folder(self.desk.folder, family, task, seed=seed)
        kind_of(model).export(model, folder, section=family, release=BASE, task=task, lineage={})

    def wait_for_devices(self) -> Crews:
        """Return each family's devices once enough are enrolled, and one of each family at least;
        empty if stopped before."""
        wanted = self.config.program.cohort
        with self.events.stage("enrolment", wanted=wanted):
            while not self._stop.is_set():
                crews = self._crews()
                if sum(map(len, crews.values())) >= wanted and all(crews.values()):
                    return crews
                self._tick()
                self._stop.wait(LOOK_AGAIN_S)
        return {}

    def _crews(self) -> Crews:
        """Every active device, under the first family of the settings that it takes."""
        crews: dict[str, tuple[str, ...]] = {}
        taken: set[str] = set()
        for family in self.config.families:
            able = self.desk.fleet.active(family.name)
            crews[family.name] = tuple(device for device in able if device not in taken)
            taken.update(able)
        return crews

    def _run(self, factory: ProgramFactory, run: str) -> bool:
        with self.events.stage(run):
            thread = self.runner.start(factory, run=run)
            while thread.is_alive() and not self._stop.is_set():
                self._tick()
                thread.join(LOOK_AGAIN_S)
        if self.runner.failure is not None:
            raise self.runner.failure
        return self.desk.store.finished(run)

    def _offering(self, offers: Mapping[str, Release]) -> ProgramFactory:
        def program(resume: Commit | None) -> Program:
            return offering(offers, self.config.program.within_s)

        return program

    def _tick(self) -> None:
        self.warden.tick()
        self._tend_releases()
        counted = (self.courier.bytes_up, self.courier.bytes_down)
        if counted != self._bytes:
            self._bytes = counted
            self.events("bytes", up=counted[0], down=counted[1])

    def _tend_releases(self) -> None:
        try:
            self.stager.tick(busy=self._busy)
            if self._cohort is not None:
                crews = self._crews()
                for name, crew in crews.items():
                    others = {d for other in crews.values() for d in other} - set(crew)
                    self.stager.serve_newcomers(name, others.union(self._cohort))
            if self._now() - self._refreshed > REFRESH_S:
                self._refreshed = self._now()
                self.registry.refresh()
        except FleetError as exc:  # a full disk or an absent key; the program goes on
            logger.warning("releases are looked after again later: %s", exc)

    def _report(self) -> None:
        self._tick()
        promoted = {f.name: self.registry.promoted(f.name) for f in self.config.families}
        releases = {name: found.release if found else None for name, found in promoted.items()}
        first = self.config.families[0].name
        self.events(
            "done",
            family=first,
            release=releases[first],
            releases=releases,
            devices=[d.device for d in self.desk.fleet.list()],
            bytes_by_device={
                d.device: dict(zip(("up", "down"), self.courier.bytes_of(d.device), strict=True))
                for d in self.desk.fleet.list()
            },
        )


def offering(offers: Mapping[str, Release], within_s: float) -> Generator[Any, Any, None]:
    """The program before the program: every device gets its release and measures it."""
    cohort = tuple(sorted(offers))
    offer = Ask(lambda device: offers[device].offer(), cohort, len(cohort), within_s)
    reports = yield from measured(offer)
    yield Note({"baseline": True, "accuracy": mean_accuracy(reports), "devices": len(reports)})
    yield Commit(0, {})


def bundle_folder(folder: Path, family: str, release: str) -> Path:
    """Return where a release is exported to before it is signed."""
    return folder / "bundles" / family / release


def link_of(config: CoordinatorConfig) -> MqttLink:
    """Return the link to the broker of the settings.

    Raises:
        ConfigError: the password file cannot be read, or the url is wrong.
    """
    service = config.service
    return dial(
        service.broker,
        user=service.username,
        password_file=service.password_file,
        ca_file=service.ca_file,
        cert_file=service.cert_file,
        key_file=service.key_file,
        mqtt_version=service.mqtt_version,
    )


def _crowd(cohort: Sequence[str]) -> str:
    # Another cohort is offered the bundle anew, under another run.
    return sha256("\n".join(cohort).encode()).hexdigest()[:12]
