"""The key file: private, whole or absent, and the same for everybody who opens it."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from edge_sdk.errors import ConfigError, StorageError
from edge_sdk.store.keys import load_or_create, read_private, save, write_private
from edge_sdk.wire.seal import Identity


def test_the_same_keys_come_back_from_a_file_nobody_else_can_read(tmp_path):
    path = tmp_path / "identity.key"

    first = load_or_create(path)

    assert load_or_create(path).to_bytes() == first.to_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["identity.key"]


def test_all_who_create_at_once_get_one_identity(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda _: load_or_create(tmp_path / "k").to_bytes(), range(16)))

    assert len(set(keys)) == 1


def test_who_creates_second_takes_what_the_first_wrote(tmp_path, monkeypatch):
    path, link, first = tmp_path / "k", os.link, []

    def overtaken(source, target):
        monkeypatch.setattr("os.link", link)
        first.append(load_or_create(path))  # another one, between our look and our link
        link(source, target)

    monkeypatch.setattr("os.link", overtaken)

    assert load_or_create(path).to_bytes() == first[0].to_bytes()


def test_a_file_that_others_may_read_is_refused(tmp_path):
    path = tmp_path / "identity.key"
    load_or_create(path)
    path.chmod(0o644)

    with pytest.raises(ConfigError, match="0644"):
        load_or_create(path)


@pytest.mark.parametrize(
    "content", [b"", b"symbiont-identity-1\n", b"symbiont-identity-1\nAAAA", b"\xff"]
)
def test_a_damaged_file_is_reported_and_kept(tmp_path, content):
    path = tmp_path / "identity.key"
    path.write_bytes(content)
    path.chmod(0o600)

    with pytest.raises(StorageError, match="damaged"):
        load_or_create(path)
    assert path.read_bytes() == content


def test_a_missing_folder_is_reported(tmp_path):
    with pytest.raises(StorageError, match="key file"):
        load_or_create(tmp_path / "absent" / "identity.key")


def test_a_hybrid_key_is_added_once_and_kept(tmp_path):
    path = tmp_path / "identity.key"
    plain = load_or_create(path)

    first = load_or_create(path, hybrid=True)

    assert first.public.hybrid
    assert (first.public.sign, first.public.receive) == (plain.public.sign, plain.public.receive)
    assert load_or_create(path, hybrid=True).to_bytes() == first.to_bytes()
    assert load_or_create(path).to_bytes() == first.to_bytes()
    assert load_or_create(tmp_path / "new.key", hybrid=True).public.hybrid


def test_saved_keys_replace_the_old_ones_in_one_step(tmp_path):
    path, other = tmp_path / "identity.key", Identity.generate()
    load_or_create(path)

    save(path, other)

    assert load_or_create(path).to_bytes() == other.to_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["identity.key"]


def test_a_secret_file_is_read_as_far_as_asked_and_only_when_private(tmp_path):
    path = tmp_path / "password"
    write_private(path, b"0123456789")

    assert read_private(path, 4) == b"0123"
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="0640"):
        read_private(path, 4)


def test_a_secret_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "password"
    path.mkdir()

    with pytest.raises(StorageError, match="cannot write"):
        write_private(path, b"new")

    assert [file.name for file in tmp_path.iterdir()] == ["password"]
