"""Settings of a small coordinator for the tests of the whole service, and devices that serve it."""

import json
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from edge_sdk.agent import EdgeDevice
from edge_sdk.collect import Example
from edge_sdk.wire.messages import TextTask

SETTINGS = """
[service]
tenant = "home"
state_dir = "{folder}/cloud"
threads = 1
{service}
[program]
within_s = 60.0
{program}
[adapter]
rank = 2
alpha = 4.0
targets = ["q_proj"]
steps = 2
batch = 2
[llm]
path = "{folder}/llm"
rank = 2
alpha = 4.0
targets = ["q_proj"]
steps = 2
batch = 4
{more}
[task]
name = "{task.name}"
prompt = {prompt}
generation_prompt = {generation_prompt}
labels = {labels}
words = {words}
"""
FAMILY = """
[[families]]
name = "{name}"
path = "{folder}/{name}"
accuracy_level = 1
"""


def settings(
    folder: Path,
    program: str,
    *,
    families: Sequence[str],
    task: TextTask,
    service: str = "",
    more: str = "",
) -> str:
    """The text of a coordinator.toml whose models are in `folder`, the LLM's in "llm", a family's
    under its name. `program` and `service` are lines of those sections, `more` other sections."""
    named = "".join(FAMILY.format(name=name, folder=folder) for name in families)
    return SETTINGS.format(
        folder=folder,
        program=program,
        service=service,
        more=more + named,
        task=task,
        prompt=json.dumps(task.prompt),
        generation_prompt=json.dumps(task.generation_prompt),
        labels=json.dumps(task.labels),
        words=json.dumps(task.words),
    )


class Devices:
    """Real devices, stepped in turn by one thread from `start` to the end of the block.

    In turn, because loading models in two threads of one process is not safe in transformers.
    """

    def __init__(self) -> None:
        self.all: list[EdgeDevice] = []
        self._closing = False
        self._stepping = threading.Thread(target=self._step)

    def add(self, device: EdgeDevice, examples: Iterable[Example]) -> EdgeDevice:
        """Take in a device that is not enrolled yet."""
        self.all.append(device)
        device.add_examples(list(examples))
        return device

    def start(self) -> None:
        """Let the enrolled ones work from now on; later ones join in."""
        self._stepping.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and close every device."""
        self._closing = True
        if self._stepping.is_alive():
            self._stepping.join()
        for device in self.all:
            device.close()

    def _step(self) -> None:
        while not self._closing:
            for device in tuple(self.all):
                if device.membership is not None and device.membership.complete:
                    device.step(timeout_s=0.02)
