"""Tensors in, tensors out: factorization, pruning, and what they need."""
