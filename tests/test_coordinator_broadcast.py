"""Adapters go down as differences: bit-equal ends, missed rounds, restarts, codecs both know."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from compression import formats
from compression.codec import Compressor, FeedbackState
from compression.downlink import digest_of
from compression.errors import CodecError
from coordinator.abilities import Known
from coordinator.algorithms.rounds import learn
from coordinator.config import AdapterSection
from coordinator.exchange import AdapterExchange, LocalTraining
from coordinator.programs import Note, Release, Reply
from edge_sdk.errors import Lacking
from edge_sdk.train.held import HeldAdapters, completed
from edge_sdk.train.lora import LoraSpec, from_bytes, start_factors
from edge_sdk.wire.messages import AdapterSource, AdapterUpdate, TrainAdapter, encode
from edge_sdk.wire.offers import packed
from tests.edge_world import releases

LAYOUT = {f"{i}.lora_{half}": (8, 64) if half == "A" else (64, 8) for i in "pq" for half in "AB"}
SPEC = LoraSpec(8, 16.0, ("p", "q"))
HOW = LocalTraining(steps=1)
NEW = Known(frozenset(formats.words()))


class Fleet:
    """Devices without training: each moves every factor a little, in a way of its own."""

    def __init__(self, *names: str, down_ratio: float = 20.0) -> None:
        self.known = dict.fromkeys(names, NEW)
        self.held = dict.fromkeys(names, b"")
        self.codecs: dict[str, Compressor] = {}  # the newest of each device
        self.feedback = {name: FeedbackState() for name in names}
        self.began: dict[str, dict[str, np.ndarray]] = {}
        self.released = dict.fromkeys(names, b"")  # what came with the last release
        self.tasks: list[TrainAdapter] = []
        self.down_ratio = down_ratio

    def exchange(self) -> AdapterExchange:
        return AdapterExchange(
            "slm",
            LAYOUT,
            SPEC,
            seed=3,
            down_ratio=self.down_ratio,
            about=lambda device, _round: self.known[device],
        )

    def answer(self, name: str, task: TrainAdapter) -> Reply:
        self.tasks.append(task)
        task = completed(task, self.released[name])
        codec = Compressor.from_bytes(task.codec) if task.codec else self.codecs[name]
        codec = codec.followed_to(task.codec_id, [delta.codes for delta in task.deltas])
        self.codecs[name] = codec
        adapters = HeldAdapters.from_bytes(self.held[name])
        begun = adapters.begin(task, LAYOUT)
        self.held[name] = adapters.to_bytes()  # as the device's one transaction
        self.began[name] = from_bytes(begun.adapter)
        rng = np.random.default_rng([len(name), task.round])
        drift = np.random.default_rng(7)
        change = {
            k: ((drift.normal(size=s) + rng.normal(size=s)) * 0.01).astype(np.float32)
            for k, s in LAYOUT.items()
        }
        encoded = codec.encode(change, self.feedback[name], task.bytes_target)
        update = AdapterUpdate(
            task.task_id, task.round, task.release, codec.codec_id, encoded.data, 5,
            codec.raw_bytes, encoded.cosine, {}, 1.0, begun.digest,
        )  # fmt: skip
        return Reply(name, update)

    def release(self, exchange: AdapterExchange, *names: str) -> None:
        """Offer what was adopted last to `names`, who report on it."""
        for name in names:
            self.released[name] = msgspec.msgpack.encode(exchange.source(name))
            exchange.released(name)

    def round(self, exchange: AdapterExchange, step: int, *names: str) -> None:
        """One round in which only `names` are reached."""
        task = exchange.start(step, "base", HOW)
        exchange.receive([self.answer(name, task(name)) for name in names])


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return set(one) == set(other) and all(np.array_equal(v, other[k]) for k, v in one.items())


def test_devices_begin_each_round_with_the_coordinators_factors_bit_for_bit() -> None:
    fleet = Fleet("a", "bb")
    exchange = fleet.exchange()

    for step in range(6):
        factors = exchange.factors
        fleet.round(exchange, step, "a", "bb")

        assert same(fleet.began["a"], factors)
        assert same(fleet.began["bb"], factors)
        assert same(exchange._globals[step], factors)

    assert all(task.adapter == b"" for task in fleet.tasks)  # the first was drawn from the seed
    assert fleet.tasks[0].deltas == ()
    whole = 2 * sum(a * b for a, b in LAYOUT.values())
    for task in fleet.tasks[2:]:
        (delta,) = task.deltas
        assert len(delta.codes) <= max(512, 2 * whole / 20)


def test_without_a_ratio_whole_adapters_go_down_and_lose_nothing() -> None:
    fleet = Fleet("a", down_ratio=0.0)
    exchange = fleet.exchange()

    fleet.round(exchange, 0, "a")
    factors = exchange.factors
    fleet.round(exchange, 1, "a")

    assert all(task.adapter and not task.digest for task in fleet.tasks)
    assert same(from_bytes(fleet.tasks[1].adapter), factors)


def test_a_device_that_missed_rounds_gets_what_it_missed_or_a_whole_copy() -> None:
    fleet = Fleet("a", "bb")
    exchange = fleet.exchange()
    fleet.round(exchange, 0, "a", "bb")

    for step in range(1, 4):
        fleet.round(exchange, step, "a")
    fleet.round(exchange, 4, "a", "bb")
    some = fleet.tasks[-1]
    assert same(fleet.began["bb"], fleet.began["a"])
    for step in range(5, 20):
        fleet.round(exchange, step, "a")
    fleet.round(exchange, 20, "a", "bb")
    late = fleet.tasks[-1]

    assert len(some.deltas) == 4
    assert not some.adapter
    assert late.adapter
    assert not late.deltas
    assert same(fleet.began["bb"], fleet.began["a"])


def test_what_was_received_and_never_confirmed_is_joined_in_the_middle() -> None:
    fleet = Fleet("a", "bb")
    exchange = fleet.exchange()
    fleet.round(exchange, 0, "a", "bb")
    task = exchange.start(1, "base", HOW)
    fleet.answer("bb", task("bb"))  # its reply is lost
    exchange.receive([fleet.answer("a", task("a"))])

    fleet.round(exchange, 2, "a", "bb")

    assert len(fleet.tasks[-1].deltas) == 2
    assert same(fleet.began["bb"], fleet.began["a"])


def test_a_device_that_lost_its_state_asks_for_a_whole_copy_and_gets_it() -> None:
    fleet = Fleet("a", "bb")
    exchange = fleet.exchange()
    fleet.round(exchange, 0, "a", "bb")
    fleet.round(exchange, 1, "a", "bb")
    fleet.held["bb"] = b"damaged"

    task = exchange.start(2, "base", HOW)
    with pytest.raises(Lacking) as refusal:
        fleet.answer("bb", task("bb"))
    fleet.known["bb"] = replace(NEW, lacks=frozenset(refusal.value.lacks))
    again = task("bb")
    exchange.receive([fleet.answer("a", task("a")), fleet.answer("bb", again)])
    fleet.known["bb"] = NEW
    fleet.round(exchange, 3, "a", "bb")

    assert refusal.value.lacks == ("adapter",)
    assert again.adapter
    assert len(fleet.tasks[-1].deltas) == 1
    assert same(fleet.began["bb"], fleet.began["a"])


def test_a_wrong_digest_or_damaged_codes_are_refused_and_change_nothing() -> None:
    fleet = Fleet("a")
    exchange = fleet.exchange()
    fleet.round(exchange, 0, "a")
    good = exchange.start(1, "base", HOW)("a")
    (delta,) = good.deltas
    before = fleet.held["a"]

    for bad in (
        {"digest": bytes(32)},
        {"deltas": (msgspec.structs.replace(delta, codes=delta.codes[:-2]),)},
        {"deltas": (msgspec.structs.replace(delta, base=bytes(32)),)},
        {"deltas": (), "adapter": b"no adapter"},
        {"deltas": (), "adapter": fleet_blob(exchange), "digest": bytes(32)},
    ):
        with pytest.raises(Lacking):
            fleet.answer("a", msgspec.structs.replace(good, **bad))
        assert fleet.held["a"] == before

    fleet.answer("a", good)
    assert digest_of(fleet.began["a"]) == good.digest


def fleet_blob(exchange: AdapterExchange) -> bytes:
    from edge_sdk.train.lora import to_bytes

    return to_bytes(exchange.factors)


def test_a_restart_of_the_coordinator_changes_no_bit() -> None:
    whole, fleet = Fleet("a", "bb"), Fleet("a", "bb")
    one, other = whole.exchange(), fleet.exchange()

    for step in range(5):
        whole.round(one, step, "a", "bb")
        fleet.round(other, step, "a", "bb")
        stored = other.state()  # as a Commit keeps it
        other = fleet.exchange()
        other.restore(stored)

    assert one.state() == other.state()
    assert [msgspec.structs.asdict(t) for t in whole.tasks] == [
        msgspec.structs.asdict(t) for t in fleet.tasks
    ]


def test_a_round_that_is_taken_back_leaves_both_ends_equal() -> None:
    fleet = Fleet("a")
    exchange = fleet.exchange()
    fleet.round(exchange, 0, "a")
    before, factors = exchange.state(), exchange.factors
    fleet.round(exchange, 1, "a")

    exchange.roll_back(before)
    assert same(exchange.factors, factors)
    fleet.round(exchange, 2, "a")

    assert same(fleet.began["a"], factors)
    assert fleet.tasks[-1].deltas == ()  # it holds that one already


def made(fleet: Fleet, name: str, source: AdapterSource | None) -> dict[str, np.ndarray] | None:
    """The adapter that a device makes of a release's source, if it can."""
    assert source is not None
    assert source.targets == SPEC.targets
    drawn = start_factors(LAYOUT, source.seed)
    held = HeldAdapters.from_bytes(fleet.held[name])
    return held.reach(source.digest, source.deltas, drawn)


def test_a_release_goes_down_as_the_difference_that_the_next_round_opens() -> None:
    fleet = Fleet("a", "bb", "idle")
    exchange = fleet.exchange()
    for step, names in enumerate([("a", "bb"), ("a",), ("a",)]):
        fleet.round(exchange, step, *names)
    stored = exchange.state()

    sources = {name: exchange.source(name) for name in fleet.known}

    found = {name: made(fleet, name, source) for name, source in sources.items()}
    assert all(one is not None and same(one, exchange.factors) for one in found.values())
    assert {name: len(one.deltas) for name, one in sources.items()} == {"a": 1, "bb": 3, "idle": 3}
    assert exchange.state() == stored
    again = fleet.exchange()
    again.restore(stored)
    assert {name: again.source(name) for name in fleet.known} == sources
    task = exchange.start(3, "base", HOW)
    assert {name: task(name).deltas for name in fleet.known} == {
        name: one.deltas for name, one in sources.items()
    }


def test_what_came_with_a_release_is_not_said_again_in_the_next_task() -> None:
    fleet, plain = Fleet("a", "bb"), Fleet("a", "bb")
    exchange, other = fleet.exchange(), plain.exchange()

    for step in range(12):
        fleet.round(exchange, step, "a", "bb")
        plain.round(other, step, "a", "bb")
        fleet.release(exchange, "a")
        stored = exchange.state()
        exchange = fleet.exchange()
        exchange.restore(stored)

    said = {name: list(fleet.tasks[i::2]) for i, name in enumerate(("a", "bb"))}
    assert not any(task.deltas or task.adapter for task in said["a"])
    assert not any(task.codec for task in said["a"][1:])
    assert all(len(task.deltas) == 1 for task in said["bb"][1:])
    assert same(exchange.factors, other.factors)
    assert same(fleet.began["a"], plain.began["a"])
    assert exchange.codec.codec_id == other.codec.codec_id == fleet.codecs["a"].codec_id


def test_a_device_that_lost_what_came_with_a_release_is_told_again() -> None:
    fleet = Fleet("a", "bb", "ccc")
    exchange = fleet.exchange()
    fleet.round(exchange, 0, *fleet.known)
    fleet.release(exchange, *fleet.known)
    fleet.released |= {"a": b"", "bb": b"damaged"}
    fleet.held["bb"] = b""
    task = exchange.start(1, "base", HOW)

    replies = [fleet.answer("ccc", task("ccc"))]
    for name in ("a", "bb"):
        lacks: frozenset[str] = frozenset()
        while len(lacks) < 3:
            fleet.known[name] = replace(NEW, lacks=lacks)
            try:
                replies.append(fleet.answer(name, task(name)))
                break
            except (Lacking, CodecError) as exc:  # the codec is looked at first
                lacks |= set(getattr(exc, "lacks", ("codec",)))
        assert lacks == {"codec"}  # it comes with the differences; bb draws what they start from
    exchange.receive(replies)

    assert same(fleet.began["a"], fleet.began["ccc"])
    assert same(fleet.began["bb"], fleet.began["ccc"])


def test_a_release_of_a_round_that_was_taken_back_counts_for_nothing() -> None:
    fleet = Fleet("a", "bb")
    exchange = fleet.exchange()
    fleet.round(exchange, 0, "a", "bb")
    fleet.release(exchange, "a", "bb")
    before = exchange.state()
    fleet.round(exchange, 1, "a")
    fleet.release(exchange, "a", "bb")

    exchange.roll_back(before)

    fleet.round(exchange, 2, "a", "bb")
    assert fleet.tasks[-2].deltas == ()  # it has trained from it
    assert len(fleet.tasks[-1].deltas) == 1  # it has now kept the newer release's instead
    assert same(fleet.began["a"], fleet.began["bb"])


def test_who_gets_a_release_whole() -> None:
    fleet = Fleet("a", "older", "oldest", "late")
    fleet.known |= {"older": Known(frozenset({"codec.2", "delta.1"})), "oldest": Known()}
    exchange = fleet.exchange()
    fleet.round(exchange, 0, *fleet.known)
    for step in range(1, 20):
        fleet.round(exchange, step, "a")
    lossless = Fleet("a", down_ratio=0.0)
    whole = lossless.exchange()
    lossless.round(whole, 0, "a")

    assert exchange.source("a") is not None
    assert [exchange.source(name) for name in ("older", "oldest", "late")] == [None] * 3
    assert whole.source("a") is None


def test_a_round_that_was_taken_back_leads_no_release_astray() -> None:
    fleet = Fleet("a")
    exchange = fleet.exchange()
    fleet.round(exchange, 0, "a")
    before, factors = exchange.state(), exchange.factors
    fleet.round(exchange, 1, "a")
    released = made(fleet, "a", exchange.source("a"))

    exchange.roll_back(before)

    # What the round began with is what the device holds, and what the chain is at again.
    back = made(fleet, "a", exchange.source("a"))
    assert back is not None
    assert same(back, factors)
    fleet.round(exchange, 2, "a")
    found = made(fleet, "a", exchange.source("a"))
    assert found is not None
    assert same(found, exchange.factors)
    assert released is not None
    assert not same(found, released)


def test_traffic_counts_each_message_of_a_round_once() -> None:
    fleet = Fleet("a", "bb")
    exchange = fleet.exchange()
    task = exchange.start(0, "base", HOW)
    asked = {name: task(name) for name in ("a", "bb", "a")}
    replies = [fleet.answer(name, one) for name, one in asked.items()]
    exchange.receive(replies)
    offer = Release("slm", "base-1", ("slm/base-1/symbiont.json",)).offer(
        source=exchange.source("a")
    )
    exchange.sent("a", exchange.sent("a", offer))

    assert exchange.traffic == {
        "bytes_up": sum(len(reply.message.codes) for reply in replies),
        "bytes_down": sum(len(encode(one)) for one in (*asked.values(), offer)),
    }
    exchange.start(1, "base", HOW)
    assert exchange.traffic == {"bytes_up": 0, "bytes_down": 0}


def test_it_may_be_switched_on_and_off_amid_a_run() -> None:
    fleet = Fleet("a", down_ratio=0.0)
    exchange = fleet.exchange()
    fleet.round(exchange, 0, "a")

    for ratio in (20.0, 0.0):
        stored, factors = exchange.state(), exchange.factors
        fleet.down_ratio = ratio
        exchange = fleet.exchange()
        exchange.restore(stored)
        task = exchange.start(1, "base", HOW)
        assert same(exchange.factors, factors)
        asked = task("a")
        try:
            reply = fleet.answer("a", asked)
        except Lacking as exc:
            fleet.known["a"] = replace(NEW, lacks=frozenset(exc.lacks))
            reply = fleet.answer("a", task("a"))
        assert same(fleet.began["a"], factors)
        exchange.receive([reply])


def test_each_device_gets_the_adapter_and_the_codec_that_it_reads() -> None:
    fleet = Fleet("oldest", "older", "new")
    fleet.known |= {"oldest": Known(), "older": Known(frozenset({"codec.1", "delta.1"}))}
    exchange = fleet.exchange()
    fleet.round(exchange, 0, "oldest", "older", "new")

    task = exchange.start(1, "base", HOW)
    asked = {name: task(name) for name in fleet.known}

    assert asked["oldest"].adapter
    assert not asked["oldest"].digest
    assert {asked[name].codec_id for name in ("oldest", "older")} == {fleet.tasks[0].codec_id}
    assert not asked["older"].codec  # sent once, with the round before
    assert asked["new"].codec_id == exchange.codec.codec_id != fleet.tasks[0].codec_id
    assert not asked["new"].codec  # it follows from the difference
    fleet.known["new"] = replace(NEW, lacks=frozenset({"codec"}))
    assert Compressor.from_bytes(task("new").codec).codec_id == exchange.codec.codec_id
    fleet.known["new"] = NEW
    replies = [fleet.answer(name, asked[name]) for name in asked]
    exchange.receive(replies)  # all are read
    made = {r.device: Compressor.method_of(r.message.codes) for r in replies}
    assert made == {"oldest": "dead-zone", "older": "dead-zone", "new": "moving"}


def test_codecs_follow_the_adapter_and_are_sent_to_newcomers_only() -> None:
    fleet = Fleet("a", "bb", "late")
    exchange = fleet.exchange()
    sent = {}
    for step, names in enumerate([("a", "bb")] * 9 + [("a", "bb", "late")] * 2):
        fleet.round(exchange, step, *names)
        sent[step] = {
            n: bool(t.codec) for n, t in zip(names, fleet.tasks[-len(names) :], strict=True)
        }

    assert sent[0] == {"a": True, "bb": True}
    assert not any(any(sent[step].values()) for step in range(1, 9))
    assert sent[9] == {"a": False, "bb": False, "late": True}
    assert not any(sent[10].values())
    assert len({task.codec_id for task in fleet.tasks}) == 11  # a new one with every round

    again = fleet.exchange()
    again.restore(exchange.state())
    fleet.round(again, 11, "a", "late")
    assert not any(task.codec for task in fleet.tasks[-2:])
    fleet.codecs["a"] = Compressor.deadzone(exchange.codec.layout)  # it lost what it held
    with pytest.raises(CodecError, match="ask for it"):
        fleet.round(again, 12, "a")


def test_a_lost_answer_or_a_round_taken_back_costs_a_codec_at_most() -> None:
    fleet = Fleet("a", "bb")
    exchange = fleet.exchange()
    fleet.round(exchange, 0, "a", "bb")
    fleet.answer("a", exchange.start(1, "base", HOW)("a"))  # its answer is lost
    fleet.round(exchange, 1, "bb")
    fleet.round(exchange, 2, "a", "bb")  # both differences come, of which it followed one
    assert not fleet.tasks[-2].codec
    assert len(fleet.tasks[-2].deltas) == 2

    before = exchange.state()
    fleet.round(exchange, 3, "a", "bb")
    exchange.roll_back(before)
    fleet.round(exchange, 4, "a", "bb")
    assert fleet.codecs["a"].codec_id == exchange.codec.codec_id


def test_a_codec_that_fell_back_for_most_of_a_round_has_aged() -> None:
    fleet = Fleet("a", "bb", "ccc", down_ratio=0.0)
    exchange = fleet.exchange()
    rng = np.random.default_rng(0)
    noise = [
        {k: rng.normal(size=s).astype(np.float32) for k, s in LAYOUT.items()} for _ in range(3)
    ]
    exchange.use_codec(Compressor.fit(noise, layout=exchange.codec.layout, width=1))
    aged = exchange.codec.codec_id
    exchange.fallbacks[aged] = (9, 0)  # it served for three rounds
    assert not exchange.wants_codec

    fleet.round(exchange, 0, "a", "bb", "ccc")

    assert exchange.fallbacks[aged] == (12, 3)  # one direction of 64 cannot hold such a change
    assert exchange.aged
    assert exchange.wants_codec
    again = fleet.exchange()
    again.restore(exchange.state())
    assert again.aged
    (note,) = learn(exchange, [fleet.began["a"]])
    assert isinstance(note, Note)
    assert note.values["codec"] == "refreshed"
    assert (note.values["aged"], note.values["new"]) == (aged, exchange.codec.codec_id)
    assert (note.values["updates"], note.values["fallbacks"]) == (12, 3)
    assert not exchange.wants_codec
    assert exchange.codec.codec_id != aged


def test_an_adapter_update_is_below_one_percent_of_the_shipped_model(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Whole messages, at the default settings, against the files of examples/models: the task of a
    device that got no release, and offer and task of one that did."""
    folder = Path(__file__).parent.parent / "examples/models/slm-a"
    shape = json.loads((folder / "config.json").read_text())
    wide, inner = shape["hidden_size"], shape["intermediate_size"]
    sizes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (wide, wide))
    sizes |= {"gate_proj": (inner, wide), "up_proj": (inner, wide), "down_proj": (wide, inner)}
    adapter = AdapterSection()
    layout = {}
    for layer in range(shape["num_hidden_layers"]):
        for name, (out, width) in sizes.items():
            layout[f"model.layers.{layer}.{name}.lora_A"] = (adapter.rank, width)
            layout[f"model.layers.{layer}.{name}.lora_B"] = (out, adapter.rank)
    spec = LoraSpec(adapter.rank, adapter.alpha, tuple(sizes))
    exchange = AdapterExchange(
        "slm", layout, spec, seed=1, down_ratio=adapter.down_ratio, about=lambda *_: NEW
    )
    exchange.start(0, "base", HOW)
    rng = np.random.default_rng(0)
    moved = {k: v + rng.normal(0, 0.01, v.shape) for k, v in exchange.factors.items()}
    exchange.set_global({k: v.astype(np.float32) for k, v in moved.items()})

    metadata = releases(tmp_path).metadata()
    release = Release("slm", "a1", ("slm/a1/symbiont.json", "slm/a1/x.onnx_adapter"), metadata)

    offer = len(encode(packed(release.offer(source=exchange.source("a")))))
    exchange.released("a")
    tasks = exchange.start(1, "base", HOW)

    short, without_codec = (
        len(encode(msgspec.structs.replace(tasks(name), codec=b""))) for name in ("a", "b")
    )
    model = sum(file.stat().st_size for file in folder.iterdir() if file.suffix != ".md")
    whole = 2 * sum(a * b for a, b in layout.values())
    told = f"update {without_codec}, offer {offer} and update {short}"
    record_property("bytes", f"{told}, whole adapter {whole}, model {model}")
    assert set(adapter.targets) == set(sizes)
    assert without_codec < 0.01 * model
    assert offer + short < 0.01 * model
    assert whole > 0.05 * model


def test_a_codec_that_never_was_better_is_dropped_for_good() -> None:
    fleet = Fleet("a", "bb", down_ratio=0.0)
    exchange = fleet.exchange()
    plain = exchange.codec
    rng = np.random.default_rng(0)
    noise = [{k: rng.normal(size=s).astype(np.float32) for k, s in LAYOUT.items()}]
    exchange.use_codec(Compressor.fit(noise, layout=plain.layout, width=1))
    fleet.round(exchange, 0, "a", "bb")

    (note,) = learn(exchange, [fleet.began["a"]])

    assert isinstance(note, Note)
    assert note.values["codec"] == "dropped"
    assert exchange.codec.codec_id == plain.codec_id
    fleet.round(exchange, 1, "a", "bb")
    assert not exchange.wants_codec
