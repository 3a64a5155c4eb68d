"""The errors of this package. Knows nothing else.

ValueError
+-- CodecError     codes or a codec file from elsewhere that must not be believed; refuse them
+-- WeightsError   a model bundle's weights.json and its data file do not fit each other
"""


class CodecError(ValueError):
    """Codes or a codec file are malformed, truncated, oversized or made for another layout."""


class WeightsError(ValueError):
    """A bundle's quantized weights cannot be read; the message names tensor and reason."""
