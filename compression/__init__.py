"""Learned compression of adapter updates. Knows arrays; knows no device, wire or model file."""

import sys

if sys.version_info >= (3, 14):  # pragma: no cover - the supported versions stop before it
    raise ImportError(
        "Symbiont's package 'compression' clashes with the standard library's from Python 3.14 on; "
        "run Symbiont with Python 3.11 to 3.13"
    )
