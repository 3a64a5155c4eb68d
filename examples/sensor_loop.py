"""A sensor loop: the model labels readings, a person corrects it, and it learns from that, here.

python -m examples.sensor_loop       # from a clone; the first run exports a small model

64 readings, 23 labelled right
40 readings, 40 labelled right
"""

import random
import tempfile
from pathlib import Path

from edge_sdk import Example, SlmSession
from edge_sdk.collect import ExampleStore
from edge_sdk.wire.messages import TextTask
from examples.ready import learn, ready

SIGNS = {"fine": "normal, flow some", "leak": "low, flow much", "blocked": "high, flow little"}
TASK = TextTask("pump", "{text}\nKind:", "{label}", tuple(SIGNS), (" good", " water", " stop"))


def watch(session: SlmSession, store: ExampleStore, rng: random.Random, count: int) -> None:
    right = 0
    for _ in range(count):
        truth = rng.choice(TASK.labels)  # your driver reads, your person knows
        text = f"Reading {len(store)}: pressure {SIGNS[truth]}"
        right += session.classify(text) == truth
        store.add([Example(text, truth)])
    print(f"{count} readings, {right} labelled right")


if __name__ == "__main__":
    work, bundle, rng = Path(tempfile.mkdtemp()), ready("slm-a"), random.Random(1)
    with SlmSession(bundle, task=TASK) as session:
        store = ExampleStore(work / "examples.db", held_out=0.0)  # stays on this machine
        watch(session, store, rng, 64)
        session.set_adapter(learn(bundle, TASK, store.training(), work / "new.onnx_adapter"))
        watch(session, store, rng, 40)
