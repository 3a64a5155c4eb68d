"""The short forms of the figures about transfer: nothing lost, nothing doubled, at any speed."""

import importlib
from pathlib import Path

import pytest

from edge_sdk.link.broker import find_mosquitto
from tests.torture.result import Run, Scale

pytestmark = pytest.mark.broker


@pytest.mark.parametrize(
    "module", ["l1_upload", "l2_upload_amqtt", "l4_memory", "f5_drops", "f11_refused"]
)
def test_the_short_form_passes(module: str, tmp_path: Path) -> None:
    if module != "l2_upload_amqtt" and find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    run: Run = importlib.import_module(f"tests.torture.{module}").run

    result = run(Scale.SHORT, 7, tmp_path)

    assert result.passed, str(result)
    assert (result.lost, result.doubled) == (0, 0)
