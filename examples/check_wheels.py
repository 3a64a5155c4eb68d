"""Does every dependency of the SDK come as a wheel for ARM64, so that nothing is built there?

    python examples/check_wheels.py            # resolves core and infer for Linux on ARM64
    python examples/check_wheels.py --platform manylinux_2_28_x86_64 --extras train

pip resolves the requirements of pyproject.toml for another platform with `--only-binary=:all:`;
nothing is installed. Exit status: 0 all there, 1 one is missing (pip's words say which), 2 the
package index cannot be reached.

Knows pip's resolver. Does not know what the wheels hold.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARM64 = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
"""glibc 2.28 is Debian 10's and Raspberry Pi OS 10's."""
_UNREACHABLE = ("connection", "timed out", "temporary failure", "name resolution")


def requirements(extras: Sequence[str], project: Path = ROOT / "pyproject.toml") -> list[str]:
    """The project's requirements with `extras`, its own extras within extras followed."""
    table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    found, todo = list(table["dependencies"]), list(extras)
    while todo:
        for line in table["optional-dependencies"][todo.pop()]:
            own = line.startswith(f"{table['name']}[")
            if own:
                todo += line.split("[")[1].rstrip("]").split(",")
            elif line not in found:
                found.append(line)
    return found


def resolve(wanted: Sequence[str], platforms: Sequence[str], python: str) -> tuple[int, list[str]]:
    """Exit status as above, and the wheels' names or pip's complaint."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet"]
        command += ["--ignore-installed", "--only-binary=:all:", "--implementation", "cp"]
        command += ["--python-version", python, "--target", scratch, "--report", str(report)]
        for platform in platforms:
            command += ["--platform", platform]
        done = subprocess.run([*command, *wanted], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            items = json.loads(report.read_text(encoding="utf-8"))["install"]
            return 0, sorted(item["download_info"]["url"].rsplit("/", 1)[-1] for item in items)
    said = [line for line in done.stderr.splitlines() if not line.startswith("WARNING: Location")]
    away = any(word in done.stderr.lower() for word in _UNREACHABLE)
    return (2 if away else 1), said


def main(argv: Sequence[str] | None = None) -> int:
    """Resolve, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--platform", nargs="+", default=list(ARM64))
    parser.add_argument("--extras", nargs="*", default=["infer"])
    parser.add_argument("--python", default="3.11")
    options = parser.parse_args(argv)
    status, lines = resolve(requirements(options.extras), options.platform, options.python)
    print("\n".join(lines))
    verdict = {
        0: f"all {len(lines)} come as wheels",
        1: "at least one has no wheel",
        2: "the package index cannot be reached; nothing was checked",
    }
    what = f"core with {', '.join(options.extras)}" if options.extras else "core"
    print(f"{what} on {options.platform[0]}, Python {options.python}: {verdict[status]}")
    return status


if __name__ == "__main__":
    sys.exit(main())
