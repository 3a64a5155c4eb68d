"""A whole device as a process of its own, for F8: started with a clock that lies.

Knows the agent. Does not know how its clock is bent; f8_clocks.py does that from outside.

    python -m tests.torture.skewed_device STATE_DIR BROKER USER PASSWORD_FILE CODE_FILE

Prints its events as JSON lines and ends when its standard input closes.
"""

import json
import sys
import time
from pathlib import Path

from edge_sdk.agent import EdgeDevice
from edge_sdk.collect import Example
from edge_sdk.config import EdgeConfig
from edge_sdk.errors import EnrolmentError
from edge_sdk.wire.config_rules import parse_toml


def main() -> int:
    """Enrol, work until standard input closes, and say what happened."""
    state, broker, user, password, code = sys.argv[1:6]
    overrides = {
        "device.state_dir": state,
        "link.broker": broker,
        "link.username": user,
        "link.password_file": password,
        "train.threads": 1,
    }
    config = parse_toml("", EdgeConfig, "f8", overrides=overrides)
    tell({"event": "clock", "year": time.gmtime(time.time()).tm_year})
    with EdgeDevice(config, on_event=tell) as device:
        words = [
            (" ".join([label, "request", str(i)]), label)
            for i in range(6)
            for label in ("open", "list", "name")
        ]
        device.add_examples([Example(text, label) for text, label in words])
        try:
            device.enrol(Path(code).read_text(), timeout_s=30.0)
        except EnrolmentError as exc:
            tell({"event": "not_enrolled", "reason": str(exc)})
            return 0
        device.renew_keys()
        device.run_in_background()
        sys.stdin.read()
        tell({"event": "status", "parked": device.status()["parked"]})
    return 0


def tell(event: dict[str, object]) -> None:
    """Print one line at once."""
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    sys.exit(main())
