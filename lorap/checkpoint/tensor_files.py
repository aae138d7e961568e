"""Tensors written to safetensors files piece by piece, from memory or from other files, so that nothing is held twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Union

import torch
from torch import Tensor

from lorap.checkpoint.stored_tensors import STORED_DTYPES, StoredTensor, read_pieces

DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}


@dataclass(frozen=True)
class Cast:
    """A stored tensor that is to be written in another dtype."""

    stored: StoredTensor
    dtype: torch.dtype


Writable = Union[Tensor, StoredTensor, Cast]


def write_tensors(path: Path, tensors: Mapping[str, Writable]) -> None:
    """One safetensors file, in place of any that was there, and on the disk when this returns.

    Raises:
        OSError: the file cannot be written; what there was is gone.
    """
    # In safetensors' own order: large elements first, so that all are aligned.
    order = sorted(tensors, key=lambda name: (-_dtype(tensors[name]).itemsize, name))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        start, end = end, end + nbytes(tensors[name])
        shape, dtype = list(_shape(tensors[name])), DTYPE_NAMES[_dtype(tensors[name])]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}  # type: ignore[dict-item]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        write_all(file.fileno(), memoryview(len(text).to_bytes(8, "little") + text))
        for name in order:
            for piece in _pieces(tensors[name]):
                write_all(file.fileno(), piece)
        os.fsync(file.fileno())


def nbytes(tensor: Writable) -> int:
    """Bytes on disk."""
    return torch.Size(_shape(tensor)).numel() * _dtype(tensor).itemsize


def write_all(file: int, data: memoryview) -> None:
    """All of ``data``; a single write may take less."""
    done = 0
    while done < len(data):
        done += os.write(file, data[done:])


def as_bytes(tensor: Tensor) -> memoryview:
    """The elements of a tensor, row by row."""
    flat: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return flat


def _pieces(tensor: Writable) -> Iterator[memoryview]:
    if isinstance(tensor, StoredTensor):
        for _, piece in read_pieces(tensor):
            yield piece.numpy().data
    else:
        yield as_bytes(tensor.stored.read().to(tensor.dtype) if isinstance(tensor, Cast) else tensor)


def _shape(tensor: Writable) -> tuple[int, ...]:
    return tensor.stored.info.shape if isinstance(tensor, Cast) else tensor.shape


def _dtype(tensor: Writable) -> torch.dtype:
    return tensor.dtype
