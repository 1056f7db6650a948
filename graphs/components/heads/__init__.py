"""What is computed from a decoder's states besides its logits."""
