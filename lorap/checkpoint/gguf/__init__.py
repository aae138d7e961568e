"""GGUF files of llama.cpp: written for it, and read as transformers models."""

from lorap.checkpoint.gguf.header import GGUFHeader, find_gguf, read_gguf
from lorap.checkpoint.gguf.reading import check_gguf_file, gguf_config, load_gguf
from lorap.checkpoint.gguf.tokenizer import load_gguf_tokenizer
from lorap.checkpoint.gguf.writing import FILE_TYPES, check_gguf, pre_tokenizer_name, write_gguf

__all__ = [
    "FILE_TYPES",
    "GGUFHeader",
    "check_gguf",
    "check_gguf_file",
    "find_gguf",
    "gguf_config",
    "load_gguf",
    "load_gguf_tokenizer",
    "pre_tokenizer_name",
    "read_gguf",
    "write_gguf",
]
