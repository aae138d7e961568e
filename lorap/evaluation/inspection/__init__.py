"""Spectra and channel importances of a dense model."""
