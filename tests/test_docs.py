"""The documents keep their word: commands exist, files are where the map says, code is real."""

import argparse
import ast
import importlib
import re
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from edge_sdk.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def documented() -> list[list[str]]:
    """["coordinator", "init"] and so on, from the README's list of commands."""
    block = README.split("## The command")[1].split("```")[1]
    found = []
    for line in block.strip().splitlines():
        names = re.sub(r"\s{3,}.*", "", line).removeprefix("symbiont ").split(" | ")
        first, *rest = names[0].split()
        verbs = [word for word in [*rest, *names[1:]] if word.islower()]
        found += [[first, verb] for verb in verbs] or [[first]]
    return found


@pytest.mark.parametrize("words", documented(), ids=" ".join)
def test_every_documented_command_exists_with_help_and_json(words: list[str]) -> None:
    parser = build_parser()

    for word in words:
        parser = subcommands(parser)[word]

    assert "usage:" in parser.format_help()
    assert "--json" in parser.format_help()


def test_every_command_is_documented() -> None:
    known = {" ".join(words) for words in documented()}

    for name, parser in subcommands(build_parser()).items():
        verbs = subcommands(parser) or {"": parser}
        assert {f"{name} {verb}".strip() for verb in verbs} <= known


def test_the_first_example_is_short_and_every_import_in_the_readme_works() -> None:
    assert len(PYTHON[0].strip().splitlines()) <= 15
    for code in PYTHON:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


def test_the_methods_of_the_first_example_exist() -> None:
    from edge_sdk import EdgeDevice

    called = set(re.findall(r"device\.(\w+)\(", README))

    assert called >= {"enrol", "add_examples", "run_in_background", "classify", "explain"}
    assert [name for name in called if not hasattr(EdgeDevice, name)] == []


def test_every_file_of_the_map_exists() -> None:
    block = README.split("## File map")[1].split("```")[1]
    folder = ROOT

    for line in block.strip().splitlines():
        indent = len(line) - len(line.lstrip())
        names = re.split(r"\s{2,}", line.strip())[0].split()
        if indent == 0:
            folder = ROOT / names[0]
            assert folder.is_dir(), line
            continue
        for name in names:
            assert (folder / name).exists(), f"{folder.name}/{name} is in the map only"


def test_every_entry_point_loads() -> None:
    for entry in entry_points(group="symbiont.commands"):
        assert callable(entry.load().register), entry.name


DOCUMENTS = [path for path in sorted(ROOT.rglob("*.md")) if ".venv" not in path.parts]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"
