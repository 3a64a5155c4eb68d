"""A coordinator with two devices as one process, to be killed: prints every event, runs a sum.

Usage: python coordinator_process.py FOLDER ROUNDS. All stores are in FOLDER, so the next process
goes on where this one was killed.
"""

import sys
from pathlib import Path

from coordinator_world import Coordinator, FakeDevice, train, update

from coordinator.programs import Ask, Commit, Program, ProgramFactory
from edge_sdk.link.memory import MemoryBroker
from edge_sdk.wire.messages import AnyMessage, Enrol, TrainAdapter
from edge_sdk.wire.seal import Identity

DEVICES = ("a", "b")


def value(device: str, round_: int) -> int:
    """What one update adds to the sum; no two sets of updates have the same one."""
    return 1 << (2 * round_ + DEVICES.index(device))


def summing(rounds: int) -> ProgramFactory:
    def build(resume: Commit | None) -> Program:
        total = 0 if resume is None else int(resume.state["total"])
        for step in range(0 if resume is None else resume.step + 1, rounds):
            replies = yield Ask(train(step), DEVICES, need=2, within_s=30.0)
            total += sum(reply.message.examples for reply in replies)
            yield Commit(step, {"total": str(total).encode()})

    return build


def kept_identity(path: Path) -> Identity:
    if not path.exists():
        path.with_suffix(".new").write_bytes(Identity.generate().to_bytes())
        path.with_suffix(".new").rename(path)
    return Identity.from_bytes(path.read_bytes())


def main(folder: Path, rounds: int) -> None:
    folder.mkdir(exist_ok=True)
    kept_identity(folder / "key")
    broker = MemoryBroker()
    coordinator = Coordinator(folder, broker)
    coordinator.events._stream = sys.stdout
    devices = []
    for name in DEVICES:
        identity = kept_identity(folder / f"{name}.key")

        def behave(message: AnyMessage, name: str = name) -> list[AnyMessage]:
            if not isinstance(message, TrainAdapter):
                return []
            return [update(message, examples=value(name, message.round))]

        devices.append(FakeDevice(name, folder, broker, coordinator.identity, identity, behave))
        if coordinator.fleet.get(name) is None:
            code = coordinator.fleet.token(name, root_key_hash=bytes(32))
            public = identity.public
            wish = Enrol(code.token_id, code.secret, name, public.sign, public.receive, (), 1)
            coordinator.fleet.admit(wish, public)
    coordinator.start()
    coordinator.runner.run(summing(rounds), run="sum")
    for device in devices:
        device.close()
    coordinator.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
