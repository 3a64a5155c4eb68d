"""What is looked at before a bundle is loaded, and that a session needs no network."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edge_sdk.errors import DigestError, RuntimeFailure
from edge_sdk.runtime import SlmSession
from edge_sdk.trial import Held, child_probe
from tests.edge_world import releases

ROOT = Path(__file__).resolve().parent.parent
EVERYTHING = """
import sys
from edge_sdk import SlmSession
with SlmSession(sys.argv[1]) as session:
    session.load_adapter("a", sys.argv[2])
    session.generate("Request: hello", max_tokens=3, adapter="a", temperature=1.0)
    session.generate_many(["a", "b c"], max_tokens=3)
    session.generate("x", max_tokens=30, schema={"enum": ["yes", "no"]})
    "".join(session.conversation("be brief").say("hello", max_tokens=3))
    session.classify("hello")
print("answered")
"""
# No process may open a socket once this has run; a process that tries dies at once of SIGSYS.
WITHOUT_SOCKETS = """
import ctypes, platform, struct
socket_call = {"x86_64": 41, "aarch64": 198}[platform.machine()]
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, socket_call), (6, 0, 0, 0x80000000), (6, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return releases(tmp_path_factory.mktemp("files")).folder / "targets" / "tiny"


@pytest.fixture
def bundle(folder: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(folder / "r1", tmp_path / "bundle"))


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json"])
def test_a_byte_changed_on_disk_is_found_before_anything_is_loaded(name: str, bundle: Path) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)

    with pytest.raises(DigestError, match=rf"{name} was altered .* install the bundle anew"):
        SlmSession(bundle)


def test_a_file_gone_or_added_is_found(bundle: Path) -> None:
    (bundle / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(DigestError, match=r"chat_template\.jinja is no part of the bundle"):
        SlmSession(bundle)
    (bundle / "chat_template.jinja").unlink()
    (bundle / "weights.json").unlink()
    with pytest.raises(DigestError, match=r"weights\.json cannot be read"):
        SlmSession(bundle)


def test_the_check_can_be_left_to_who_has_made_it(bundle: Path) -> None:
    path = bundle / "weights.json"
    path.write_text(path.read_text() + " ")

    with SlmSession(bundle, check=False) as session:
        assert session.release == "r1"


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "symbiont.json").write_text("{"),
        lambda folder: (folder / "genai_config.json").write_text('{"model": {}}'),
        lambda folder: (folder / "genai_config.json").write_text("[" * 9000),
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        lambda folder: (folder / "answer.onnx").write_bytes(b"\x08"),
        lambda folder: (folder / "tokenizer_config.json").write_text("nothing"),
    ],
)
def test_a_damaged_bundle_is_refused_in_one_sentence(damage: object, bundle: Path) -> None:
    damage(bundle)  # type: ignore[operator]

    with pytest.raises(RuntimeFailure, match=r"bundle.*cannot be (loaded|read)"):
        SlmSession(bundle, check=False)


@pytest.mark.parametrize("name", ["answer.onnx", "answer_adapted.onnx", "model.onnx"])
def test_a_trial_opens_every_graph_that_a_request_might_need_later(name: str, bundle: Path) -> None:
    held = Held(family="tiny", release="r1", bundle=str(bundle))
    child_probe(timeout_s=60)(held)
    (bundle / name).write_bytes(b"\x08")

    with pytest.raises(RuntimeFailure, match="failed its trial"):
        child_probe(timeout_s=60)(held)


def test_a_ceiling_of_memory_says_what_would_fit(bundle: Path) -> None:
    """40 MiB, twice the files, and 512 bytes a token: 2 layers, key and value, 32 wide, 32 bit."""
    files = sum(path.stat().st_size for path in bundle.iterdir())
    fixed = 40 + (2 * files + 128 * 320 * 4) / 2**20
    path = bundle / "genai_config.json"
    settings = json.loads(path.read_text())
    settings["model"]["context_length"] = 2**20
    path.write_text(json.dumps(settings))

    with pytest.raises(
        RuntimeFailure, match=rf"needs about {fixed + 512:.0f} MiB .*context=131072"
    ):
        SlmSession(bundle, memory_mb=fixed + 64, check=False)
    with pytest.raises(RuntimeFailure, match="allowed: 10; raise memory_mb or choose a smaller"):
        SlmSession(bundle, memory_mb=10, check=False)
    with SlmSession(bundle, memory_mb=fixed + 64, context=128, check=False) as session:
        assert session.generate("x", max_tokens=2) is not None


def test_a_lower_context_is_kept_to(bundle: Path) -> None:
    for context in (1, 129):
        with pytest.raises(RuntimeFailure, match=f"context is {context}; .* allows 2 to 128"):
            SlmSession(bundle, context=context)
    with SlmSession(bundle, context=20) as session:
        answer = session.stream("x" * 15, max_tokens=50)
        assert "".join(answer) == answer.text
        assert len(answer.tokens) == 5
        with pytest.raises(RuntimeFailure, match="20 tokens and the model's context is 20"):
            session.generate("x" * 20)


def run(code: str, folder: Path, *before: str) -> "subprocess.CompletedProcess[str]":
    adapter = folder / "a1" / "adapter.onnx_adapter"
    command = [*before, sys.executable, "-c", code, str(folder / "r1"), str(adapter)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's system calls are filtered")
def test_every_kind_of_answer_is_given_by_a_process_that_dies_if_it_opens_a_socket(
    folder: Path,
) -> None:
    done = run(WITHOUT_SOCKETS + EVERYTHING, folder)
    assert (done.returncode, done.stdout) == (0, "answered\n"), done.stderr

    control = run(WITHOUT_SOCKETS + "import socket; socket.socket(); print('open')", folder)
    assert (control.returncode, control.stdout) == (-signal.SIGSYS, "")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's namespaces are used")
def test_every_kind_of_answer_is_given_in_a_namespace_without_an_interface(folder: Path) -> None:
    """Where a user may not make namespaces, the test above is the proof, and this one says so."""
    alone = ["unshare", "--user", "--map-root-user", "--net"]
    try:
        allowed = subprocess.run([*alone, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("this system lets no user make a network namespace; sockets are tested above")
    show = "import socket; print([name for _, name in socket.if_nameindex()])\n"

    done = run(show + EVERYTHING, folder, *alone)

    # The loopback interface is there, and down: nothing can be reached, not even this machine.
    assert (done.returncode, done.stdout) == (0, "['lo']\nanswered\n"), done.stderr
