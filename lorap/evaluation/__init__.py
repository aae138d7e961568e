"""Judging and looking at models: perplexity, tasks, profiles, spectra, comparisons."""
