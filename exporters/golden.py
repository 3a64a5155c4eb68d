"""Writes `golden.json` into a bundle: what the exported graph answered here, to be met elsewhere.

Knows ONNX Runtime's logits for a few token rows. Does not know devices; `edge_sdk/probe.py` repeats
the rows in the trial of a new release and compares.
"""

from pathlib import Path

import numpy as np

from edge_sdk.wire.manifest import GOLDEN_FILE, Golden, GoldenRow, encode_golden
from exporters.parity import DEFAULT_TEXT, empty_cache_feed, open_session, tokenize

TOKENS = 24
"""Tokens per row: past the first-token regime, and quick on the smallest device."""
COLUMNS = 64
"""Logits kept per row: half of them the largest, half spread over the vocabulary."""


def write_golden(bundle_dir: Path) -> None:
    """Run the bundle's graph on built-in text and write the logits after it to `golden.json`.

    Raises:
        ExportError: the tokenizer makes nothing of the text.
    """
    session = open_session(bundle_dir)
    rows = []
    for ids in tokenize(bundle_dir, DEFAULT_TEXT):
        ids = ids[:, :TOKENS]
        logits = session.run(["logits"], empty_cache_feed(bundle_dir, session, ids))[0][0, -1]
        best = np.argsort(logits)[::-1][: COLUMNS // 2]  # (32,)
        spread = np.linspace(0, len(logits) - 1, COLUMNS // 2).astype(np.int64)
        columns = np.unique(np.concatenate([best, spread]))
        rows.append(
            GoldenRow(
                tuple(int(i) for i in ids[0]),
                tuple(int(i) for i in columns),
                tuple(round(float(z), 6) for z in logits[columns]),
            )
        )
    (bundle_dir / GOLDEN_FILE).write_bytes(encode_golden(Golden(tuple(rows))))
