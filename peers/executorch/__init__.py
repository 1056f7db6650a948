"""ExecuTorch's own flow for language models."""
