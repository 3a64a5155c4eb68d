"""Carries roll-outs out: measures the trial devices, offers the release, judges, goes on or back.

Knows the book of roll-outs, the registry and which devices are here. Does not know commands or
algorithms; `tick` is called by the service and does what stands in the book, so that a kill at any
point loses nothing.

One device gets one offer at a time; a release that builds on another is preceded by that one. A
device that enrolled after the program's cohort was fixed is kept at the promoted release.
"""

import logging
from collections.abc import Callable, Iterable

from coordinator.events import Events
from coordinator.fleet import Fleet
from coordinator.programs import Commit, Release
from coordinator.registry import Registry
from coordinator.rollout import OPEN, SERVICE, Book, Offered, Rollout, State
from coordinator.runner import Runner
from coordinator.store import Store
from edge_sdk.wire.messages import ModelReport

logger = logging.getLogger(__name__)

RUN = "rollout"
"""Prefix of the runs under which offers stand in the coordinator's tables."""
TRIES = 5
"""Offers of one release to one device, when metadata expired before the device came back."""
WELCOME = 0
"""Number of the roll-out without end that serves devices outside the program's cohort."""


class Stager:
    """The running service's hand on roll-outs. Used by one thread."""

    def __init__(
        self,
        store: Store,
        book: Book,
        registry: Registry,
        fleet: Fleet,
        runner: Runner,
        events: Events,
        now: Callable[[], float],
    ) -> None:
        self._store, self._book, self._registry, self._fleet = store, book, registry, fleet
        self._runner, self._events, self._now = runner, events, now
        self._told: dict[int, str] = {}
        self._found: dict[tuple[str, str], Release] = {}  # of this tick: metadata is renewed
        self._strays: dict[str, float] = {}
        self._seen = 0  # newest letter of a stray

    def tick(self, *, busy: bool = False) -> None:
        """Take answers, then do what can be done now.

        `busy`: a program is at work on these devices, so no new trial begins; what has begun
        goes on, and roll-backs are carried out at once.
        """
        self._found.clear()
        for letter, device, at in self._book.strays(after=self._seen):
            self._seen, self._strays[device] = letter, at
        self._take_answers()
        for rollout in self._book.active():
            self._registry.direct(rollout.family)
            match rollout.state:
                case State.STAGED if not busy:
                    self._begin(rollout)
                case State.MEASURING:
                    self._measure(rollout)
                case State.CANARY:
                    self._try(rollout)
                case State.PROMOTED:
                    self._spread(rollout, "promote", rollout.release, self._of(rollout.family))
                case State.ROLLED_BACK:
                    self._return(rollout)
            self._tell(rollout)

    def serve_newcomers(self, family: str, cohort: Iterable[str]) -> None:
        """Keep the devices of `family` outside `cohort` at the promoted release.

        A device that went back to an earlier release by itself is offered the promoted one again,
        also within the cohort.
        """
        promoted = self._registry.promoted_name(family)
        trial = self._book.trial(family)
        trying = set(trial.canary) if trial is not None else set()
        if any(r.family == family and r.state not in OPEN for r in self._book.active()):
            return  # every device is being told of an outcome already
        settled = set(cohort) - self._strays.keys()
        for device in sorted(set(self._of(family)) - settled - trying):
            newest = self._newest(device)
            if device in cohort and newest is not None:
                continue  # it has been brought back; the program goes on with it
            if promoted is not None and (newest is None or newest.release != promoted):
                self._bring(WELCOME, "welcome", device, family, promoted)

    # --- the steps ----------------------------------------------------------------------------

    def _begin(self, rollout: Rollout) -> None:
        chosen = self._book.choose(rollout, self._of(rollout.family))
        if chosen:
            self._events(
                "rollout_trial",
                family=rollout.family,
                release=rollout.release,
                devices=list(chosen),
            )

    def _measure(self, rollout: Rollout) -> None:
        assert rollout.before is not None
        answered = self._ask_all(rollout, "before", rollout.before, rollout.canary)
        if answered or self._late(rollout):
            self._book.try_out(rollout)

    def _try(self, rollout: Rollout) -> None:
        if rollout.before is None:
            self._registry.assign(rollout.family, rollout.release, rollout.canary)
            self._registry.direct(rollout.family)
        answered = self._ask_all(rollout, "trial", rollout.release, rollout.canary)
        fault = verdict(rollout, self._book.offered(rollout.number), complete=answered)
        if fault:
            logger.warning("%s/%s: %s", rollout.family, rollout.release, fault)
            self._book.roll_back(rollout.family, who=SERVICE, why=fault)
        elif answered and rollout.plan.promote and self._done(rollout):
            self._book.promote(rollout.family, who=SERVICE, why="every trial device did well")
        elif not answered and self._late(rollout):
            why = f"{self._done(rollout)} of {len(rollout.canary)} trial devices answered in time"
            self._book.pause(rollout.family, who=SERVICE, why=why)

    def _return(self, rollout: Rollout) -> None:
        touched = {
            offer.device
            for offer in self._book.offered(rollout.number)
            if offer.purpose in ("trial", "promote")
        }
        if not touched:  # rolled back without a trial: everyone may have it
            touched = set(self._of(rollout.family))
        if rollout.before is None:
            self._book.settle(rollout.number)
            return
        self._spread(rollout, "return", rollout.before, touched)

    def _spread(self, rollout: Rollout, purpose: str, release: str, devices: Iterable[str]) -> None:
        had = {
            offer.device
            for offer in self._book.offered(rollout.number, "trial")
            if purpose == "promote" and offer.release == release and offer.state == "done"
        }
        if self._ask_all(rollout, purpose, release, sorted(set(devices) - had)):
            self._book.settle(rollout.number)

    def _ask_all(
        self, rollout: Rollout, purpose: str, release: str, devices: Iterable[str]
    ) -> bool:
        """Bring `release` to all devices; True once each of them that is active has answered."""
        states = [
            self._bring(rollout.number, purpose, device, rollout.family, release)
            for device in devices
            if self._fleet.is_active(device)
        ]
        return all(state != "open" for state in states)

    def _bring(self, number: int, purpose: str, device: str, family: str, release: str) -> str:
        """Offer `release` to `device`, what it builds on before; return how that stands."""
        base = self._registry.base_of(family, release)
        if base is not None and not self._holds(device, family, base):
            state = self._offer(number, purpose, device, family, base)
            if state != "done":
                return state
        return self._offer(number, purpose, device, family, release)

    def _holds(self, device: str, family: str, base: str) -> bool:
        newest = self._newest(device)
        if newest is None:
            return False
        return base in (newest.release, self._registry.base_of(family, newest.release))

    def _offer(self, number: int, purpose: str, device: str, family: str, release: str) -> str:
        known = self._book.find(number, purpose, device, release)
        if known is not None and not self._again(known):
            return known.state
        found = self._found.get((family, release)) or self._registry.release(family, release)
        if found is None:
            return "failed"
        self._found[family, release] = found
        with self._store.transaction():
            # A run per device: a commit closes what else stands refused in its run.
            run = f"{RUN}-{number}-{purpose}-{device}"
            row = self._runner.post(device, found.offer(), run=run)
            self._book.note_offer(number, purpose, device, release, row.task)
        return "open"

    def _again(self, known: Offered) -> bool:
        """Whether an offer made before is to be made anew."""
        device = self._fleet.get(known.device)
        if device is not None and known.at < device.enrolled:
            return True  # its place was taken by a device that holds nothing
        if known.state == "failed":
            return "expired" in known.reason and known.tries < TRIES
        newest = self._newest(known.device)
        moved_on = newest is None or newest.release != known.release
        return known.number == WELCOME and known.state == "done" and moved_on

    def _newest(self, device: str) -> Offered | None:
        """What `device` said last, since it enrolled and since it went astray."""
        newest, known = self._book.newest(device), self._fleet.get(device)
        if newest is None or known is None:
            return None
        since = max(known.enrolled, self._strays.get(device, 0.0))
        return newest if newest.at >= since else None

    # --- answers ------------------------------------------------------------------------------

    def _take_answers(self) -> None:
        """Note what devices said; each letter is consumed in the transaction that notes it."""
        inbox = self._runner.inbox
        with inbox.changed:
            come = [w for w in inbox.waiting.values() if w.row.run.startswith(f"{RUN}-")]
            for waiting in come:
                row, message = waiting.row, waiting.message
                with self._store.transaction():
                    if isinstance(message, ModelReport):
                        found = {
                            "accuracy": message.accuracy,
                            "examples": message.examples,
                            "tokens_per_s": message.tokens_per_s,
                        }
                        self._book.note_answer(row.task, figures=found)
                    used = [(waiting.letter, row.ask)]
                    self._store.commit(row.run, Commit(row.ask, {}), used)
                del inbox.waiting[waiting.letter]
        for ask, task, reason in self._refusals():
            with self._store.transaction():
                self._book.note_answer(task, reason=reason or "refused by the device")
                self._store.set_ask_state(ask, "closed")

    def _refusals(self) -> list[tuple[int, str, str]]:
        """(ask, task, newest reason) of offers that devices refused."""
        with self._store.transaction() as db:
            return [
                (ask, task, reason or "")
                for ask, task, reason in db.execute(
                    "SELECT ask, task, (SELECT reason FROM refused f WHERE f.device = a.device"
                    " AND f.kind = a.kind ORDER BY at DESC, letter DESC LIMIT 1)"
                    " FROM asks a WHERE run > ? AND run < ? AND state = 'refused'",
                    (f"{RUN}-", f"{RUN}."),  # the prefix as a range, which an index serves
                )
            ]

    # --- small things -------------------------------------------------------------------------

    def _of(self, family: str) -> tuple[str, ...]:
        return self._fleet.active(family)

    def _late(self, rollout: Rollout) -> bool:
        return self._now() - rollout.since > rollout.plan.within_s

    def _done(self, rollout: Rollout) -> int:
        offers = self._book.offered(rollout.number, "trial")
        return sum(o.state == "done" and o.release == rollout.release for o in offers)

    def _tell(self, rollout: Rollout) -> None:
        if self._told.get(rollout.number) != rollout.state:
            self._told[rollout.number] = rollout.state
            self._events(
                "rollout",
                family=rollout.family,
                release=rollout.release,
                state=str(rollout.state),
                before=rollout.before,
                why=rollout.why,
            )


def figures(rollout: Rollout, offers: Iterable[Offered]) -> dict[str, float | int | None]:
    """Return the trial's figures over devices that answered before and with the release.

    Accuracies are means weighted by the number of held-out examples; speeds are plain means.
    """
    said = [offer for offer in offers if offer.device in rollout.canary]
    before = {o.device: o for o in said if o.purpose == "before" and o.release == rollout.before}
    after = {o.device: o for o in said if o.purpose == "trial" and o.release == rollout.release}
    pairs = [
        (before[d], after[d])
        for d in sorted(before.keys() & after.keys())
        if before[d].state == after[d].state == "done"
    ]
    weight = sum(b.examples or 0 for b, _ in pairs)

    def mean(offers: list[Offered]) -> float | None:
        total = sum((o.accuracy or 0.0) * (o.examples or 0) for o in offers)
        return total / weight if weight else None

    def speed(offers: list[Offered]) -> float | None:
        return sum(o.tokens_per_s or 0.0 for o in offers) / len(offers) if offers else None

    return {
        "devices": len(rollout.canary),
        "answered": sum(o.state != "open" for o in after.values()),
        "failed": sum(o.state == "failed" for o in said if o.purpose == "trial"),
        "examples": weight,
        "accuracy_before": mean([b for b, _ in pairs]),
        "accuracy": mean([a for _, a in pairs]),
        "speed_before": speed([b for b, _ in pairs]),
        "speed": speed([a for _, a in pairs]),
    }


def verdict(rollout: Rollout, offers: Iterable[Offered], *, complete: bool) -> str:
    """Say why the release must be taken back by the rules of its plan; "" if it need not.

    Failures count as they come, figures once the trial is `complete`.
    """
    offers, plan = list(offers), rollout.plan
    found = figures(rollout, offers)
    failed = found["failed"] or 0
    if failed > plan.max_failures:
        reason = next((o.reason for o in offers if o.purpose == "trial" and o.reason), "")
        return f"it failed on {failed} of {len(rollout.canary)} trial devices: {reason[:200]}"
    if not complete:
        return ""
    was, now = found["accuracy_before"], found["accuracy"]
    if was is not None and now is not None and was - now > plan.max_drop + 1e-12:
        return (
            f"accuracy fell from {was:.3f} to {now:.3f} on {found['examples']} examples of the "
            f"trial devices; allowed: {plan.max_drop:g}"
        )
    was, now = found["speed_before"], found["speed"]
    if was and now is not None and now < was * plan.min_speed:
        return f"speed fell from {was:.1f} to {now:.1f} tokens per second"
    return ""
