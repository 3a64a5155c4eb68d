"""P7: key files are private, and nothing logged holds a key, a password or an enrolment secret.

Knows which tests bring keys and logs about. Does not know how logs are searched: that is
`tests/key_scan.py`, in every session of pytest. This figure runs the part of the suite where
secrets are handled and reports what was searched.
"""

import stat
from pathlib import Path

from tests.torture.result import Result, Scale, say
from tests.torture.watched import run_watched

SHORT = ("test_store_keys.py", "test_link_keys.py", "test_wire_enrolment.py")
FULL = (
    *SHORT,
    "test_wire_seal.py",
    "test_wire_session.py",
    "test_link_broker.py",
    "test_link_courier.py",
    "test_link_courier_broker.py",
    "test_edge_cli.py",
    "test_edge_config.py",
    "test_edge_device.py",
    "test_coordinator_fleet.py",
    "test_coordinator_commands.py",
    "test_coordinator_service.py",
    "test_coordinator_runner.py",
    "test_exporters_publisher.py",
    "test_store_keyring.py",
    "test_device_keys.py",
)
LIMIT_S = 900.0


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Run the tests, then count hits and key files that others may read."""
    tests = FULL if scale is Scale.FULL else SHORT
    say("P7", f"running {len(tests)} test files under the key scan")
    seen = run_watched(tests, folder, limit_s=LIMIT_S)
    keys = [path for path in (folder / "tmp").rglob("*") if path.is_file() and _holds_key(path)]
    # Tests that open a file to others on purpose do so in a folder of that name.
    loose = [
        path
        for path in keys
        if stat.S_IMODE(path.stat().st_mode) & 0o077 and "a_file_that_others" not in str(path)
    ]
    searched = seen["secrets"] > 0 and seen["scanned bytes"] > 0
    hits = len(seen["hits"])
    return Result(
        "P7",
        "keys at rest and in logs",
        hits,
        f"hits of {seen['secrets']} secrets",
        "0600, 0 hits of any private key in all logs",
        hits == 0 and not loose and searched,
        notes={
            "what was found": seen["hits"],
            "log lines": seen["log lines"],
            "scanned bytes": seen["scanned bytes"],
            "key files": len(keys),
            "key files others may read": [path.name for path in loose],
            "test files": seen["test files"],
            "tests": seen["tests"],
        },
    )


def _holds_key(path: Path) -> bool:
    """Whether the product wrote a private key there; raw bytes that tests write are theirs."""
    with path.open("rb") as file:
        head = file.read(64)
    return head.startswith((b"symbiont-identity-", b"-----BEGIN PRIVATE", b"-----BEGIN EC PRIV"))
