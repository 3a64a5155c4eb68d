"""A bundle folder before it is loaded: what it says of itself, whether it is whole, what it needs.

Knows files, hashes and sizes. Does not know signatures (trust.py) or any runtime.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_sdk.errors import DigestError, FleetError, RuntimeFailure
from edge_sdk.prompts import READ_TOKENS
from edge_sdk.wire.manifest import MANIFEST_FILE, ReleaseManifest, decode_manifest

CONFIG_FILE = "genai_config.json"
READ_FILES = (CONFIG_FILE, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""Files that decide how text is read; none of them may be added to a bundle."""
OVERHEAD_MB = 40
"""What arenas, tokenizer and small buffers take, about; measured with a 3 MB and a 98 MB bundle."""
WEIGHT_COPIES = 2
"""The file, mapped into memory, and the same weights packed for the processor's kernels."""
_F32_BYTES = 4


@dataclass(frozen=True, slots=True)
class BundleFiles:
    """A bundle's folder, its genai settings, and its manifest if it has one."""

    folder: Path
    settings: Mapping[str, Any]
    manifest: ReleaseManifest | None

    @classmethod
    def read(cls, folder: Path) -> "BundleFiles":
        """Read what the bundle in `folder` says of itself.

        Raises:
            RuntimeFailure: not a bundle, or its descriptions are malformed.
        """
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise RuntimeFailure(f"{folder} is not a model bundle: it has no {CONFIG_FILE}")
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            files = cls(folder, settings, read_manifest(folder))
            if min(files.context, files.token_bytes(), int(settings["model"]["vocab_size"])) < 1:
                raise ValueError("a size in it is below 1")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
            raise RuntimeFailure(f"the bundle {folder} cannot be loaded: {path}: {exc}") from exc
        return files

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        return int(self.settings["model"]["context_length"])

    @property
    def ends(self) -> frozenset[int]:
        """The ids that end a text."""
        ids = self.settings["model"].get("eos_token_id", ())
        return frozenset([ids] if isinstance(ids, int) else ids)

    def limit(self, wanted: int | None) -> int:
        """Return the context to use when `wanted` tokens are asked for, None for the model's own.

        Raises:
            RuntimeFailure: more than the model allows, or too few for a prompt and an answer.
        """
        if wanted is not None and not 2 <= wanted <= self.context:
            raise RuntimeFailure(
                f"context is {wanted}; the model {self.folder} allows 2 to {self.context} tokens"
            )
        return wanted or self.context

    def check(self) -> None:
        """Compare every file that the manifest names with its hash there.

        This finds damage and careless changes; who may change a manifest is decided by trust.py.
        A bundle without a manifest has nothing to be compared with.

        Raises:
            DigestError: a file is gone, altered or added; names it.
        """
        files = self.manifest.files if self.manifest else {}
        for name in READ_FILES if files else ():
            if name not in files and (self.folder / name).exists():
                raise DigestError(
                    f"{self.folder / name} is no part of the bundle: {MANIFEST_FILE} does not name "
                    "it; remove it or install the bundle anew"
                )
        for name, entry in files.items():
            path = self.folder / name
            try:
                with path.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as exc:
                raise DigestError(f"{path} cannot be read: {exc}; install the bundle anew") from exc
            if found != entry.sha256:
                raise DigestError(
                    f"{path} was altered since it was exported: its SHA-256 is {found[:12]}..., "
                    f"{MANIFEST_FILE} says {entry.sha256[:12]}...; install the bundle anew"
                )

    def token_bytes(self) -> int:
        """Bytes of attention cache that one token of context takes."""
        decoder = self.settings["model"]["decoder"]
        heads, size = decoder["num_key_value_heads"], decoder["head_size"]
        return 2 * int(decoder["num_hidden_layers"]) * int(heads) * int(size) * _F32_BYTES

    def check_memory(self, memory_mb: float, context: int) -> None:
        """Compare what the model will add to the process, as it answers one text of `context`
        tokens, with a ceiling in MiB.

        Raises:
            RuntimeFailure: it will take more; says how much and what would fit.
        """
        weights = sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())
        logits = READ_TOKENS * int(self.settings["model"]["vocab_size"]) * _F32_BYTES
        fixed = OVERHEAD_MB + (WEIGHT_COPIES * weights + logits) / 2**20
        need = fixed + context * self.token_bytes() / 2**20
        if need <= memory_mb:
            return
        fits = int((memory_mb - fixed) * 2**20 / self.token_bytes())
        advice = f"open it with context={fits}" if fits >= 1 else "choose a smaller bundle"
        raise RuntimeFailure(
            f"{self.folder} needs about {need:.0f} MiB ({fixed:.0f} for the model, the rest for "
            f"{context} tokens of context); allowed: {memory_mb:.0f}; raise memory_mb or {advice}"
        )


def read_manifest(folder: Path) -> ReleaseManifest | None:
    """Return the bundle's own description, None where there is none: a plain folder of genai or
    transformers.js serves as well.

    Raises:
        RuntimeFailure: it is there and cannot be read.
    """
    try:
        return decode_manifest((folder / MANIFEST_FILE).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, FleetError) as exc:
        raise RuntimeFailure(f"{folder / MANIFEST_FILE} cannot be read: {exc}") from exc
