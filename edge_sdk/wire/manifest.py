"""What a published release claims about itself: `symbiont.json` in every release folder.

Knows the fields and their limits. Does not know whether to believe them (TUF's client decides
that by hash, edge_sdk/models.py), nor files, ONNX or torch.
"""

import hashlib
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from edge_sdk.errors import RemoteProtocolError
from edge_sdk.wire.messages import Count, FilePath, Name, Text, TextTask, Word

MANIFEST_FILE = "symbiont.json"
ADAPTER_FILE = "adapter.onnx_adapter"
PROMPT_FILE = "prompt.onnx"
GOLDEN_FILE = "golden.json"
MAX_MANIFEST_BYTES = 4 * 2**20
"""A manifest above this is refused before it is parsed; a 70 B model's is under 200 KiB."""

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
Rows = Annotated[int, Meta(ge=1, le=2**32)]


class FileEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a release: its SHA-256 in hexadecimal and its size in bytes."""

    sha256: Sha256
    bytes: Count


class ReleaseManifest(Struct, frozen=True, forbid_unknown_fields=True):
    """A release: a whole model bundle, or an adapter for one (`base_release` names it).

    `adapter_slots` maps a Hugging Face linear name to (out, in); its LoRA inputs in the graph are
    `<name>.lora_A` (in, r) and `<name>.lora_B` (r, out). `context` is in tokens. `files` names
    every other file of the release. `parity` holds the exporter's measured figures, `lineage`
    what the release was made from, as free text by key.
    """

    family: Name
    release: Name
    kind: Literal["decoder", "encoder", "adapter"]
    base_model: str
    architecture: str
    context: Count
    tokenizer_sha256: Sha256
    files: Annotated[dict[FilePath, FileEntry], Meta(max_length=4096)]
    adapter_slots: Annotated[dict[Word, tuple[Rows, Rows]], Meta(max_length=16_384)] = {}
    rank_max: Annotated[int, Meta(ge=0, le=1024)] = 0
    parity: Annotated[dict[Word, float], Meta(max_length=1024)] = {}
    lineage: Annotated[dict[Word, Text], Meta(max_length=1024)] = {}
    task: TextTask | None = None
    base_release: Name | None = None


class GoldenRow(Struct, frozen=True, forbid_unknown_fields=True):
    """After the token ids `ids`, the graph gave the logits `logits` at the token ids `columns`."""

    ids: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=1024)]
    columns: Annotated[tuple[Count, ...], Meta(min_length=2, max_length=1024)]
    logits: Annotated[tuple[float, ...], Meta(min_length=2, max_length=1024)]


class Golden(Struct, frozen=True, forbid_unknown_fields=True):
    """What a bundle answered where it was exported; a device must come close before it runs it."""

    rows: Annotated[tuple[GoldenRow, ...], Meta(min_length=1, max_length=64)]


_decoder = msgspec.json.Decoder(ReleaseManifest)
_golden = msgspec.json.Decoder(Golden)


def encode_manifest(manifest: ReleaseManifest) -> bytes:
    """Return `manifest` as the UTF-8 JSON of `symbiont.json`."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1)


def decode_manifest(data: bytes) -> ReleaseManifest:
    """Return the manifest that `data` holds.

    Raises:
        RemoteProtocolError: not a manifest, or a field out of its range.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise RemoteProtocolError(
            f"a manifest of {len(data)} bytes is over the limit of {MAX_MANIFEST_BYTES}"
        )
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise RemoteProtocolError(f"not a release manifest: {exc}") from exc


def encode_golden(golden: Golden) -> bytes:
    """Return `golden` as the UTF-8 JSON of `golden.json`."""
    return msgspec.json.encode(golden)


def decode_golden(data: bytes) -> Golden:
    """Return the expected answers that `data` holds.

    Raises:
        RemoteProtocolError: malformed, or rows whose columns and logits differ in number.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise RemoteProtocolError(
            f"{GOLDEN_FILE} of {len(data)} bytes is over the limit of {MAX_MANIFEST_BYTES}"
        )
    try:
        golden = _golden.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise RemoteProtocolError(f"{GOLDEN_FILE} is malformed: {exc}") from exc
    if any(len(row.columns) != len(row.logits) for row in golden.rows):
        raise RemoteProtocolError(f"{GOLDEN_FILE} has columns without logits")
    return golden


def director_path(family: str, release: str, device: str = "") -> str:
    """Return the target path under which the director lets `device` run a release.

    "" stands for every device. A device is named by a hash, since all devices read all entries.
    """
    who = hashlib.sha256(device.encode()).hexdigest()[:16] if device else "everyone"
    return f"director/{family}/{who}/{release}"
