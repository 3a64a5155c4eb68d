"""An adapter release made here from a coded difference, so that its files need not be fetched.

Knows an offer's source, the adapters held and the base's manifest. Does not know whether what came
out is what was signed: the model store compares hashes, and what differs is fetched.

Needs the range coder and onnxruntime, not torch.
"""

from pathlib import Path

from compression.errors import CodecError
from edge_sdk.adapter_file import write_release
from edge_sdk.errors import ExportError, RemoteProtocolError, RuntimeFailure
from edge_sdk.train.held import HeldAdapters
from edge_sdk.train.lora import A_SUFFIX, B_SUFFIX, Factors, Layout, start_factors
from edge_sdk.wire.manifest import MANIFEST_FILE, ReleaseManifest, decode_manifest
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
        factors = _factors(source, base, held)
        write_release(out, base, factors, release=release, rank=source.rank, alpha=source.alpha)
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
