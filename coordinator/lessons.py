"""Lessons for devices: what the LLM says of the public texts goes out, changed adapters come back.

Knows the task TeachAdapter, who holds the LLM's vocabulary, and how a family's answers are merged.
Does not know rounds' order, nor what a device makes of a lesson: which texts taught it is its own.
"""

import logging
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from coordinator.aggregate import Contribution, aggregate
from coordinator.algorithms.rounds import gathered
from coordinator.families import Families, Family
from coordinator.programs import Ask, Blame, Reply, Request
from coordinator.school import School
from edge_sdk.algorithms.logit_rows import LogitTable, pack
from edge_sdk.errors import RemoteProtocolError
from edge_sdk.train.lora import add, to_bytes
from edge_sdk.train.teaching import Lesson
from edge_sdk.wire.messages import AdapterUpdate, AnyMessage, TeachAdapter

logger = logging.getLogger(__name__)


class Lessons:
    """The lessons of one run.

    A lesson starts from the family's present factors, so its change is counted from these, and an
    answer that comes after its round is of no use.
    """

    def __init__(self, fleet: Families, school: School, *, whole: bool, greedy: bool) -> None:
        self._fleet, self._public = fleet, school.public
        self._whole, self._greedy = whole, greedy
        self._vocabulary = len(school.large.words)
        self._words = school.large.words.to_bytes()
        self._words_id = bytes.fromhex(school.large.words.digest)
        self._holders: set[str] = set()

    def ask(
        self,
        step: int,
        trained: Sequence[Reply],
        table: LogitTable,
        how: Lesson,
        seeds: Mapping[str, int],
        ratio: float,
        within_s: float,
    ) -> Ask | None:
        """The lesson of round `step` for the devices that trained in it; None if none did.

        `table` is the LLM's (line 7), `seeds` are by family; `ratio` as in LocalTraining.
        """
        codecs = {
            reply.device: reply.message.codec_id
            for reply in trained
            if reply.staleness == 0 and isinstance(reply.message, AdapterUpdate)
        }
        if not codecs or not self._public:
            return None
        lesson = self._lesson(step, table, how)
        tasks = {f.name: _for_family(lesson, f, seeds[f.name], ratio) for f in self._fleet.all}
        holders = frozenset(self._holders)

        def task(device: str) -> AnyMessage:
            exchange = self._fleet.of(device).exchange
            known = exchange.about(device, step)
            codec = exchange.codec_for(known.reads)
            has_codec = codecs[device] == codec.codec_id and "codec" not in known.lacks
            has_words = device in holders and "words" not in known.lacks
            own = msgspec.structs.replace(
                tasks[exchange.family],
                codec_id=codec.codec_id,
                codec=b"" if has_codec else codec.to_bytes(),
                words=b"" if has_words else self._words,
            )
            return exchange.sent(device, own)

        return Ask(task, tuple(sorted(codecs)), len(codecs), within_s, check=self.check)

    def _lesson(self, step: int, table: LogitTable, how: Lesson) -> TeachAdapter:
        texts, labels = (tuple(column) for column in zip(*self._public, strict=True))
        truth, ids, logps = pack(table, self._vocabulary)
        return TeachAdapter(
            task_id=f"lesson-{step}",
            round=step,
            family="any",
            release="any",
            adapter=b"",
            rank=1,
            alpha=1.0,
            targets=(),
            codec_id="",
            codec=b"",
            steps=how.steps,
            batch=how.batch,
            lr=how.lr,
            bytes_target=0,
            seed=0,
            texts=texts,
            labels=labels,
            whole=self._whole,
            share=how.share,
            greedy=self._greedy,
            words_id=self._words_id,
            words=b"",
            tokens=table.places.tokens.astype("<i4").tobytes(),
            lengths=np.diff(table.places.starts).astype("<i4").tobytes(),
            kept=table.kept,
            truth=truth,
            ids=ids,
            logps=logps,
        )

    def check(self, device: str, message: AnyMessage) -> None:
        """Look at one answer: its codec, its codes, shapes, finite, and the bound on its size.

        Raises:
            RemoteProtocolError, CodecError: it cannot be used; says why.
        """
        if isinstance(message, AdapterUpdate):
            exchange = self._fleet.of(device).exchange
            change = exchange.opened(device, message)
            exchange.check_size(device, change, exchange.factors, what="lesson")

    def given(self, asked: Ask | None) -> Generator[Request, Any, dict[str, int]]:
        """Give the lesson and merge what comes back; how many devices of each family learned.

        A family that is not named has learned nothing. Who did not answer is sent the vocabulary
        again the next time.
        """
        if asked is None:
            return {}
        replies = yield from gathered(asked)
        self._holders -= set(asked.to)
        self._holders |= {reply.device for reply in replies}
        learned = {}
        for family in self._fleet.all:
            own = [reply for reply in replies if reply.device in family.cohort]
            if own and (yield from self._merged(family, own)):
                learned[family.name] = len(own)
        return learned

    def _merged(self, family: Family, replies: Sequence[Reply]) -> Generator[Request, Any, bool]:
        exchange = family.exchange
        for reply in replies:
            if isinstance(reply.message, AdapterUpdate):
                exchange.took(reply.device, reply.message)
        contributions = [
            Contribution(
                reply.device,
                add(exchange.factors, exchange.opened(reply.device, reply.message)),
                len(self._public),  # equal for all, whatever they say: a plain mean
            )
            for reply in replies
            if isinstance(reply.message, AdapterUpdate)
        ]
        result = aggregate(exchange.factors, contributions, rule=exchange.rule)
        for device, reason in sorted(result.outliers.items()):
            yield Blame(device, reason)
        try:
            exchange.set_global(result.factors)
        except RemoteProtocolError as exc:  # each passed its check; together they leave float16
            logger.warning("the lessons of family %s are left out: %s", family.name, exc)
            return False
        family.twin.set_global(exchange.factors)
        return True

    def to_bytes(self) -> bytes:
        """Who holds the vocabulary, for a program's state."""
        return msgspec.json.encode(sorted(self._holders))

    def restore(self, data: bytes) -> None:
        """Take up what `to_bytes` returned."""
        self._holders = set(msgspec.json.decode(data or b"[]", type=list[str]))


def _for_family(lesson: TeachAdapter, family: Family, seed: int, ratio: float) -> TeachAdapter:
    exchange = family.exchange
    spec = exchange.spec
    return msgspec.structs.replace(
        lesson,
        family=family.name,
        release=family.base,
        adapter=to_bytes(exchange.factors),
        rank=spec.rank,
        alpha=spec.alpha,
        targets=spec.targets,
        bytes_target=exchange.allowance(ratio),
        seed=seed,
    )
