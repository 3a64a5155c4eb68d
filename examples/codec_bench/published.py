"""CG-FedLLM's autoencoder as published, in a run: recorded rounds, one training, then latents.

Knows the baseline's network and what its use costs. Does not know how it is built.

The paper pre-trains on gradients of the first rounds (TGAP). Somebody has to have sent those, so
they are charged as float32; the trained network is sent to every device, encoder and decoder, for
error feedback needs a device's own decoding. The paper names no number of rounds or steps: four
rounds of eight clients, and steps that a processor can take in a benchmark.
"""

import numpy as np

from compression.baselines.resnet3 import PublishedAutoencoder
from examples.codec_bench.sessions import F32, Plan, Update, flat, named

RECORDED_ROUNDS = 4
STEPS = 150
IMAGES_OF_VALUES = 2**20
"""A step sees about this many values: eight images of a small adapter, one of a large one."""


class Published:
    """The ResNet-3 autoencoder with error feedback."""

    feedback, ahead = True, False

    def __init__(self, plan: Plan) -> None:
        self.codec_bytes = 0
        self._plan = plan
        self._network = PublishedAutoencoder(seed=plan.seed)
        self._recorded: list[F32] = []
        self._owed = [np.zeros(plan.size, np.float32) for _ in range(plan.clients)]
        self._rng = np.random.default_rng(plan.seed)

    def encode(self, client: int, round_: int, update: Update) -> tuple[Update, bytes]:
        """As `Session.encode`."""
        values = flat(update, self._plan)
        if round_ < RECORDED_ROUNDS:
            self._recorded.append(values)
            return update, values.tobytes()
        wanted = values + self._owed[client]
        data = self._network.encode(wanted, self._rng)
        decoded = self._network.decode(data, self._plan.size)
        self._owed[client] = wanted - decoded
        return named(decoded, self._plan), data

    def decode(self, client: int, round_: int, data: bytes) -> Update:
        """As `Session.decode`."""
        if round_ < RECORDED_ROUNDS:
            return named(np.frombuffer(data, np.float32), self._plan)
        return named(self._network.decode(data, self._plan.size), self._plan)

    def end_round(self, mean: Update) -> None:
        """After the recorded rounds, train and send the network."""
        if self.codec_bytes or len(self._recorded) < RECORDED_ROUNDS * self._plan.clients:
            return
        batch = max(1, min(8, IMAGES_OF_VALUES // self._plan.size))
        self._network.train(self._recorded, steps=STEPS, batch=batch, seed=self._plan.seed)
        self._recorded, self.codec_bytes = [], self._network.bytes_of_network
