"""A device's desk and adapters sent as differences: applied once, asked for whole, kept with the
task's end or not at all; and its allowance for what it sends. The training itself is a stand-in."""

from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from compression import codec_file
from compression.codec import Compressor, FeedbackState
from compression.downlink import Chain, digest_of
from edge_sdk import learning_tasks
from edge_sdk.collect import Example
from edge_sdk.errors import Lacking, RuntimeFailure
from edge_sdk.handled import ADAPTERS, FEEDBACK, RELEASED, Handled
from edge_sdk.train import local
from edge_sdk.train.held import HeldAdapters
from edge_sdk.train.lora import (
    Factors,
    Layout,
    add,
    from_bytes,
    start_factors,
    to_bytes,
    wire_exact,
)
from edge_sdk.wire.messages import (
    AdapterDelta,
    AdapterSource,
    AdapterUpdate,
    Refused,
    TextTask,
    TrainAdapter,
)
from tests.edge_world import TASK, codec_for_rank_2, config, order

SHAPES = codec_for_rank_2().layout
LAYOUT: Layout = {n: (s[0], s[1]) for n, s in zip(SHAPES.names, SHAPES.shapes, strict=True)}


class Desk:
    """A desk over a memory that keeps what a handled task leaves, unless it was killed before."""

    def __init__(self, folder: Path, text: str = "") -> None:
        self.folder, self.memory = folder, dict[str, bytes]()
        self.ahead: list[Factors] = []  # of the common adapter, before each task
        self.set(text)

    def set(self, text: str) -> None:
        """A process of the device, with these settings."""
        store = SimpleNamespace(training=lambda: [Example("a text", "open")], held_out=list)
        models = SimpleNamespace(require=lambda _: SimpleNamespace(bundle=self.folder))
        task: TextTask = TASK
        self.desk = learning_tasks.LearningDesk(
            config(self.folder, text),
            task=task,
            examples=store,  # type: ignore[arg-type]
            models=models,  # type: ignore[arg-type]
            recall=lambda name: self.memory.get(name, b""),
            tell=lambda _: None,
        )

    def do(self, task: TrainAdapter, *, killed: bool = False) -> AdapterUpdate | Refused:
        owed = FeedbackState.from_bytes(self.memory.get(FEEDBACK, b""))
        self.ahead.append(owed.ahead(SHAPES))
        handled: Handled = self.desk.train(task)
        if not killed:
            self.memory.update(handled.remember)
        (reply,) = handled.replies
        assert isinstance(reply, AdapterUpdate | Refused)
        return reply

    @property
    def held(self) -> tuple[bytes, ...]:
        return HeldAdapters.from_bytes(self.memory.get(ADAPTERS, b"")).digests

    @property
    def owed(self) -> Factors:
        return FeedbackState.from_bytes(self.memory.get(FEEDBACK, b"")).tensors(SHAPES)  # type: ignore[return-value]


@pytest.fixture
def began(monkeypatch: pytest.MonkeyPatch) -> list[Factors]:
    """Where each training started; what it learns follows from the task's seed."""
    seen: list[Factors] = []

    def train(task: TrainAdapter, *_: object, **__: object) -> Factors:
        seen.append(from_bytes(task.adapter) if task.adapter else start_factors(LAYOUT, 1))
        rng = np.random.default_rng(task.seed)
        return {k: rng.normal(0, 0.01, s).astype(np.float32) for k, s in LAYOUT.items()}

    monkeypatch.setattr(local, "train_locally", train)
    return seen


def chain_of(versions: int) -> Chain:
    """The seed's adapter and `versions` more."""
    chain, rng = Chain(start_factors(LAYOUT, 1), ratio=2.5), np.random.default_rng(0)
    for _ in range(versions):
        moved = {k: v + rng.normal(0, 0.05, v.shape) for k, v in chain.tensors.items()}
        chain.adopt({k: v.astype(np.float32) for k, v in moved.items()})
        chain.open()
    return chain


def down(chain: Chain, base: bytes) -> TrainAdapter:
    """A task that begins with the chain's adapter, said from `base` on."""
    links = chain.since(base)
    assert links is not None
    deltas = tuple(AdapterDelta(link.base, link.codes) for link in links)
    return order(digest=chain.digest, deltas=deltas)


def test_it_trains_on_what_differences_lead_to_and_says_what_it_holds(
    tmp_path: Path, began: list[Factors]
) -> None:
    first, one, two = chain_of(0), chain_of(1), chain_of(2)
    desk = Desk(tmp_path)

    replies = [
        desk.do(order(digest=first.digest)),  # drawn from the seed
        desk.do(down(one, first.digest)),
        desk.do(order(digest=two.digest, adapter=to_bytes(two.tensors))),
        desk.do(order(digest=one.digest)),  # one round was taken back
    ]

    told = zip(replies, began, desk.ahead, (first, one, two, one), strict=True)
    for reply, begun, ahead, chain in told:
        assert isinstance(reply, AdapterUpdate)
        assert reply.holds == chain.digest
        start = wire_exact(add(chain.tensors, ahead))
        assert all(np.array_equal(begun[k], v) for k, v in start.items())
    assert not any(value.any() for value in desk.ahead[0].values())
    assert all(value.any() for value in desk.ahead[1].values())
    assert desk.held == (first.digest, two.digest, one.digest)


def test_differences_that_came_with_a_release_serve_the_next_task(
    tmp_path: Path, began: list[Factors]
) -> None:
    first, one = chain_of(0), chain_of(1)
    whole = down(one, first.digest)
    short = msgspec.structs.replace(whole, deltas=())
    desk = Desk(tmp_path)
    desk.do(order(digest=first.digest))
    before = dict(desk.memory)

    for kept in (b"", b"damaged", source(one, digest=first.digest)):
        desk.memory[RELEASED] = kept
        with pytest.raises(Lacking):
            desk.do(short)
    desk.memory[RELEASED] = source(one)
    made = desk.do(short)
    desk.memory = before
    told = desk.do(whole)

    assert isinstance(made, AdapterUpdate)
    assert isinstance(told, AdapterUpdate)
    assert (made.codes, made.holds) == (told.codes, one.digest)


def source(chain: Chain, *, digest: bytes = b"") -> bytes:
    """What a device keeps of the offer of a release of the chain's adapter."""
    deltas = down(chain, chain_of(0).digest).deltas
    made = AdapterSource(digest or chain.digest, deltas, 1, 2, 4.0, ("q_proj",))
    return msgspec.msgpack.encode(made)


def test_what_it_does_not_hold_is_asked_for_whole(tmp_path: Path, began: list[Factors]) -> None:
    two, one = chain_of(2), chain_of(1)
    desk = Desk(tmp_path)

    with pytest.raises(Lacking) as refusal:
        desk.do(down(two, one.digest))

    assert refusal.value.lacks == ("adapter",)
    assert (began, desk.held) == ([], ())


def test_a_device_killed_before_the_end_holds_what_it_held_and_does_it_again(
    tmp_path: Path, began: list[Factors]
) -> None:
    first, one = chain_of(0), chain_of(1)
    desk = Desk(tmp_path)
    desk.do(order(digest=first.digest))
    before = dict(desk.memory)

    lost = desk.do(down(one, first.digest), killed=True)
    assert desk.memory == before
    again = desk.do(down(one, first.digest))

    assert isinstance(lost, AdapterUpdate)
    assert isinstance(again, AdapterUpdate)
    assert again.codes == lost.codes
    assert desk.held == (first.digest, one.digest)


def test_the_smaller_allowance_counts_and_what_cannot_be_sent_is_owed(
    tmp_path: Path, began: list[Factors]
) -> None:
    desk = Desk(tmp_path, "[train]\nuplink_bytes_per_round = 200\n")
    own = desk.do(order(bytes_target=400))
    theirs = desk.do(order(bytes_target=120))
    before = desk.owed

    desk.set("[train]\nuplink_bytes_per_round = 30\n")
    refused = desk.do(order())
    after = desk.owed
    desk.set("")
    paid = desk.do(order(bytes_target=1000))

    assert isinstance(own, AdapterUpdate)
    assert isinstance(theirs, AdapterUpdate)
    assert 120 < len(own.codes) <= 200
    assert len(theirs.codes) <= 120
    assert isinstance(refused, Refused)
    assert refused.lacks == ("allowance",)
    assert "train.uplink_bytes_per_round here is 30" in refused.reason
    rng = np.random.default_rng(order().seed)
    for name, shape in LAYOUT.items():  # the round's whole change
        change = rng.normal(0, 0.01, shape).astype(np.float32)
        assert np.array_equal(after[name], before[name] + change)
    assert isinstance(paid, AdapterUpdate)
    sent = codec_for_rank_2().decode(paid.codes)
    assert sum(float(np.vdot(sent[k], after[k])) for k in sent) > 0


def test_a_codec_of_an_unknown_format_or_none_at_all_is_refused_with_the_next_step(
    tmp_path: Path, began: list[Factors], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(codec_file, "FORMAT", 9)
        newer = Compressor.deadzone(SHAPES)
        data, name = newer.to_bytes(), newer.codec_id
    desk = Desk(tmp_path)

    with pytest.raises(RuntimeFailure, match="codec format 9; this version reads 1, 2; upgrade"):
        desk.do(order(codec=data, codec_id=name))
    with pytest.raises(Lacking) as refusal:
        desk.do(order(codec=b"", codec_id=name))

    assert refusal.value.lacks == ("codec",)


def test_a_task_without_the_new_fields_is_that_of_the_first_version() -> None:
    plain = msgspec.msgpack.decode(msgspec.msgpack.encode(order()))

    assert not {"digest", "deltas"} & set(plain)
    assert digest_of(start_factors(LAYOUT, 1)) == chain_of(0).digest
