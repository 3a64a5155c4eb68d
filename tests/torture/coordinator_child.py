"""The light coordinator as a process, to be killed.

Usage: python -m tests.torture.coordinator_child FOLDER HISTORY URL MQTT_VERSION NEED DEVICE...

Knows its standard streams: it prints `resumed N` and `committed N` as they happen, `finished` when
the program ended. The line `finish` on standard input ends the program two steps later; the end of
standard input ends the process, after the account of its store is in the history.
"""

import sys
import threading
from pathlib import Path

from edge_sdk.link.mqtt import MqttLink
from tests.torture.history import History
from tests.torture.parties import RUN, Headquarters, counting

LAST_STEPS = 2
WITHIN_S = 60.0


def main(folder: Path, history: Path, url: str, version: str, need: int, *names: str) -> None:
    """Run until standard input ends."""
    link = MqttLink(
        url,
        first_retry_s=0.02,
        last_retry_s=0.2,
        mqtt_version="3.1.1" if version == "3.1.1" else "5",
    )
    headquarters = Headquarters(folder, link, names)
    record = History(history / "coordinator.jsonl")
    ending = threading.Event()
    ended = threading.Event()
    last: list[int] = []

    def over(step: int) -> bool:
        if ending.is_set() and not last:
            last.append(step + LAST_STEPS)
        return bool(last) and step >= last[0]

    def listen() -> None:
        for line in sys.stdin:
            if line.strip() == "finish":
                ending.set()
        ending.set()
        ended.set()

    threading.Thread(target=listen, daemon=True).start()
    headquarters.start()
    program = counting(names, record, need=need, within_s=WITHIN_S, over=over, told=_tell)
    headquarters.runner.run(program, run=RUN)
    headquarters.wait_until_delivered(WITHIN_S)
    _tell("finished")
    ended.wait()
    headquarters.account(record)
    headquarters.close()


def _tell(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        sys.argv[3],
        sys.argv[4],
        int(sys.argv[5]),
        *sys.argv[6:],
    )
