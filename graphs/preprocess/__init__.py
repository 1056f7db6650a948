"""Pictures and prompts to tensors."""
