"""The coordinator's half of federated LoRA: what each device was sent, and what comes back.

Knows adapters, codecs by id and the `TrainAdapter`/`AdapterUpdate` pair. Does not know how messages
travel, what the task is, or which algorithm asks.

One `AdapterExchange` is the state that every federated-adapter program shares. It is rebuilt from
the bytes of its last `state()`. With a `down_ratio` the adapter goes down as a coded difference
(`broadcast.py`); what the coordinator then works with is what devices decode, never the original.
The codec of updates then follows those differences, which devices have too (`moving.py`); without
them it is learned once from the first round's updates, and sent.
"""

import hashlib
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import msgspec

from compression.blocks import Layout as BlockLayout
from compression.codec import Compressor
from compression.errors import CodecError
from compression.formats import codec_formats, makes_releases, reads_deltas
from coordinator.abilities import About, nothing_known
from coordinator.aggregate import (
    Aggregate,
    Contribution,
    aggregate,
    change_norm,
    check_factors,
)
from coordinator.broadcast import Broadcast, Carried
from coordinator.programs import LATE_STEPS, Check, Reply, TaskFor
from coordinator.robust import Rule
from edge_sdk.errors import RemoteProtocolError
from edge_sdk.train.lora import (
    Factors,
    Layout,
    LoraSpec,
    add,
    from_bytes,
    start_factors,
    to_bytes,
    wire_exact,
)
from edge_sdk.wire.messages import (
    AdapterSource,
    AdapterUpdate,
    AnyMessage,
    TrainAdapter,
    encode,
)

logger = logging.getLogger(__name__)

MOST_CODECS = 16
"""Newest codecs kept: updates made with an older one come too late to count."""

MIN_UPDATE_BYTES = 512
"""No allowance is smaller: below this a codec's headers leave nothing for values."""


@dataclass(frozen=True, slots=True)
class LocalTraining:
    """What each device does in a round: optimizer steps, batch, learning rate, mu of PAPERS.md 1.

    ratio: the encoded update may take 1/ratio of its float32 size; 0 leaves the size to the
    codec's own step. Adam's first steps move all values about equally far, so a fixed step of
    some RMS would round a short training to nothing; an allowance adapts.
    """

    steps: int = 60
    batch: int = 16
    lr: float = 3e-3
    synthetic_weight: float = 0.5
    ratio: float = 16.0


class _Held(msgspec.Struct):
    codec: str
    codecs: dict[str, bytes]
    holders: dict[str, list[str]]
    globals: dict[int, bytes]
    replicas: dict[str, bytes]
    broadcast: bytes = b""
    aged: bool = False
    fallbacks: dict[str, tuple[int, int]] = {}
    at: dict[bytes, str] = {}


class AdapterExchange:
    """Global factors, past global factors, codecs, and the newest factors of each device.

    Attributes:
        about: what each device reads, and what it lacked of a round's tasks.
        factors: the present global factors, exactly as devices will read them.
        replicas: device id -> start + decoded update, the newest of each device.
        aged: in the last round most updates of the learned codec fell back to the dead zone.
        fallbacks: codec id -> (updates encoded with it, those of them that fell back).
    """

    def __init__(
        self,
        family: str,
        layout: Layout,
        spec: LoraSpec,
        *,
        seed: int,
        rule: Rule | None = None,
        down_ratio: float = 0.0,
        about: About = nothing_known,
    ) -> None:
        """`down_ratio`: times fewer bytes than float32 on the way down; 0: whole float16 adapters,
        which lose nothing."""
        self.family, self.layout, self.spec, self.seed = family, layout, spec, seed
        self.rule = rule or Rule()
        self.factors: Factors = start_factors(layout, seed)
        self.replicas: dict[str, Factors] = {}
        blocks = BlockLayout(tuple(layout), tuple(layout.values()))
        self._codec = self._plain = Compressor.deadzone(blocks)
        self._codecs = {self._codec.codec_id: self._codec}
        self.about = about
        self._down_ratio = down_ratio
        self._broadcast = Broadcast(self.factors, ratio=down_ratio) if down_ratio else None
        self._down: dict[bytes, int] = {}  # digest of a message and its device -> its bytes
        self._up: dict[str, int] = {}
        self.aged = False
        self.fallbacks: dict[str, tuple[int, int]] = {}
        self._holders: dict[str, set[str]] = {}
        self._at: dict[bytes, str] = {}  # digest of an opened adapter -> codec asked for with it
        self._globals: dict[int, Factors] = {}

    @property
    def codec(self) -> Compressor:
        """The codec that the next round asks for."""
        return self._codec

    def use_codec(self, codec: Compressor) -> None:
        """Ask for `codec` from now on; each device gets it once, with its next task."""
        self._codec, self.aged = codec, False
        self._codecs[codec.codec_id] = codec
        for old in [c for c in self._codecs if c != self._plain.codec_id][:-MOST_CODECS]:
            del self._codecs[old]
            self._holders.pop(old, None)
            self.fallbacks.pop(old, None)
        self._at = {digest: c for digest, c in self._at.items() if c in self._codecs}

    @property
    def wants_codec(self) -> bool:
        """Whether one should be learned from the updates that just came: the first, or an aged.

        Never where adapters go down as differences: there the codec follows those by itself.
        """
        untried = self._codec.basis is None and not self.fallbacks
        return self._broadcast is None and (untried or self.aged)

    @property
    def traffic(self) -> dict[str, int]:
        """Bytes of this round: codes that came up, and messages that went down (`sent`)."""
        return {"bytes_up": sum(self._up.values()), "bytes_down": sum(self._down.values())}

    def sent(self, device: str, message: AnyMessage) -> AnyMessage:
        """Count a message of this round to `device`, once however often it is asked for."""
        words = encode(message)
        self._down[hashlib.sha256(device.encode() + words).digest()] = len(words)
        return message

    def source(self, device: str) -> AdapterSource | None:
        """From what `device` can make a release of the adapter set last; None: it fetches that.

        None where adapters go down whole, where the device does not read this, or where what it
        lacks weighs as much as the file.
        """
        if self._broadcast is None or not makes_releases(self.about(device, 0).reads):
            return None
        ahead = self._broadcast.ahead(device)
        if ahead is None:
            return None
        return AdapterSource(
            digest=ahead.digest,
            deltas=ahead.deltas,
            seed=self.seed,
            rank=self.spec.rank,
            alpha=self.spec.alpha,
            targets=self.spec.targets,
        )

    def released(self, device: str) -> None:
        """Note that `device` has reported on the release that it was offered with a `source`."""
        if self._broadcast is not None and self.source(device) is not None:
            self._broadcast.released(device)

    def learn_codec(self, changes: Sequence[Factors]) -> None:
        """Fit the learned codec on decoded updates and ask for it from now on.

        When there is nothing to learn from (no update moved) the present codec stays. One that
        fell back for most of its life was never better than the plain one, which takes its place.
        """
        sent, fell = self.fallbacks.get(self._codec.codec_id, (0, 0))
        if 2 * fell > sent:
            self.use_codec(self._plain)
            return
        try:
            self.use_codec(Compressor.fit(list(changes), layout=self._codec.layout))
        except CodecError as exc:
            logger.warning("the codec stays as it is: %s", exc)

    def start(self, step: int, release: str, training: LocalTraining) -> TaskFor:
        """Open round `step` on top of `release` and return the task of each device."""
        if self._broadcast is not None:
            self.factors, change = self._broadcast.open()
            if change:
                self.use_codec(self._codec.followed([change]))
            self._at[self._broadcast.digest] = self._codec.codec_id
        self._globals[step], self._up, self._down = self.factors, {}, {}
        for old in [s for s in self._globals if s < step - LATE_STEPS]:
            del self._globals[old]
        whole = Carried(to_bytes(self.factors))
        target = self.allowance(training.ratio)
        holders = {codec: frozenset(devices) for codec, devices in self._holders.items()}
        broadcast, at = self._broadcast, dict(self._at)

        def task_for(device: str) -> AnyMessage:
            known, start = self.about(device, step), whole
            codec = self.codec_for(known.reads)
            if broadcast is not None and reads_deltas(known.reads):
                start = broadcast.carried(device, lacks=known.lacks)
            held = device in holders.get(codec.codec_id, ())
            if start.since and codec.changes:  # then it makes the codec from the one it holds
                held |= device in holders.get(at.get(start.since, ""), ())
            packed = b"" if held and "codec" not in known.lacks else codec.to_bytes()
            task = TrainAdapter(
                task_id=f"train-{step}",
                round=step,
                family=self.family,
                release=release,
                adapter=start.adapter,
                adapter_seed=self.seed,
                rank=self.spec.rank,
                alpha=self.spec.alpha,
                targets=self.spec.targets,
                codec_id=codec.codec_id,
                codec=packed,
                steps=training.steps,
                batch=training.batch,
                lr=training.lr,
                synthetic_weight=training.synthetic_weight,
                bytes_target=target,
                seed=self.seed + step,
                digest=start.digest,
                deltas=start.deltas,
            )
            return self.sent(device, task)

        return task_for

    def codec_for(self, reads: Collection[str]) -> Compressor:
        """The present codec, or for a device of an earlier version the plain one."""
        return self._codec if self._codec.format in codec_formats(reads) else self._plain

    def allowance(self, ratio: float) -> int:
        """Bytes that an update may take at this ratio, at least MIN_UPDATE_BYTES; 0 for ratio 0."""
        return max(MIN_UPDATE_BYTES, int(self._codec.raw_bytes / ratio)) if ratio > 0 else 0

    def took(self, device: str, update: AdapterUpdate) -> None:
        """Count an update of this round, and do not send `device` its codec again."""
        self._holders.setdefault(update.codec_id, set()).add(device)
        self._up[device] = self._up.get(device, 0) + len(update.codes)

    def check(self) -> Check:
        """Looks at one update, cheap before dear: round and codec, length, codes, shapes as the
        task's, finite, what float16 carries, and the absolute bound on its size.

        The check raises RemoteProtocolError or CodecError.
        """

        def check(device: str, message: AnyMessage) -> None:
            if not isinstance(message, AdapterUpdate):
                return
            change = self.decode(device, message)
            base = self._globals[message.round]
            self.check_size(device, change, base, what="update")

        return check

    def check_size(self, device: str, change: Factors, base: Factors, *, what: str) -> None:
        """Look at what a decoded change makes of `base`: float16 carries it, and the bound holds.

        Raises:
            RemoteProtocolError: it does not; its `what` is left out.
        """
        size = change_norm(wire_exact(add(base, change)), base)
        if not size <= self.rule.max_norm:
            raise RemoteProtocolError(
                f"device {device} sent a change of {size:.3g}, over the bound of "
                f"{self.rule.max_norm:g}; its {what} is left out"
            )

    def decode(self, device: str, update: AdapterUpdate) -> Factors:
        """The decoded change that `device` sent.

        Raises:
            RemoteProtocolError: unknown round or codec, or factors that do not fit.
            CodecError: the codes are malformed.
        """
        if update.round not in self._globals:
            raise RemoteProtocolError(
                f"device {device} answers round {update.round}, which is not open; "
                f"open are {sorted(self._globals)}"
            )
        return self.opened(device, update)

    def opened(self, device: str, update: AdapterUpdate) -> Factors:
        """As `decode`, of an update to another task than a round's training.

        Raises:
            RemoteProtocolError: unknown codec, or factors that do not fit.
            CodecError: the codes are malformed.
        """
        codec = self._codecs.get(update.codec_id)
        if codec is None:
            raise RemoteProtocolError(f"device {device} used codec {update.codec_id!r}, never sent")
        change: Factors = codec.decode(update.codes)
        check_factors(device, change, self.factors)
        return change

    def receive(self, replies: Sequence[Reply]) -> tuple[Aggregate, list[Factors]]:
        """Take in a round's updates: new global factors, replicas, and the decoded changes.

        Replies are used in order of device id and round, so their order of arrival does not count.
        Outliers leave no trace: neither in the factors, nor as replicas, nor in the changes.

        Raises:
            RemoteProtocolError: see `decode`.
        """
        contributions: list[Contribution] = []
        changes: list[tuple[str, Factors]] = []
        methods: list[str] = []
        updates = [(r.device, r.message, r.staleness) for r in replies]
        for device, message, staleness in sorted(updates, key=_device_and_round):
            assert isinstance(message, AdapterUpdate), "the runner delivers the reply of the task"
            change = self.decode(device, message)
            base = self._globals[message.round]
            factors = add(base, change)
            changes.append((device, change))
            self.took(device, message)
            methods += self._method(message)
            if self._broadcast is not None:
                self._broadcast.confirm(device, message.holds)
            fresh = base is self.factors
            contributions.append(
                Contribution(device, factors, message.examples, staleness, None if fresh else base)
            )
        self.aged = 2 * methods.count("dead-zone") > len(methods)
        result = aggregate(self.factors, contributions, rule=self.rule)
        self.set_global(result.factors)
        for one in contributions:
            if one.device not in result.outliers:
                self.replicas[one.device] = wire_exact(one.factors)
        logger.info(
            "aggregated %d updates: %.1f %% of energy beyond the rank, %d clipped, %d left out",
            len(contributions),
            100 * result.discarded,
            len(result.clipped),
            len(result.outliers),
        )
        return result, [change for device, change in changes if device not in result.outliers]

    def _method(self, update: AdapterUpdate) -> list[str]:
        """Count an update of a learned codec; what made it, if it is of the present one."""
        codec = self._codecs[update.codec_id]
        if codec.basis is None:
            return []
        method = codec.method_of(update.codes)
        sent, fell = self.fallbacks.get(update.codec_id, (0, 0))
        self.fallbacks[update.codec_id] = (sent + 1, fell + (method == "dead-zone"))
        return [method] if codec is self._codec else []

    def set_global(self, factors: Factors) -> None:
        """Replace the global factors by what devices will read of `factors`.

        Raises:
            RemoteProtocolError: a value that does not fit float16.
        """
        exact = wire_exact(factors) if self._broadcast is None else self._broadcast.adopt(factors)
        self.factors = exact

    def roll_back(self, data: bytes) -> None:
        """Take up what `state` returned before the last round; late updates to it still count.

        What that round sent out stays known: who holds which codec, and where updates started.
        """
        codecs, holders, opened = self._codecs, self._holders, self._globals
        broadcast, fallbacks = self._broadcast, self.fallbacks
        self.restore(data)
        self._codecs, self._holders, self._globals = codecs | self._codecs, holders, opened
        self.fallbacks = fallbacks
        if self._broadcast is not None and broadcast is not None:
            self._broadcast.keep_confirmed(broadcast)

    def state(self) -> bytes:
        """Everything above as bytes."""
        return msgspec.msgpack.encode(
            _Held(
                codec=self._codec.codec_id,
                codecs={name: codec.to_bytes() for name, codec in self._codecs.items()},
                holders={name: sorted(devices) for name, devices in self._holders.items()},
                globals={-1: to_bytes(self.factors)}
                | {step: to_bytes(factors) for step, factors in self._globals.items()},
                replicas={name: to_bytes(factors) for name, factors in self.replicas.items()},
                broadcast=self._broadcast.to_bytes() if self._broadcast is not None else b"",
                aged=self.aged,
                fallbacks=dict(sorted(self.fallbacks.items())),
                at=self._at,
            )
        )

    def restore(self, data: bytes) -> None:
        """Take up what `state` returned."""
        held = msgspec.msgpack.decode(data, type=_Held)
        self._codecs = {name: Compressor.from_bytes(blob) for name, blob in held.codecs.items()}
        self._codec = self._codecs[held.codec]
        self._holders = {name: set(devices) for name, devices in held.holders.items()}
        self._globals = {step: from_bytes(blob) for step, blob in held.globals.items()}
        self.factors = self._globals.pop(-1)
        self.replicas = {name: from_bytes(blob) for name, blob in held.replicas.items()}
        self.aged, self.fallbacks, self._at = held.aged, held.fallbacks, held.at
        if self._down_ratio and held.broadcast:
            self._broadcast = Broadcast.from_bytes(held.broadcast, ratio=self._down_ratio)
        elif self._down_ratio:  # switched on amid a run
            first = start_factors(self.layout, self.seed)
            self._broadcast = Broadcast(first, ratio=self._down_ratio, now=self.factors)


def _device_and_round(update: tuple[str, AnyMessage, int]) -> tuple[str, int]:
    return update[0], getattr(update[1], "round", 0)
