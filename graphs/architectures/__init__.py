"""One file a system, or a family of near-twins; found by file name, see `graphs.registry`."""
