"""Releases: signed once, promoted, served by path, and their descent kept."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from coordinator_world import release_folder

from coordinator.programs import Publish
from coordinator.registry import Registry
from coordinator.store import Store
from edge_sdk.errors import ExportError, RemoteProtocolError
from edge_sdk.store.mailbox import Mailbox
from exporters.publisher import Publisher


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Mailbox(tmp_path / "c.db") as mailbox:
        store = Store(mailbox, time.time)
        registry = Registry(store, Publisher(tmp_path / "releases"), time.time)
        registry.prepare()
        yield registry


def test_a_release_is_promoted_and_served(registry: Registry, tmp_path: Path) -> None:
    folder = release_folder(tmp_path / "one", "base")

    release = registry.publish(Publish("slm", "base", folder))

    assert release.targets == ("slm/base/symbiont.json", "slm/base/model.onnx")
    assert "timestamp.json" in release.metadata
    assert registry.promoted("slm") == release
    assert registry.read("slm/base/model.onnx") == b"weights"


def test_the_next_release_takes_over_and_lineage_stays(registry: Registry, tmp_path: Path) -> None:
    registry.publish(Publish("slm", "base", release_folder(tmp_path / "one", "base")))
    folder = release_folder(tmp_path / "two", "next", data=b"better")

    registry.publish(Publish("slm", "next", folder, base="base", lineage={"round": 1}))

    assert registry.promoted("slm").release == "next"
    lines = registry.lineage("slm")
    assert [(line["release"], line["promoted"]) for line in lines] == [
        ("base", False),
        ("next", True),
    ]
    assert (lines[1]["base"], lines[1]["lineage"]) == ("base", {"round": 1})


def test_publishing_a_name_again_gives_the_first(registry: Registry, tmp_path: Path) -> None:
    first = registry.publish(Publish("slm", "base", release_folder(tmp_path / "one", "base")))
    folder = release_folder(tmp_path / "two", "base", data=b"other")

    again = registry.publish(Publish("slm", "base", folder))

    assert again == first
    assert registry.read("slm/base/model.onnx") == b"weights"


def test_a_crash_between_signing_and_recording_is_mended(tmp_path: Path) -> None:
    folder = release_folder(tmp_path / "one", "base")
    publisher = Publisher(tmp_path / "releases")
    publisher.init()
    publisher.publish("slm", "base", folder)  # and the process was killed here

    with Mailbox(tmp_path / "c.db") as mailbox:
        registry = Registry(Store(mailbox, time.time), publisher, time.time)
        release = registry.publish(Publish("slm", "base", folder))

        assert registry.promoted("slm") == release
    assert set(release.targets) == {"slm/base/symbiont.json", "slm/base/model.onnx"}


def test_an_unknown_base_is_refused(registry: Registry, tmp_path: Path) -> None:
    folder = release_folder(tmp_path / "one", "next")

    with pytest.raises(ExportError, match="builds on base, which is not published"):
        registry.publish(Publish("slm", "next", folder, base="base"))

    assert registry.promoted("slm") is None


@pytest.mark.parametrize("path", ["slm/base/none", "../c.db", "keys/root.pem", ""])
def test_only_published_files_are_served(registry: Registry, path: str) -> None:
    with pytest.raises(RemoteProtocolError, match="not a published file"):
        registry.read(path)
