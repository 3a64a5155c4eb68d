"""An adapter release made here from a coded difference, so that its files need not be fetched.

Knows an offer's source, the adapters held and the base's manifest. Does not know whether what came
out is what was signed: the model store compares hashes, and what differs is fetched.

Needs the range coder and onnxruntime, not torch.
"""

import hashlib
from pathlib import Path

from compression.errors import CodecError
from edge_sdk.adapter_file import write_adapter
from edge_sdk.errors import ExportError, RemoteProtocolError, RuntimeFailure
from edge_sdk.train.held import HeldAdapters
from edge_sdk.train.lora import A_SUFFIX, B_SUFFIX, Factors, Layout, start_factors
from edge_sdk.wire.manifest import (
    ADAPTER_FILE,
    MANIFEST_FILE,
    FileEntry,
    ReleaseManifest,
    adapter_manifest,
    decode_manifest,
    encode_manifest,
)
from edge_sdk.wire.messages import AdapterSource


def make_release(
    source: AdapterSource, release: str, *, bundle: Path, held: bytes, out: Path
) -> None:
    """Write into `out` the two files of the adapter release over the model in `bundle`.

    `held` are the adapters of earlier tasks (`HeldAdapters.to_bytes`).

    Raises:
        RuntimeFailure: the files cannot be made here; says why.
    """
    try:
        base = decode_manifest((bundle / MANIFEST_FILE).read_bytes())
        write_adapter(
            _factors(source, base, held),
            rank=source.rank,
            alpha=source.alpha,
            slots=base.adapter_slots,
            path=out / ADAPTER_FILE,
            rank_max=base.rank_max,
        )
        adapter = (out / ADAPTER_FILE).read_bytes()
        entry = FileEntry(sha256=hashlib.sha256(adapter).hexdigest(), bytes=len(adapter))
        files = {ADAPTER_FILE: entry}
        manifest = adapter_manifest(
            base, release=release, files=files, rank=source.rank, alpha=source.alpha
        )
        (out / MANIFEST_FILE).write_bytes(encode_manifest(manifest))
    except (CodecError, ExportError, RemoteProtocolError, OSError) as exc:
        raise RuntimeFailure(f"the adapter cannot be made here: {exc}") from exc


def _factors(source: AdapterSource, base: ReleaseManifest, held: bytes) -> Factors:
    if source.rank > base.rank_max:  # before anything of that size is drawn
        raise RuntimeFailure(f"rank {source.rank} is over {base.rank_max}, the release's largest")
    drawn = start_factors(_layout(source, base), source.seed)
    found = HeldAdapters.from_bytes(held).reach(source.digest, source.deltas, drawn)
    if found is None:
        raise RuntimeFailure("this device does not hold what the adapter differs from")
    return found


def _layout(source: AdapterSource, base: ReleaseManifest) -> Layout:
    layout: Layout = {}
    for slot, (out, width) in base.adapter_slots.items():
        if slot.rpartition(".")[2] in source.targets:
            layout[slot + A_SUFFIX] = (source.rank, width)
            layout[slot + B_SUFFIX] = (out, source.rank)
    return layout
