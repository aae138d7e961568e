"""One file per host that can run a compressed model."""
