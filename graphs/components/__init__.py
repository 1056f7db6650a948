"""Parts that architectures are composed of, by family."""
