"""examples: which requirements are resolved for a device of another architecture."""

from pathlib import Path

import pytest

from examples.check_wheels import ARM64, main, requirements, resolve


def test_extras_within_extras_are_followed_and_nothing_else(tmp_path: Path) -> None:
    project = tmp_path / "pyproject.toml"
    project.write_text(
        '[project]\nname = "p"\ndependencies = ["a>=1"]\n[project.optional-dependencies]\n'
        'infer = ["b", "a>=1"]\ntrain = ["p[infer]", "c; python_version>\'3\'"]\nother = ["d"]\n'
    )

    assert requirements(["train"], project) == ["a>=1", "c; python_version>'3'", "b"]
    assert requirements([], project) == ["a>=1"]


def test_a_device_that_only_answers_needs_no_torch_and_no_range_coder() -> None:
    names = {line.split(">")[0].split("[")[0] for line in requirements(["infer"])}

    assert {"numpy", "cryptography", "onnxruntime", "onnxruntime-genai", "tokenizers"} <= names
    assert not {"torch", "transformers", "constriction"} & names


def test_every_wheel_of_core_and_infer_exists_for_arm64(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status = main([])

    said = capsys.readouterr().out
    if status == 2:
        pytest.skip("the package index cannot be reached: ARM64 wheels were not looked for")
    assert status == 0, said
    assert "onnxruntime_genai" in said
    assert said.count("aarch64") > 5


def test_what_has_no_wheel_is_named() -> None:
    status, said = resolve(["numpy==0.0.1"], ARM64, "3.11")

    if status == 2:
        pytest.skip("the package index cannot be reached")
    assert status == 1
    assert "numpy==0.0.1" in " ".join(said)
