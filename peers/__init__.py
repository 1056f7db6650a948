"""Ours beside the peers: the same shapes, the same threads, one run (`make bench-peers`)."""
