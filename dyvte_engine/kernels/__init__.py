"""The native operations with their plain-torch twins, and the attention backends. Knows tensors, not models."""
