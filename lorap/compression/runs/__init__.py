"""Compression from files to files, resumed after interruptions."""
