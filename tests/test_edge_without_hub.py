"""A device needs no client of a model hub: `tokenizers` asks for one, and nothing imports it."""

import subprocess
import sys
from pathlib import Path

from exporters.slm import SlmOptions, export_slm
from tests.exporters_tiny import save_tiny

HUB = (
    *("huggingface_hub", "hf_xet", "httpx2", "httpcore2", "fsspec", "filelock", "yaml", "tqdm"),
    *("click", "anyio", "truststore", "h11", "idna"),
)
"""What pip installs with huggingface-hub, and what may be uninstalled from a device."""

SCRIPT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from edge_sdk import SlmSession

with SlmSession({bundle!r}) as session:
    session.generate("one two", max_tokens=4)
print("answered")
"""


def test_a_session_answers_where_the_hubs_packages_are_absent(tmp_path: Path) -> None:
    save_tiny(tmp_path / "hf")
    options = SlmOptions(accuracy_level=1, compensate=False)
    export_slm(tmp_path / "hf", tmp_path / "out", family="t", release="r", options=options)

    script = SCRIPT.format(names=HUB, bundle=str(tmp_path / "out"))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )

    assert done.stdout.endswith("answered\n"), done.stderr
