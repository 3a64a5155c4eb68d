"""Two processes train one model with torch's DDP and send a fiftieth of the bytes.

    python examples/ddp_hook.py

Expected output, after about ten seconds:
    rank 0: loss 2.33 -> 0.04, 50 times fewer bytes
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from compression.ddp import CodedGradients, coded_allreduce


def work(rank: int, meeting: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    model = DistributedDataParallel(net)
    state = CodedGradients(net)  # new
    model.register_comm_hook(state, coded_allreduce)  # new
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = torch.randn(512, 64), torch.arange(512) % 10
    rows, losses = slice(rank * 256, rank * 256 + 256), []
    for _ in range(100):
        loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    if rank == 0:
        fewer = state.bytes_plain / state.bytes_sent
        print(f"rank 0: loss {losses[0]:.2f} -> {losses[-1]:.2f}, {fewer:.0f} times fewer bytes")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, args=(tempfile.mkdtemp() + "/meeting",), nprocs=2)
