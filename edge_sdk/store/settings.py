"""Reads settings and secret files, whole and bounded.

Knows files. Does not know what a setting means.
"""

from pathlib import Path

from edge_sdk.errors import ConfigError

MAX_CONFIG_BYTES = 1 << 20
"""A settings file is a page of text; anything larger was named by mistake."""


def read_config(path: Path) -> str:
    """Return the text of a settings file.

    Raises:
        ConfigError: missing, unreadable, too large or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as exc:
        raise ConfigError(f"cannot read the settings file {path}: {exc.strerror}") from exc
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path} is over {MAX_CONFIG_BYTES} bytes; is it really a settings file?")
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path} is not UTF-8 text: byte {exc.start} is wrong") from exc


def read_secret(path: str) -> str:
    """Return the first line of a secret file, "" for the path "".

    Raises:
        ConfigError: missing or unreadable.
    """
    if not path:
        return ""
    text = read_config(Path(path))
    return text.splitlines()[0].strip() if text.strip() else ""


def absolute_path(folder: Path, path: str) -> str:
    """Return `path` as seen from `folder`, "" for the path "" (which means none)."""
    return str(folder / Path(path).expanduser()) if path else ""
