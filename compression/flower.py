"""The codec for Flower: a mod for client apps and a wrapper for any strategy. Knows flwr.

Does not know models or training. In an app that runs already, two lines are new:

    app = ClientApp(mods=[coded_mod(ratio=100)])            # on the clients
    strategy = CodedStrategy(FedAvg(...), ratio=100)        # on the server

A client's reply then carries codes of what training changed, with error feedback kept in the
client's own context, instead of its arrays; the wrapper puts decoded arrays in their place before
the strategy sees them. Floating-point arrays are coded; others travel as they are.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from compression.blocks import F32, Layout
from compression.codec import RATIO, Compressor, FeedbackState
from compression.errors import CodecError

CODES, OWED = "symbiont.codes", "symbiont.owed"
"""Names of our records: in a reply, and in the client's context."""

Mod = Callable[[Message, Context, Callable[[Message, Context], Message]], Message]


def coded_mod(*, ratio: float = RATIO) -> Mod:
    """A mod that codes the change of the arrays in every reply to a training message.

    Raises:
        CodecError: later, when a reply has other arrays than the message, or values that are not
            finite; Flower then reports the reply as failed.
    """

    def mod(message: Message, context: Context, call_next: Any) -> Message:
        if message.metadata.message_type.split(".")[0] != MessageType.TRAIN:
            return call_next(message, context)  # type: ignore[no-any-return]
        sent = {name: dict(record) for name, record in message.content.array_records.items()}
        reply: Message = call_next(message, context)
        if reply.has_error():
            return reply
        for name, record in list(reply.content.array_records.items()):
            start = sent.get(name) or next(iter(sent.values()), {})
            _code(name, record, start, reply, context, ratio)
        return reply

    return mod


class CodedStrategy(Strategy):  # type: ignore[misc]  # flwr is not typed for mypy
    """Any strategy, with replies decoded before it sees them.

    Attributes:
        bytes_up: of codes received so far; `bytes_plain`: of the same arrays as float32.
    """

    def __init__(self, strategy: Strategy, *, ratio: float = RATIO) -> None:
        self._inner, self._ratio = strategy, ratio
        self._start: dict[str, npt.NDArray[Any]] = {}
        self._codec: Compressor | None = None
        self.bytes_up = self.bytes_plain = 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the strategy's; what was sent is what changes are added to."""
        self._start = {name: array.numpy() for name, array in arrays.items()}
        self._codec = _codec(self._start, self._ratio)
        found: Iterable[Message] = self._inner.configure_train(server_round, arrays, config, grid)
        return found

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As the strategy's, of decoded replies.

        Raises:
            CodecError: codes that cannot be read, or of other arrays than those sent.
        """
        replies = list(replies)
        for reply in replies:
            if not reply.has_error():
                self._decode(reply)
        found: tuple[ArrayRecord | None, MetricRecord | None]
        found = self._inner.aggregate_train(server_round, replies)
        return found

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the strategy's."""
        found: Iterable[Message]
        found = self._inner.configure_evaluate(server_round, arrays, config, grid)
        return found

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """As the strategy's."""
        found: MetricRecord | None = self._inner.aggregate_evaluate(server_round, replies)
        return found

    def summary(self) -> None:
        """As the strategy's."""
        self._inner.summary()

    def _decode(self, reply: Message) -> None:
        for key, record in list(reply.content.config_records.items()):
            if not key.startswith(CODES + "."):
                continue
            name, data = key.removeprefix(CODES + "."), bytes(record["codes"])
            assert self._codec is not None, "replies come after a round was configured"
            change = self._codec.decode(data)
            self.bytes_up += len(data)
            self.bytes_plain += self._codec.raw_bytes
            arrays = reply.content.array_records[name]
            for each, start in self._start.items():
                if each in change:
                    value = start + change[each].reshape(start.shape)
                    arrays[each] = Array(value.astype(start.dtype))
            reply.content[name] = ArrayRecord({each: arrays[each] for each in self._start})
            del reply.content[key]


def _code(
    name: str,
    record: ArrayRecord,
    start: Mapping[str, Array],
    reply: Message,
    context: Context,
    ratio: float,
) -> None:
    """Put codes of `record`'s change from `start` into the reply, in place of its float arrays."""
    if set(record) != set(start):
        raise CodecError(
            f"the reply's arrays {sorted(record)[:3]} are not the message's {sorted(start)[:3]}"
        )
    before = {each: array.numpy() for each, array in start.items()}
    codec = _codec(before, ratio)
    change = {
        each: _flat(record[each].numpy().astype(np.float32) - before[each].astype(np.float32))
        for each in codec.layout.names
    }
    key = f"{OWED}.{name}"
    held = context.state.config_records.get(key)
    feedback = FeedbackState.from_bytes(bytes(held["state"])) if held else FeedbackState()
    encoded = codec.encode(change, feedback)
    context.state[key] = ConfigRecord({"state": feedback.to_bytes()})
    rest = {each: array for each, array in record.items() if each not in change}
    reply.content[name] = ArrayRecord(rest)
    reply.content[f"{CODES}.{name}"] = ConfigRecord({"codes": encoded.data})


def _codec(arrays: Mapping[str, npt.NDArray[Any]], ratio: float) -> Compressor:
    """The codec of these arrays; both sides make the same one, so none travels."""
    coded = {name: array for name, array in arrays.items() if array.dtype.kind == "f"}
    layout = Layout(tuple(coded), tuple(array.shape or (1,) for array in coded.values()))
    return Compressor.deadzone(layout, ratio=ratio) if ratio else Compressor.identity(layout)


def _flat(value: F32) -> F32:
    return np.atleast_1d(value)
