"""Text files of results, which a benchmark replaces after every run and may be killed at any time.

Knows files. Does not know rows.
"""

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write the file whole or not at all."""
    draft = path.with_name(f".{path.name}.part")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
