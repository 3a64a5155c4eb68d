"""The errors of this package. Knows nothing else.

ValueError
+-- CodecError     codes or a codec file from elsewhere that must not be believed; refuse them
|   +-- TooFewBytes  an allowance below what headers alone take; nothing was encoded
+-- WeightsError   a model bundle's weights.json and its data file do not fit each other
"""


class CodecError(ValueError):
    """Codes or a codec file are malformed, truncated, oversized or made for another layout."""


class TooFewBytes(CodecError):  # noqa: N818 - says what there is too little of
    """A byte target is below the least that an update takes; the message names both."""


class WeightsError(ValueError):
    """A bundle's quantized weights cannot be read; the message names tensor and reason."""
