"""Who may import whom (the table of CONTRIBUTING.md), and what a fresh interpreter loads."""

import ast
import io
import json
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Longest matching prefix wins. What a room may import of ours:
ALLOWED: dict[str, tuple[str, ...]] = {
    "coordinator": (
        "coordinator",
        "exporters",
        "compression",
        "edge_sdk.wire",
        "edge_sdk.link",
        "edge_sdk.store",
        "edge_sdk.train",
        "edge_sdk.algorithms",
        "edge_sdk.errors",
    ),
    "exporters": (
        "exporters",
        "compression",
        "edge_sdk.wire",
        "edge_sdk.adapter_file",
        "edge_sdk.errors",
    ),
    "edge_sdk.train": ("edge_sdk", "compression"),
    "edge_sdk.algorithms": ("edge_sdk", "compression"),
    "edge_sdk.wire": ("edge_sdk.wire", "edge_sdk.errors"),
    "edge_sdk.link": ("edge_sdk.link", "edge_sdk.wire", "edge_sdk.store", "edge_sdk.errors"),
    "edge_sdk.store": ("edge_sdk.store", "edge_sdk.wire", "edge_sdk.errors"),
    "edge_sdk": ("edge_sdk", "compression"),
    "compression": ("compression",),
    "examples": ("edge_sdk", "compression", "exporters", "coordinator", "examples"),
}
OURS = ("edge_sdk", "compression", "exporters", "coordinator", "examples", "tests")

FORBIDDEN_IN_WIRE = {"socket", "asyncio", "time", "numpy", "torch", "sqlite3", "threading"}
TORCH_LIKE = {"torch", "transformers", "peft"}
MAY_IMPORT_TORCH = (
    "edge_sdk.train",
    "edge_sdk.algorithms",
    "compression.int4_torch",
    "compression.int4_layers",
    "compression.eora_torch",
    "compression.cg_fedllm",
    "compression.ddp",
    "compression.baselines",
    "exporters",
    "coordinator",
    "examples",
)


def modules() -> list[tuple[str, Path]]:
    """Every module of ours as (dotted name, path)."""
    found = []
    for package in OURS[:-1]:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            found.append((".".join(parts), path))
    return found


def imports(path: Path) -> set[str]:
    """Every module that `path` imports anywhere, function bodies included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in prefixes)


def rule_for(module: str) -> tuple[str, ...]:
    return ALLOWED[max((p for p in ALLOWED if within(module, (p,))), key=len)]


@pytest.mark.parametrize(
    ("module", "path"), modules(), ids=lambda v: v if isinstance(v, str) else ""
)
def test_module_keeps_the_import_table(module: str, path: Path) -> None:
    allowed = rule_for(module)

    for target in imports(path):
        top = target.split(".")[0]
        if top in OURS:
            assert within(target, allowed), f"{module} may not import {target}"
        if within(module, ("edge_sdk.wire",)):
            assert top not in FORBIDDEN_IN_WIRE, f"{module} is pure and may not import {target}"
        if top in TORCH_LIKE:
            assert within(module, MAY_IMPORT_TORCH), f"{module} may not import {target}"


def test_wire_opens_no_file() -> None:
    for module, path in modules():
        if not within(module, ("edge_sdk.wire",)):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "open", f"{module} is pure and may not open files"


def test_no_pickle_anywhere() -> None:
    for module, path in modules():
        for target in imports(path):
            assert target.split(".")[0] not in {"pickle", "joblib", "dill", "cloudpickle"}, module


def test_only_the_seal_touches_aeads() -> None:
    for module, path in modules():
        for target in imports(path):
            if {"aead", "ciphers", "hpke", "fernet"} & set(target.lower().split(".")):
                assert module == "edge_sdk.wire.seal", f"{module} imports {target}"


TRUSTED = {  # module -> the tests that must cover every branch of it
    "edge_sdk/wire/seal.py": "test_wire_seal.py",
    "edge_sdk/wire/header.py": "test_wire_header.py",
    "edge_sdk/wire/replay.py": "test_wire_replay.py",
    "edge_sdk/store/keys.py": "test_store_keys.py",
}
ALSO_COVERED = {"edge_sdk/wire/identity.py"}
"""Keys' bytes and Ed25519 signatures; no encryption, so not part of the 400 lines."""
MAX_TRUSTED_LINES = 400


def code_lines(path: Path) -> int:
    """Physical lines without blank ones, comments, docstrings, imports and `__all__`."""
    text = path.read_text(encoding="utf-8")
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        docstring = (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        )
        names = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        if docstring or names or isinstance(node, ast.Import | ast.ImportFrom):
            left_out |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    empty = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in empty | {tokenize.ENDMARKER}:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - left_out)


def test_the_trusted_code_is_small() -> None:
    """The seal with the header codec, the replay window and the key store (PROTOCOL.md 1.3)."""
    sizes = {name: code_lines(ROOT / name) for name in TRUSTED}

    assert sum(sizes.values()) < MAX_TRUSTED_LINES, sizes


def test_every_branch_of_the_trusted_code_is_tested(tmp_path: Path) -> None:
    files = sorted(TRUSTED.keys() | ALSO_COVERED)
    data, report = tmp_path / "data", tmp_path / "report.json"
    coverage = [sys.executable, "-m", "coverage"]
    place = [f"--data-file={data}", "--include=" + ",".join(str(ROOT / name) for name in files)]
    tests = [f"tests/{name}" for name in TRUSTED.values()]
    skip = [
        "--deselect",
        "tests/test_wire_seal.py::test_two_thousand_changed_chunk_bits_are_refused",
    ]

    run = [*coverage, "run", "--branch", *place, "-m", "pytest", "-p", "no:cacheprovider"]
    subprocess.run([*run, *tests, *skip], cwd=ROOT, check=True, capture_output=True)
    subprocess.run([*coverage, "json", *place, "-o", str(report)], cwd=ROOT, check=True)

    measured = json.loads(report.read_text(encoding="utf-8"))["files"]
    missed = {
        name: (result["missing_lines"], result["missing_branches"])
        for name, result in measured.items()
        if result["missing_lines"] or result["missing_branches"]
    }
    assert len(measured) == len(files)
    assert not missed


def loaded_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `statement`."""
    code = f"{statement}\nimport sys\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return set(done.stdout.split())


HEAVY = TORCH_LIKE | {"onnxruntime", "onnxruntime_genai", "fastapi", "sqlalchemy"}


@pytest.mark.parametrize(
    "statement",
    [
        "import edge_sdk",
        "import edge_sdk.cli",
        "from edge_sdk import EdgeDevice, EdgeConfig",
        "import edge_sdk.wire.messages, edge_sdk.wire.seal, edge_sdk.wire.transfer",
        "import edge_sdk.link.courier, edge_sdk.link.mqtt, edge_sdk.store.mailbox",
        "import compression",
    ],
)
def test_the_core_imports_without_heavy_packages(statement: str) -> None:
    assert not loaded_after(statement) & HEAVY


def test_plain_import_loads_no_numpy() -> None:
    assert "numpy" not in loaded_after("import edge_sdk")
