"""Small trained checkpoints that ship with vlmx, and what trains and measures them."""
