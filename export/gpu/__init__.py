"""`make bench-gpu`: TensorRT engines on an NVIDIA GPU beside torch, in one command of ten minutes."""
