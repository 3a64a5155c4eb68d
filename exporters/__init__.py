"""From a trained torch model to a signed ONNX bundle that agrees with it, or an error."""
