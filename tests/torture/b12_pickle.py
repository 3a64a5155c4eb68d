"""B12: nothing of ours reads a pickle, and nothing a peer sends is read without a limit.

Knows the calls that unpickle or execute, and the calls that read to the end. Does not know what the
files are. The static rules look at every module; the full form also runs the tests that use torch,
numpy and the exporters under the alarm of `tests/no_pickle.py`.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.torture.result import Result, Scale, say
from tests.torture.watched import ROOT, run_watched

PACKAGES = ("edge_sdk", "coordinator", "compression", "exporters", "examples")
NEVER_IMPORTED = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}
NEVER_IMPORTED |= {"marshal", "jsonpickle", "yaml"}
NEVER_CALLED = {"eval", "exec", "torch.hub.load", "numpy.fromfile", "np.fromfile"}

PEER_FACING = ("edge_sdk/wire", "edge_sdk/link", "edge_sdk/store", "coordinator")
"""Rooms where bytes of somebody else arrive: they name a limit for everything they read."""
READS_TO_THE_END = {"read", "readline", "readlines", "read_bytes", "read_text", "recv"}
OWN_FILES = {
    "edge_sdk/link/passwords.py": "the password file that this program wrote",
    "edge_sdk/link/broker.py": "the log and the answer of the broker it started",
    "edge_sdk/link/broker_files.py": "configuration, users and rules that this program wrote",
    "edge_sdk/link/certificate.py": "the certificate it wrote, 16 KiB at most when it came",
    "edge_sdk/link/amqtt_broker.py": "its own configuration",
    "coordinator/authority.py": "the tenant's own authority for broker certificates",
}
"""Modules of those rooms whose unlimited reads are of files nobody else writes."""
BOUNDED = {"body", "message", "self.body", "transfer.body()"}
"""Objects with a `read()` that ends at the size which was signed and checked on arrival."""

WITH_TORCH = (
    "test_compression_codec.py",
    "test_compression_cg_fedllm.py",
    "test_compression_int4.py",
    "test_train_lora.py",
    "test_train_trainer.py",
    "test_train_text_task.py",
    "test_coordinator_twin.py",
    "test_coordinator_aggregate.py",
    "test_edge_models.py",
    "test_edge_runtime.py",
    "test_exporters_slm.py",
    "test_exporters_adapter.py",
    "test_exporters_encoder.py",
)
LIMIT_S = 900.0


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Apply the rules, and in full also the alarm."""
    offences = [offence for path in sources() for offence in faults(path)]
    notes: dict[str, object] = {"modules": len(sources())}
    if scale is Scale.FULL:
        say("B12", f"running {len(WITH_TORCH)} test files under the alarm")
        seen = run_watched(WITH_TORCH, folder, limit_s=LIMIT_S)
        offences += seen["pickles"]
        notes |= {"test files": seen["test files"], "tests": seen["tests"]}
    return Result(
        "B12",
        "no pickle, no unbounded read",
        len(offences),
        "offences",
        "0",
        not offences,
        notes=notes | {"offences": offences},
    )


def sources() -> list[Path]:
    """Return every module of ours."""
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def faults(path: Path) -> Iterator[str]:
    """Yield what a module does that the rules forbid."""
    name = path.relative_to(ROOT).as_posix()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (f"{name}:{node.lineno} imports {bad}" for bad in _imported(node))
        elif isinstance(node, ast.Call):
            fault = _call(node) or (_unbounded(node) if _peer_facing(name) else "")
            if fault:
                yield f"{name}:{node.lineno} {fault}"


def _imported(node: ast.Import | ast.ImportFrom) -> set[str]:
    if isinstance(node, ast.Import):
        roots = {alias.name.split(".")[0] for alias in node.names}
    else:
        roots = {(node.module or "").split(".")[0]}
    return roots & NEVER_IMPORTED


def _call(node: ast.Call) -> str:
    called = ast.unparse(node.func)
    options = {word.arg: ast.unparse(word.value) for word in node.keywords}
    if called in NEVER_CALLED:
        return f"calls {called}"
    if called == "torch.load" and options.get("weights_only") != "True":
        return "calls torch.load without weights_only=True"
    if called in ("np.load", "numpy.load") and options.get("allow_pickle") != "False":
        return f"calls {called} without allow_pickle=False"
    if options.get("allow_pickle") == "True" or options.get("trust_remote_code") == "True":
        return f"calls {called} with code from the file allowed"
    return ""


def _peer_facing(name: str) -> bool:
    return name.startswith(PEER_FACING) and name not in OWN_FILES


def _unbounded(node: ast.Call) -> str:
    if not isinstance(node.func, ast.Attribute) or node.func.attr not in READS_TO_THE_END:
        return ""
    text = node.func.attr in ("read_bytes", "read_text")
    if (node.args and not text) or ast.unparse(node.func.value) in BOUNDED:
        return ""
    return f"reads {ast.unparse(node.func)}() without a limit"
