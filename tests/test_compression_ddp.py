"""The communication hook between two real gloo processes."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from compression.ddp import CodedGradients, coded_allreduce
from compression.errors import CodecError

ROOT = Path(__file__).resolve().parent.parent
STEPS = 40


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.LayerNorm(64), nn.Linear(64, 4))


def train(rank: int, port: int, ratio: float | None, folder: str) -> None:
    """One rank: its half of the data; ratio None is DDP without the hook."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    module = net()
    # Two buckets, so that buckets dealt anew after the first step are met too.
    model = DistributedDataParallel(module, bucket_cap_mb=0.005)
    state = CodedGradients(module, ratio=ratio or 0)
    if ratio is not None:
        model.register_comm_hook(state, coded_allreduce)
    rows = torch.Generator().manual_seed(7)
    x, y = torch.randn(128, 32, generator=rows), torch.arange(128) % 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    mine = slice(64 * rank, 64 * rank + 64)
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(model(x[mine]), y[mine])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        whole = nn.functional.cross_entropy(module(x), y)
    torch.save(
        {
            "weights": {k: v.clone() for k, v in module.state_dict().items()},
            "loss": float(whole),
            "sent": state.bytes_sent,
            "plain": state.bytes_plain,
        },
        f"{folder}/{ratio}-{rank}.pt",
    )
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ddp"))
    for ratio in (None, 0, 20.0):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.spawn(train, args=(port, ratio, folder), nprocs=2)
    return {
        (ratio, rank): torch.load(f"{folder}/{ratio}-{rank}.pt", weights_only=True)
        for ratio in (None, 0, 20.0)
        for rank in (0, 1)
    }


def test_ranks_stay_equal_bit_for_bit(runs) -> None:
    for ratio in (0, 20.0):
        first, second = runs[ratio, 0]["weights"], runs[ratio, 1]["weights"]
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_uncoded_gradients_are_those_of_plain_ddp(runs) -> None:
    plain, hook = runs[None, 0]["weights"], runs[0, 0]["weights"]
    assert all(torch.allclose(plain[name], hook[name], atol=1e-5) for name in plain)
    assert runs[0, 0]["sent"] >= runs[0, 0]["plain"]


def test_a_twentieth_of_the_bytes_learns_nearly_as_much(runs) -> None:
    start = float(torch.log(torch.tensor(4.0)))
    plain, coded = runs[None, 0]["loss"], runs[20.0, 0]["loss"]
    assert plain < 0.6 * start
    assert start - coded > 0.7 * (start - plain)
    assert runs[20.0, 0]["plain"] / runs[20.0, 0]["sent"] > 10  # small buckets have a least size


def test_what_is_sent_and_owed_adds_up_to_the_gradients() -> None:
    module, rng = net(), torch.Generator().manual_seed(1)
    state = CodedGradients(module, ratio=30)
    parameters = list(module.parameters())
    names = state.names_of(parameters)
    codec = state.codec_for(names, [p.shape for p in parameters])
    given = [torch.zeros_like(p) for p in parameters]
    received = [torch.zeros_like(p) for p in parameters]

    for _ in range(10):
        grads = [torch.randn(p.shape, generator=rng) for p in parameters]
        decoded = codec.decode(state.encode(names, grads))
        for i, name in enumerate(names):
            given[i] += grads[i]
            received[i] += torch.from_numpy(decoded[name])

    for i, name in enumerate(names):
        assert torch.allclose(received[i] + state._owed[name], given[i], atol=1e-4)


def test_a_parameter_of_another_module_is_refused() -> None:
    with pytest.raises(CodecError, match="another module"):
        CodedGradients(net()).names_of(list(net().parameters()))


def test_the_example_runs_as_it_says() -> None:
    done = subprocess.run(
        [sys.executable, "examples/ddp_hook.py"], cwd=ROOT, capture_output=True, text=True,
        timeout=120, check=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.search(r"loss 2\.33 -> (0\.\d\d), (\d+) times fewer bytes", done.stdout)
    assert found is not None, done.stdout
    assert float(found[1]) < 0.1
    assert int(found[2]) >= 45
