"""edge: what the SDK costs a device before it does anything."""

import re
import subprocess
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest

IMPORT_MS, RESIDENT_MB, INFER_MB = 100, 40, 200
TRIES = 7
"""Fresh processes: the quickest counts, since others use the machine too."""

CODE = """
import time
started = time.perf_counter()
import edge_sdk
took = time.perf_counter() - started
lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(took * 1e3, int(lines["VmHWM"].split()[0]) / 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's counters")
def test_importing_the_sdk_is_quick_and_small() -> None:
    found = []
    for _ in range(TRIES):
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append([float(value) for value in done.stdout.split()])

    assert min(took for took, _ in found) < IMPORT_MS
    assert max(most for _, most in found) < RESIDENT_MB


def test_the_infer_extra_is_small() -> None:
    """What it adds to the core; numpy and cryptography are the core's."""
    core = _closure("symbiont", set())
    added = {
        name: _size(found)
        for name, found in _closure("symbiont", {"infer"}).items()
        if name not in core
    }

    assert {"numpy", "cryptography"} <= core.keys()
    assert {"onnxruntime", "onnxruntime-genai", "tokenizers"} <= added.keys()
    assert not {"torch", "transformers", "onnx"} & added.keys()
    assert sum(added.values()) / 2**20 < INFER_MB, sorted(added.items(), key=lambda it: -it[1])


def _closure(name: str, extras: set[str]) -> dict[str, Distribution]:
    """Every installed distribution that `name` needs with `extras`, itself left out."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: dict[str, Distribution] = {}
    todo, seen = [(name, frozenset(extras))], set()
    while todo:
        here, wanted = todo.pop()
        if (here, wanted) in seen:
            continue
        seen.add((here, wanted))
        installed = distribution(here)
        if here != name:
            found[here] = installed
        for line in installed.requires or ():
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in wanted | {""}):
                todo.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


def _size(installed: Distribution) -> int:
    """Bytes of the files that its wheel brought; compiled Python is made later, where wanted."""
    files = [file for file in installed.files or () if not re.search(r"\.pyc$", str(file))]
    paths = [Path(str(installed.locate_file(file))) for file in files]
    return sum(path.stat().st_size for path in paths if path.is_file())
