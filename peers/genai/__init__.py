"""onnxruntime-genai: the decoder as its own model builder makes it."""
