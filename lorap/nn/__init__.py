"""Layers of a compressed model, their operators and who computes them."""
