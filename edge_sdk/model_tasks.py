"""Releases on the device: offered, fetched, verified, swapped in, measured.

Knows the model store and the open session. Does not know examples' use in training, links or the
mailbox; what must survive goes back in `Handled`.
"""

import logging
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edge_sdk.abilities import reads
from edge_sdk.collect import ExampleStore
from edge_sdk.config import EdgeConfig
from edge_sdk.errors import RuntimeFailure, TrustError
from edge_sdk.handled import ADAPTERS, FEEDBACK, OFFER, RELEASED, Event, Handled, Recall
from edge_sdk.measure import Stopwatch, peak_mb
from edge_sdk.models import Held, ModelStore
from edge_sdk.wire.messages import (
    AdapterSource,
    File,
    ModelReport,
    OfferModel,
    TextTask,
    WantFiles,
    decode,
    encode,
)
from edge_sdk.wire.offers import unpacked

if TYPE_CHECKING:
    from edge_sdk.encoders import EncoderSession
    from edge_sdk.runtime import SlmSession

logger = logging.getLogger(__name__)


class ModelDesk:
    """Carries out what concerns the model this device runs.

    Attributes:
        session: the open model, None before the first release.
    """

    def __init__(
        self,
        config: EdgeConfig,
        *,
        task: TextTask,
        examples: ExampleStore,
        models: ModelStore,
        recall: Recall,
        tell: Event,
    ) -> None:
        self._config, self._task = config, task
        self._examples, self._models, self._recall = examples, models, recall
        self._tell = tell
        self.session: SlmSession | EncoderSession | None = None

    def open_current(self) -> None:
        """Open the release that runs, or the one before it if that fails; nothing if none is held.

        Raises:
            RuntimeFailure: neither can be opened.
            TrustError: the files of both were altered, or their owner withdrew them.
        """
        held = self._models.ready()
        if held is None:
            return
        try:
            self._use(held)
        except RuntimeFailure:
            if self._models.previous is None:
                raise
            self._models.roll_back()
            earlier = self._models.ready()
            if earlier is None:
                raise
            self._use(earlier)
        if not self._models.proven:
            self.running().measure_speed()
            self._models.prove()

    def close(self) -> None:
        """Close the open model."""
        if self.session is not None:
            self.session.close()
            self.session = None

    def offer(self, offer: OfferModel, now: datetime) -> Handled:
        """Fetch what is lacking of a release, or install it when all is here.

        Raises:
            RemoteProtocolError: its metadata are malformed.
            RuntimeFailure: a family this device does not accept, or a model that does not run.
            TrustError: the release must not be run.
        """
        accepted = self._config.device.families
        if accepted and offer.family not in accepted:
            raise RuntimeFailure(f"family {offer.family} is not one this device accepts")
        offer, watch = unpacked(offer), Stopwatch()
        keep: dict[str, bytes] = {}
        with watch.stage("verify"):
            missing = self._models.missing(offer, now=now)
        if offer.source is not None:
            keep[RELEASED] = msgspec.msgpack.encode(offer.source)  # the next task's differences
        if missing and offer.source is not None:
            with watch.stage("make"):
                missing = self._make(offer, offer.source, missing, now)
        if missing:
            keep[OFFER] = encode(msgspec.structs.replace(offer, source=None))
            return Handled((WantFiles(offer.task_id, missing),), keep)
        handled = self._install(offer, now, watch)
        return Handled(handled.replies, {**handled.remember, **keep})

    def _make(
        self, offer: OfferModel, source: AdapterSource, missing: tuple[str, ...], now: datetime
    ) -> tuple[str, ...]:
        """Make what can be made of the missing files; return those that are still missing."""
        held = self._models.current
        if held is None:
            return missing
        try:
            from edge_sdk.made_release import make_release

            with self._models.draft() as draft:
                make_release(
                    source,
                    offer.release,
                    bundle=Path(held.bundle),
                    held=self._recall(ADAPTERS),
                    out=draft,
                )
                missing = self._models.missing(offer, now=now, made=draft)
        except (RuntimeFailure, ImportError) as exc:
            logger.info("release %s is fetched: %s", offer.release, exc)
            return missing
        if missing:
            logger.info("release %s: %d files made here differ", offer.release, len(missing))
        return missing

    def file(self, file: File, now: datetime) -> Handled:
        """Take in one file of the awaited release; the last one installs it.

        Raises:
            TrustError: not a file of the offer, or not the one that was signed.
            RuntimeFailure: the model does not run; the former one does.
        """
        saved = self._recall(OFFER)
        offer = decode(saved) if saved else None
        if not isinstance(offer, OfferModel) or offer.task_id != file.task_id:
            logger.info("a file of a release that is no longer awaited; ignored")
            return Handled()
        if file.path not in offer.targets:
            raise TrustError("a file came that the offer does not name")
        watch = Stopwatch()
        with watch.stage("verify"):
            if not self._keep(file):
                return Handled()
            missing = self._models.missing(offer, now=now)
        if file.path in missing:
            raise TrustError(f"{file.path} is not the file that was signed")
        if missing:
            return Handled()
        return self._install(offer, now, watch)

    def _keep(self, file: File) -> bool:
        if not file.size:
            self._models.put(file.path, file.data)
            return True
        return self._models.put_piece(file.path, file.data, offset=file.offset, size=file.size)

    def _install(self, offer: OfferModel, now: datetime, watch: Stopwatch) -> Handled:
        before = self._models.current
        with watch.stage("swap"):
            held = self._models.install(offer, now=now)
            if held != self._models.ready():  # it was given up, or altered since
                raise RuntimeFailure(f"release {held.release} cannot be run on this device")
            try:
                self._use(held)
            except RuntimeFailure:
                if self._models.previous is not None:
                    self._use(self._models.roll_back())
                raise
        report = self._measure(offer.task_id, held, watch)
        self._models.prove()
        self._tell(
            {
                "event": "model",
                "release": held.release,
                "accuracy": report.accuracy,
                "tokens_per_s": report.tokens_per_s,
            }
        )
        forget = {OFFER: b""}
        if before is None or before.bundle != held.bundle:
            forget[FEEDBACK] = b""  # what is owed belongs to the adapter of another base
        return Handled((report,), forget)

    def _use(self, held: Held) -> None:
        """Answer with `held` from now on; a new adapter over the open bundle needs no loading."""
        from edge_sdk.sessions import open_session

        session = self.session
        if session is None or str(session.folder) != held.bundle:
            runtime = self._config.runtime
            session = open_session(
                held.bundle,
                threads=runtime.threads,
                max_tokens=runtime.max_tokens,
                task=self._task,
                check=False,  # the store has just compared every file with its signed hash
            )
        session.set_adapter(held.adapter_path)
        # Answers still being written keep the session they began with; it goes when they end.
        self.session = session

    def _measure(self, task_id: str, held: Held, watch: Stopwatch) -> ModelReport:
        from edge_sdk.labels import accuracy

        session = self.running()
        own = self._examples.held_out()
        with watch.stage("measure"):
            share = accuracy(session, [x.text for x in own], [x.label for x in own])
            speed = session.measure_speed()
        return ModelReport(
            task_id=task_id,
            release=held.release,
            accuracy=share,
            examples=len(own),
            tokens_per_s=speed,
            peak_mb=peak_mb(),
            seconds=watch.seconds,
            reads=reads(),
        )

    def running(self) -> "SlmSession | EncoderSession":
        """Return the open model.

        Raises:
            RuntimeFailure: there is none yet.
        """
        if self.session is None:
            raise RuntimeFailure("this device holds no model yet")
        return self.session

    def require(self, release: str) -> Held:
        """Return what is held, if a task for `release` can be carried out with it.

        Raises:
            RuntimeFailure: another release runs here.
        """
        held = self._models.current
        # An adapter release trains and scores over its bundle, so a task may name either.
        if held is None or release not in (held.release, held.base_release):
            raise RuntimeFailure(
                f"the task is for release {release}, this device runs "
                f"{held.release if held else 'none'}"
            )
        return held
