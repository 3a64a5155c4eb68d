"""The device side of Symbiont, and what both sides must agree on.

Importing this package loads neither torch nor a runtime: each name below is loaded on first use.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_sdk.agent import EdgeDevice
    from edge_sdk.collect import Example
    from edge_sdk.config import EdgeConfig
    from edge_sdk.errors import FleetError
    from edge_sdk.runtime import SlmSession

# Since 1.29 ONNX Runtime's official Linux wheels report session events to their maker unless this
# is set before they are loaded. Here nothing leaves a device unless its owner turns it on.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = ["EdgeConfig", "EdgeDevice", "Example", "FleetError", "SlmSession"]

_HOME = {
    "EdgeConfig": "edge_sdk.config",
    "EdgeDevice": "edge_sdk.agent",
    "Example": "edge_sdk.collect",
    "FleetError": "edge_sdk.errors",
    "SlmSession": "edge_sdk.runtime",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'edge_sdk' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
