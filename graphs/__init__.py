"""What a model computes: architectures, their weights, and the traced programs made of them."""
