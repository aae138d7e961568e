"""Triton kernels of lorap, importable as ``lorap.kernels``; every kernel stands beside a ``_reference`` twin."""
