"""What a model computes: architectures, their weights, and the traced programs made of them."""

import os

# Read when torch is loaded. OpenMP's threads spin while they wait for each other; where another process wants their
# cores, one spins while the other has none, and rounding a layer takes 0.78 s instead of 0.015 (docs/large-models.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
