"""Opens a bundle with the session of its kind.

Knows the two kinds of model. Does not know what either does.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from edge_sdk.wire.messages import TextTask

if TYPE_CHECKING:
    from edge_sdk.encoders import EncoderSession
    from edge_sdk.runtime import SlmSession

ENCODER_GRAPH = "onnx/model_quantized.onnx"


def is_encoder(bundle_dir: Path | str) -> bool:
    """Whether the folder holds an encoder, by the place of its graph."""
    return (Path(bundle_dir) / ENCODER_GRAPH).is_file()


def open_session(
    bundle_dir: Path | str,
    *,
    threads: int = 1,
    max_tokens: int = 64,
    task: TextTask | None = None,
    check: bool = True,
) -> "SlmSession | EncoderSession":
    """Open the bundle in `bundle_dir`, whichever kind it is; `max_tokens` is a decoder's.

    Raises:
        DigestError: a file is not the one that was exported.
        RuntimeFailure: no bundle there, it cannot be loaded, or the infer extra is missing.
    """
    if is_encoder(bundle_dir):
        from edge_sdk.encoders import EncoderSession

        return EncoderSession(bundle_dir, threads=threads, task=task, check=check)
    from edge_sdk.runtime import SlmSession

    return SlmSession(bundle_dir, threads=threads, max_tokens=max_tokens, task=task, check=check)
