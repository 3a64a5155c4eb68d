"""The Flower mod in a real federation: one SuperLink, two SuperNodes, `flwr run`, as processes.

Flower pins older releases of libraries that the development environment has, so it gets one of its
own beside it, made on first use.
"""

import os
import re
import socket
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOWER = "flwr==1.41.0"
ENVIRONMENT = ROOT / ".venv-flower"
NODES = 2


@pytest.fixture(scope="module")
def flower() -> Path:
    """The folder of Flower's commands."""
    ready = ENVIRONMENT / FLOWER
    if not ready.exists():
        venv.create(ENVIRONMENT, clear=True, with_pip=True)
        pip = [ENVIRONMENT / "bin" / "python", "-m", "pip", "install", "-q", FLOWER]
        subprocess.run([*pip, "safetensors", "constriction", "numpy"], check=True)
        ready.touch()
    return ENVIRONMENT / "bin"


@contextmanager
def process(arguments: list[object], env: dict[str, str], *, until: str) -> Iterator[None]:
    """Run a server; it is ready once it has said `until`."""
    with subprocess.Popen(
        [str(part) for part in arguments],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as server:  # fmt: skip
        said = []
        try:
            assert server.stdout is not None
            for line in server.stdout:
                said.append(line)
                if until in line:
                    break
            else:
                pytest.fail(f"{arguments[0]} ended: {''.join(said)}")
            # Its later lines must not fill the pipe.
            drain = subprocess.Popen([sys.executable, "-c", DRAIN], stdin=server.stdout)
            yield
        finally:
            server.terminate()
            server.wait(20)
            drain.wait(20)


DRAIN = "import sys\nfor _ in sys.stdin: pass"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_two_supernodes_learn_with_a_fiftieth_of_the_bytes(flower: Path, tmp_path: Path) -> None:
    port = free_port()
    here = f"127.0.0.1:{port}"
    (tmp_path / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{here}"\ninsecure = true\n'
    )
    env = os.environ | {
        "FLWR_HOME": str(tmp_path),
        "FLWR_TELEMETRY_ENABLED": "0",
        "PATH": f"{flower}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    with ExitStack() as running:
        link = [flower / "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", port]
        running.enter_context(process(link, env, until="Uvicorn running"))
        for _ in range(NODES):
            node = [flower / "flower-supernode", "--insecure", "--superlink", here]
            node += ["--host", "127.0.0.1", "--port", free_port()]
            running.enter_context(process(node, env, until="Starting Flower SuperExec"))

        app = ROOT / "examples" / "flower_app"
        done = subprocess.run(
            [str(flower / "flwr"), "run", str(app), "here", "--stream"],
            env=env, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    found = re.search(r"error 1\.00 -> (0\.\d\d), (\d+) times fewer bytes up", done.stdout)
    assert found is not None, done.stdout + done.stderr
    assert float(found[1]) < 0.4  # 0.31 is usual
    assert int(found[2]) >= 49
