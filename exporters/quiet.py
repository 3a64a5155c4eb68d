"""Keeps foreign exporters' noise and habits out of the application that exports.

Knows standard output, logging and sys.path. Does not know who makes the noise.
"""

import contextlib
import io
import logging
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(into: io.StringIO | None = None) -> Iterator[io.StringIO]:
    """Collect what is printed, and give logging and sys.path back as they were.

    onnxruntime-genai's builder prints, draws a progress bar and extends sys.path; onnxruntime's
    quantizer sets up the root logger on import.
    """
    said = into if into is not None else io.StringIO()
    root, disabled = logging.getLogger(), logging.root.manager.disable
    handlers, level, path = root.handlers[:], root.level, sys.path[:]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            logging.disable(logging.ERROR)
            yield said
    finally:
        logging.disable(disabled)
        root.handlers[:], sys.path[:] = handlers, path
        root.setLevel(level)
