"""P7: collects the secrets that arise while tests run, and looks for them in everything logged.

Knows which of our functions bring secrets about, the key files that a run leaves behind, and the
forms in which a secret may be printed. Does not know any test.

`tests/conftest.py` starts it for every session: log records of every level, the log files that
brokers and child processes leave in pytest's folder, and the captured output of failed tests are
searched at the end, and one hit fails the session.
"""

import ast
import base64
import functools
import itertools
import logging
import re
import string
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from edge_sdk.link import passwords
from edge_sdk.store import settings
from edge_sdk.wire import enrolment, seal
from edge_sdk.wire.identity import Identity

OURS = ("edge_sdk", "coordinator", "compression", "exporters", "examples")
SHORTEST = 12
"""Bytes; shorter secrets (a test's "pw") would be found by chance."""
LOG_NAMES = ("*.log", "*.out", "*.err", "*.jsonl")
MAX_LOG_BYTES = 32 * 2**20
_GRAM = 12
"""Characters of a form that are looked up; 12 of base64 are 72 bits."""
_START = 8
"""Bytes of a secret that are looked up in printed byte strings."""
_HEADING = b"symbiont-identity-1\n"
_RUN = re.compile(r"[A-Za-z0-9+/_\-]{12,}")
_LITERAL = re.compile(r"""b'(?:[^'\\]|\\.)*'|b"(?:[^"\\]|\\.)*\"""")
_PEM = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")


class KeyScan(logging.Handler):
    """Remembers secrets and log lines; `hits` compares them."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.secrets: dict[bytes, str] = {}
        self.lines: list[str] = []
        self.scanned_bytes = 0

    # --- what is secret -----------------------------------------------------------------------

    def add(self, secret: bytes, what: str) -> None:
        """Note one secret; test keys made of counting bytes are secrets like others."""
        if len(secret) >= SHORTEST and len(set(secret)) > 4:
            self.secrets.setdefault(bytes(secret), what)

    def add_identity(self, identity: Identity) -> None:
        """Note each private key of an identity."""
        data = identity.to_bytes()
        self.add(data[:32], "a signing key")
        self.add(data[32:64], "a receive key")
        self.add(data[64:128], "a hybrid seed")
        self.add(data[128:], "a hybrid key")

    def listen(self) -> None:
        """Note what our functions make or are given from now on, and every log record."""
        self._wrap(Identity, "generate", lambda made, *_: self.add_identity(made))
        self._wrap(Identity, "from_bytes", lambda made, *_: self.add_identity(made))
        self._wrap(seal.Sealer, "__init__", lambda _, me, *__: self.add(me.file_key, "a file key"))
        self._wrap(enrolment, "secret_hash", lambda _, __, s: self.add(s, "an enrolment secret"))
        self._wrap(
            passwords, "hash_password", lambda _, text: self.add(text.encode(), "a password")
        )
        self._wrap(
            settings, "read_secret", lambda text, *_: self.add(text.encode(), "a secret file")
        )
        logging.getLogger().addHandler(self)
        for name in OURS:
            logging.getLogger(name).setLevel(logging.DEBUG)

    def _wrap(self, owner: Any, name: str, note: Callable[..., None]) -> None:
        bound = getattr(owner, name)
        inherited = vars(owner)[name]

        @functools.wraps(getattr(inherited, "__func__", inherited))
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = bound(*args, **kwargs)
            note(result, *args)
            return result

        method = name in ("generate", "from_bytes")
        setattr(owner, name, staticmethod(wrapped) if method else wrapped)

    # --- what is logged -----------------------------------------------------------------------

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one record as it would be printed."""
        try:
            self.lines.append(logging.Formatter("%(name)s %(message)s").format(record))
        except Exception:  # a record that cannot be formatted is not printed either
            return

    def hits(self, folder: Path | None = None) -> list[str]:
        """Return one line per secret found; `folder` holds log files and key files of the run."""
        sources = [("log records", "\n".join(self.lines))]
        if folder is not None:
            for path in _files(folder, ("*.key",)):
                self._add_file(path)
            sources += [(path.name, _text(path)) for path in _files(folder, LOG_NAMES)]
        grams = self._grams()
        self.scanned_bytes = sum(len(text) for _, text in sources)
        return sorted(set(itertools.chain.from_iterable(self._look(*s, grams) for s in sources)))

    def _add_file(self, path: Path) -> None:
        data = path.read_bytes()[:4096]
        if data.startswith(_HEADING):
            try:
                keys = base64.b64decode(data.removeprefix(_HEADING).strip(), validate=True)
                self.add_identity(Identity.from_bytes(keys))
            except Exception:  # a file some test damaged
                return

    def _grams(self) -> dict[str, bytes]:
        return {
            form[:_GRAM]: secret
            for secret in self.secrets
            for form in _forms(secret)
            if len(form) >= _GRAM
        }

    def _look(self, source: str, text: str, grams: dict[str, bytes]) -> Iterator[str]:
        if _PEM.search(text):
            yield f"a PEM private key in {source}"
        for run in _RUN.findall(text):
            for at in range(len(run) - _GRAM + 1):
                secret = grams.get(run[at : at + _GRAM])
                if secret is not None and any(form in text for form in _forms(secret)):
                    yield f"{self.secrets[secret]} in {source}"
        for secret, plain in self._passwords:
            if plain in text:
                yield f"{self.secrets[secret]} in {source}"
        starts = {secret[:_START]: secret for secret in self.secrets}
        for literal in _literals(text):
            for at in range(len(literal) - _START + 1):
                secret = starts.get(literal[at : at + _START])
                if secret is not None and secret in literal:
                    yield f"{self.secrets[secret]} in {source}"

    @property
    def _passwords(self) -> list[tuple[bytes, str]]:
        plain = [(secret, secret.decode("latin-1")) for secret in self.secrets]
        return [(secret, text) for secret, text in plain if set(text) <= set(string.printable)]


def _forms(secret: bytes) -> list[str]:
    """How text may hold a secret: as hex, or as base64 at each of its three offsets."""
    forms = [secret.hex(), secret.hex().upper()]
    for shift in range(3):
        for altchars in (b"+/", b"-_"):
            whole = base64.b64encode(bytes(shift) + secret, altchars).decode()
            forms.append(whole[4 if shift else 0 :].rstrip("=")[:-1])
    return forms


def _literals(text: str) -> Iterator[bytes]:
    """What `b'...'` in a text stands for."""
    for literal in _LITERAL.findall(text):
        try:
            yield ast.literal_eval(literal)
        except (ValueError, SyntaxError):
            continue


def _files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.rglob(pattern) if path.is_file())


def _text(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(MAX_LOG_BYTES).decode("utf-8", "surrogateescape")


SCAN = KeyScan()
"""The one that `tests/conftest.py` starts."""
