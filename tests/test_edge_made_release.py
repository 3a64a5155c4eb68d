"""A device makes a released adapter's files from a difference; what differs is fetched as ever."""

import hashlib
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
import pytest

from compression.downlink import Chain
from edge_sdk.collect import ExampleStore
from edge_sdk.handled import ADAPTERS, OFFER, RELEASED
from edge_sdk.model_tasks import ModelDesk
from edge_sdk.models import ModelStore
from edge_sdk.train.held import HeldAdapters
from edge_sdk.train.lora import Layout, start_factors, to_bytes
from edge_sdk.wire.messages import (
    AdapterDelta,
    AdapterSource,
    AnyMessage,
    File,
    ModelReport,
    OfferModel,
    WantFiles,
    decode,
    encode,
)
from exporters.bundle import read_manifest, write_adapter_release
from tests.edge_world import TASK, codec_for_rank_2, config, offer, order, releases

ROOT = Path(__file__).resolve().parent.parent
SHAPES = codec_for_rank_2().layout
LAYOUT: Layout = {n: (s[0], s[1]) for n, s in zip(SHAPES.names, SHAPES.shapes, strict=True)}
SEED = 1
FILES = ("tiny/m1/symbiont.json", "tiny/m1/adapter.onnx_adapter")


class World:
    """A device that runs r1, a chain two differences long, and its end published as m1."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.publisher = folder, releases(folder)
        chain, rng = Chain(start_factors(LAYOUT, SEED), ratio=4.0), np.random.default_rng(0)
        self.first = chain.digest
        for opened in (True, False):
            moved = {k: v + rng.normal(0, 0.05, v.shape) for k, v in chain.tensors.items()}
            chain.adopt({k: v.astype(np.float32) for k, v in moved.items()})
            if opened:
                chain.open()
                self.held = self.holding(chain)
                self.base = chain.digest
        self.chain = chain
        self.store = ModelStore(
            folder / "models", root=self.publisher.root(), probe=lambda _: None, device="d1"
        )
        self.memory: dict[str, bytes] = {}
        self.desk = ModelDesk(
            config(folder),
            task=TASK,
            examples=ExampleStore(folder / "examples"),
            models=self.store,
            recall=lambda name: self.memory.get(name, b""),
            tell=lambda _: None,
        )
        self.fetched(self.do(offer(self.publisher, "r1")))
        self.bundle = Path(self.store.current.bundle)  # type: ignore[union-attr]
        base = read_manifest(self.bundle)
        out = folder / "m1"
        write_adapter_release(out, base, chain.tensors, release="m1", rank=2, alpha=4.0)
        self.publisher.publish("tiny", "m1", out)

    @staticmethod
    def holding(chain: Chain) -> bytes:
        adapters = HeldAdapters()
        whole = order(digest=chain.digest, adapter=to_bytes(chain.tensors))
        adapters.begin(whole, LAYOUT)
        return adapters.to_bytes()

    def source(self, since: bytes, **changes: object) -> AdapterSource:
        links = self.chain.ahead(since)
        assert links is not None
        deltas = tuple(AdapterDelta(link.base, link.codes) for link in links)
        made = AdapterSource(self.chain.digest, deltas, SEED, 2, 4.0, ("q_proj",))
        return msgspec.structs.replace(made, **changes)

    def offer(self, source: AdapterSource | None) -> OfferModel:
        return msgspec.structs.replace(offer(self.publisher, "m1"), source=source)

    def do(self, message: OfferModel | File) -> tuple[AnyMessage, ...]:
        now = datetime.now(UTC)
        handle = self.desk.offer if isinstance(message, OfferModel) else self.desk.file
        handled = handle(message, now)  # type: ignore[operator]
        self.memory.update(handled.remember)
        return handled.replies

    def fetched(self, replies: tuple[AnyMessage, ...]) -> ModelReport:
        """Send what was asked for, until the device reports."""
        (want,) = replies
        assert isinstance(want, WantFiles)
        for path in want.paths:
            replies = self.do(File(want.task_id, path, self.publisher.read(path)))
        (report,) = replies
        assert isinstance(report, ModelReport)
        return report

    def close(self) -> None:
        self.desk.close()


@pytest.fixture
def world(tmp_path: Path):
    made = World(tmp_path)
    yield made
    made.close()


def test_it_makes_the_signed_files_from_the_adapter_it_trained_with(world: World) -> None:
    world.memory[ADAPTERS] = world.held

    (report,) = world.do(world.offer(world.source(world.base)))

    assert isinstance(report, ModelReport)
    assert report.release == "m1"
    assert "make" in report.seconds
    adapter = world.store.current.adapter_path  # type: ignore[union-attr]
    assert adapter is not None
    assert adapter.read_bytes() == world.publisher.read(FILES[1])
    assert world.memory[ADAPTERS] == world.held
    assert msgspec.msgpack.decode(world.memory[RELEASED], type=AdapterSource) == world.source(
        world.base
    )
    assert not list((world.folder / "models" / "bundles").glob(".new-*"))


def test_it_draws_the_first_adapter_from_the_seed(world: World) -> None:
    (report,) = world.do(world.offer(world.source(world.first)))

    assert isinstance(report, ModelReport)


def damaged(world: World) -> AdapterSource:
    good = world.source(world.base)
    (delta,) = good.deltas
    short = msgspec.structs.replace(delta, codes=delta.codes[:-2])
    return msgspec.structs.replace(good, deltas=(short,))


@pytest.mark.parametrize(
    ("source", "held"),
    [
        (None, True),
        (lambda w: w.source(w.base), False),
        (damaged, True),
        (lambda w: w.source(w.base, digest=bytes(32)), True),
        (lambda w: w.source(w.base, digest=w.base, deltas=()), True),  # a sound one, not this
        (lambda w: w.source(w.base, rank=1024), True),
        (lambda w: w.source(w.first, seed=SEED + 1), False),
        (lambda w: w.source(w.first, targets=("v_proj",)), False),
        (lambda w: w.source(w.base, alpha=8.0), True),
    ],
)
def test_what_it_cannot_make_it_fetches(world: World, source, held: bool) -> None:
    world.memory[ADAPTERS] = world.held if held else b"damaged"

    replies = world.do(world.offer(source(world) if source is not None else None))

    (want,) = replies
    assert isinstance(want, WantFiles)
    assert set(want.paths) == set(FILES)
    assert decode(world.memory[OFFER]) == world.offer(None)
    assert world.fetched(replies).release == "m1"


def test_without_a_range_coder_it_fetches(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.memory[ADAPTERS] = world.held
    monkeypatch.setitem(sys.modules, "edge_sdk.made_release", None)  # its import fails

    replies = world.do(world.offer(world.source(world.base)))

    assert world.fetched(replies).release == "m1"


def test_a_device_without_a_model_fetches_all(world: World, tmp_path: Path) -> None:
    store = ModelStore(
        tmp_path / "new", root=world.publisher.root(), probe=lambda _: None, device="d1"
    )
    desk = ModelDesk(
        config(tmp_path),
        task=TASK,
        examples=ExampleStore(tmp_path / "own"),
        models=store,
        recall=lambda _: b"",
        tell=lambda _: None,
    )

    handled = desk.offer(world.offer(world.source(world.first)), datetime.now(UTC))

    (want,) = handled.replies
    assert isinstance(want, WantFiles)
    assert set(want.paths) == set(FILES)


CHILD = """
import hashlib, sys
from pathlib import Path
from edge_sdk.made_release import make_release
from edge_sdk.wire.messages import decode
offer, held, bundle, out = map(Path, sys.argv[1:])
source = decode(offer.read_bytes()).source
make_release(source, "m1", bundle=bundle, held=held.read_bytes(), out=out)
assert not {"torch", "transformers", "peft"} & set(sys.modules)
for name in ("symbiont.json", "adapter.onnx_adapter"):
    print(hashlib.sha256((out / name).read_bytes()).hexdigest())
"""


def test_every_process_makes_the_same_bytes_and_none_needs_torch(world: World) -> None:
    (world.folder / "offer").write_bytes(encode(world.offer(world.source(world.base))))
    (world.folder / "held").write_bytes(world.held)
    signed = [hashlib.sha256(world.publisher.read(path)).hexdigest() for path in FILES]

    for hash_seed in ("1", "2"):
        out = world.folder / f"out-{hash_seed}"
        out.mkdir()
        places = [str(world.folder / "offer"), str(world.folder / "held"), str(world.bundle)]
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *places, str(out)],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        )
        assert done.stdout.split() == signed
