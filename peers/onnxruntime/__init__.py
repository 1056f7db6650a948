"""Plain ONNX Runtime: the vision tower in float32, and as its own static quantizer leaves it."""
