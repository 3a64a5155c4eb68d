"""A Flower app (least squares on each client's own rows) that sends a fiftieth of the bytes."""

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from compression.flower import CodedStrategy, coded_mod

TRUTH = np.outer(np.sin(np.arange(512)), np.cos(np.arange(64))).astype(np.float32)
client = ClientApp(mods=[coded_mod(ratio=50)])
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    (weights,) = message.content["arrays"].to_numpy_ndarrays()
    rng = np.random.default_rng(context.node_id % 2**32)
    for _ in range(20):
        x = rng.standard_normal((32, 512), dtype=np.float32)
        weights = weights - 0.01 / 32 * x.T @ (x @ (weights - TRUTH))
    arrays = ArrayRecord([weights])
    return Message(RecordDict({"arrays": arrays, "m": MetricRecord({"num-examples": 640})}),
                   reply_to=message)  # fmt: skip


@server.main()
def main(grid: Grid, context: Context) -> None:
    strategy = CodedStrategy(FedAvg(fraction_evaluate=0.0), ratio=50)
    start = ArrayRecord([np.zeros_like(TRUTH)])
    found = strategy.start(grid, start, num_rounds=int(context.run_config["rounds"])).arrays
    error = np.linalg.norm(found.to_numpy_ndarrays()[0] - TRUTH) / np.linalg.norm(TRUTH)
    fewer = strategy.bytes_plain / strategy.bytes_up
    print(f"error 1.00 -> {error:.2f}, {fewer:.0f} times fewer bytes up", flush=True)
