"""The SLM families of one run: each with its devices, its twin, its updates and its releases.

Knows twins, exchanges, gates and the requests of one round. Does not know what an algorithm makes
of a round, nor how models are trained.

Families differ in architecture and tokenizer, so factors never cross from one to another; what
crosses are texts, labels and probabilities.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coordinator.aggregate import Aggregate
from coordinator.algorithms.rounds import learn, lineage, measured, merge, tried
from coordinator.exchange import AdapterExchange, LocalTraining
from coordinator.gate import Gate
from coordinator.programs import (
    Ask,
    Publish,
    Release,
    Reply,
    Request,
    TaskFor,
    Tell,
    Withdraw,
)
from coordinator.twin import Twin
from edge_sdk.errors import ConfigError
from edge_sdk.train.lora import Factors
from edge_sdk.wire.messages import AnyMessage
from edge_sdk.wire.offers import packed

F32 = npt.NDArray[np.float32]

Package = Callable[[str, Factors], Path]
"""Writes a release of that name and returns its folder."""


@dataclass(slots=True)
class Family:
    """One SLM family in a run.

    Attributes:
        cohort: its devices, whose bundle is release `base`.
        package: writes an adapter release; `package_model`, if given, a whole model.
        kept: the newest of its releases that was not taken back.
        made: the adapter release whose factors the exchange holds.
    """

    twin: Twin
    exchange: AdapterExchange
    cohort: tuple[str, ...]
    base: str
    package: Package
    package_model: Package | None = None
    gate: Gate = field(default_factory=Gate)
    kept: str = ""
    made: str = ""

    @property
    def name(self) -> str:
        """The family's name."""
        return self.exchange.family

    def begin(self) -> None:
        """Put the factors held so far into the twin, and measure them once."""
        self.kept = self.kept or self.base
        self.gate.start(self.exchange.factors)
        self.twin.restore(self.exchange.factors, self.exchange.replicas)

    def offers(self, release: Release) -> TaskFor:
        """The offer of `release` to each device; of `made` with what to make it from, if it can."""

        def offer(device: str) -> AnyMessage:
            source = self.exchange.source(device) if release.release == self.made else None
            said = release.offer(source=source)
            return self.exchange.sent(device, said if source is None else packed(said))

        return offer

    def state(self) -> dict[str, bytes]:
        """What a Commit keeps of it."""
        return {
            f"exchange/{self.name}": self.exchange.state(),
            f"gate/{self.name}": self.gate.to_bytes(),
            f"kept/{self.name}": self.kept.encode(),
        }

    def resume(self, state: Mapping[str, bytes]) -> None:
        """Take up what `state` returned, in a new process."""
        self.exchange.restore(state[f"exchange/{self.name}"])
        self._take_up(state)

    def undo(self, state: Mapping[str, bytes]) -> None:
        """Take up what `state` returned before the last round; late updates to it still count."""
        self.exchange.roll_back(state[f"exchange/{self.name}"])
        self._take_up(state)
        self.twin.restore(self.exchange.factors, self.exchange.replicas)

    def _take_up(self, state: Mapping[str, bytes]) -> None:
        self.gate.restore(state[f"gate/{self.name}"])
        self.kept = state[f"kept/{self.name}"].decode()


@dataclass(frozen=True, slots=True)
class Merged:
    """What a round's updates came to: per family the aggregate, and why nothing may be kept."""

    aggregates: Mapping[str, Aggregate]
    fault: str

    @property
    def discarded(self) -> float:
        """Energy beyond the rank, of the family that lost most."""
        return max((one.discarded for one in self.aggregates.values()), default=0.0)

    @property
    def outliers(self) -> list[str]:
        """Devices whose updates were left out."""
        return sorted(name for one in self.aggregates.values() for name in one.outliers)


class Families:
    """All families of a run, in order of name.

    Raises:
        ConfigError: none, two of one name, or a device in two of them.
    """

    def __init__(self, families: Sequence[Family]) -> None:
        self.all = tuple(sorted(families, key=lambda family: family.name))
        names = [family.name for family in self.all]
        self._of = {device: family for family in self.all for device in family.cohort}
        self.cohort = tuple(sorted(self._of))
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"a run needs families of different names, not {names}")
        if sum(len(family.cohort) for family in self.all) > len(self.cohort):
            raise ConfigError("a device is counted in two families; give it one")

    def begin(self, state: Mapping[str, bytes] | None) -> None:
        """Start, or go on from what `state` returned."""
        for family in self.all:
            if state is not None:
                family.resume(state)
            family.begin()

    def state(self) -> dict[str, bytes]:
        """What a Commit keeps of all."""
        return {key: value for family in self.all for key, value in family.state().items()}

    def undo(self, state: Mapping[str, bytes]) -> None:
        """Take back the last round of every family."""
        for family in self.all:
            family.undo(state)

    def of(self, device: str) -> Family:
        """The family of `device`."""
        return self._of[device]

    def training(self, step: int, how: LocalTraining, *, need: int, within_s: float) -> Ask:
        """Open round `step`: every device's task, and its family's look at what comes back.

        `need` updates complete the round; 0 means all.
        """
        tasks = {f.name: f.exchange.start(step, f.base, how) for f in self.all}
        checks = {f.name: f.exchange.check() for f in self.all}

        def task(device: str) -> AnyMessage:
            return tasks[self.of(device).name](device)

        def check(device: str, message: AnyMessage) -> None:
            checks[self.of(device).name](device, message)

        return Ask(task, self.cohort, need or len(self.cohort), within_s, check)

    def merge(
        self, replies: Sequence[Reply], *, learn_codec: bool
    ) -> Generator[Request, Any, Merged]:
        """Take updates in, family by family; a family that sent none stays as it is."""
        aggregates, faults = {}, []
        for family in self.all:
            own = tuple(reply for reply in replies if reply.device in family.cohort)
            if not own:
                continue
            aggregate, changes, fault = yield from merge(family.exchange, family.gate, own)
            if aggregate is not None:
                aggregates[family.name] = aggregate
            if fault:
                faults.append(fault)
            elif learn_codec and family.exchange.wants_codec:
                yield from learn(family.exchange, changes)
            family.twin.restore(family.exchange.factors, family.exchange.replicas)
        return Merged(aggregates, "; ".join(faults))

    @property
    def traffic(self) -> dict[str, int]:
        """Bytes of this round's updates, and of its training tasks, lessons and offers."""
        parts = [family.exchange.traffic for family in self.all]
        return {key: sum(part[key] for part in parts) for key in parts[0]}

    def jury(self, texts: Sequence[str]) -> F32:
        """What all replicas of all families think, (n, labels); each replica has one vote."""
        return self._mixed([family.twin.jury(texts) for family in self.all])

    def calibrate(self, texts: Sequence[str]) -> F32:
        """As `jury`, on texts on which every replica's leanings are learned first."""
        return self._mixed([family.twin.calibrate(texts) for family in self.all])

    def _mixed(self, verdicts: Sequence[F32]) -> F32:
        votes = np.array([max(1, len(f.twin.replicas)) for f in self.all], np.float32)
        mixed = np.tensordot(votes / votes.sum(), np.stack(verdicts), axes=1)
        return np.asarray(mixed, np.float32)

    def packaged(
        self,
        step: int,
        replies: Sequence[Reply],
        merged: Merged,
        *,
        program: str,
        whole: bool,
    ) -> list[Publish]:
        """Write each twin's global factors as a release; with `whole`, as a model of its own."""
        wishes = []
        for family in self.all:
            write = family.package_model if whole else None
            name = f"{family.base}-distilled" if write else f"{family.base}-{program}-{step + 1}"
            family.exchange.set_global(family.twin.factors)
            family.twin.set_global(family.exchange.factors)  # what devices will read of them
            folder = (write or family.package)(name, family.exchange.factors)
            family.made = "" if write else name
            own = tuple(reply for reply in replies if reply.device in family.cohort)
            made_from = lineage(step, own, merged.aggregates.get(family.name))
            base = None if write else family.base
            wishes.append(Publish(family.name, name, folder, base, made_from))
        return wishes

    def release(
        self, wishes: Sequence[Publish], within_s: float
    ) -> Generator[Request, Any, tuple[str, tuple[Reply, ...]]]:
        """Publish a round's releases and let each family's devices measure theirs.

        If one family's devices find theirs worse than before, all of the round are taken back.
        Returns why ("" if none were), and all reports.
        """
        reports: tuple[Reply, ...] = ()
        for i, (family, wish) in enumerate(zip(self.all, wishes, strict=True)):
            fault, own = yield from tried(
                wish,
                family.cohort,
                within_s,
                family.gate,
                instead=family.kept,
                offers=family.offers,
            )
            reports += own
            for reply in own if wish.release == family.made else ():
                family.exchange.released(reply.device)
            if fault:
                for other, former in zip(self.all[:i], wishes[:i], strict=True):
                    yield from _take_back(other, former, within_s, f"{family.name}: {fault}")
                return fault, reports
        for family, wish in zip(self.all, wishes, strict=True):
            family.kept = wish.release
        return "", reports

    def tell(self, message: AnyMessage) -> Tell:
        """`message` for every device."""
        return Tell(message, self.cohort)


def _take_back(
    family: Family, wish: Publish, within_s: float, reason: str
) -> Generator[Request, Any, None]:
    former = yield Withdraw(wish.family, wish.release, family.kept, reason)
    yield from measured(Ask(family.offers(former), family.cohort, len(family.cohort), within_s))
