"""Whole numbers of a few bits in int32 words, in compressed-tensors' ``pack-quantized`` layout, and the weights they stand for.

A row of K numbers q in [-2^(bits-1), 2^(bits-1)) is stored as q + 2^(bits-1), lowest bits first: element k is in word
``k * bits // 32``. The last word is filled up with zero bits. The weight is ``q * scale``, with one scale for each ``group``
numbers of a row, and for those that are left at its end.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (4, 8)


def words(numbers: int, bits: int) -> int:
    """int32 words that a row of so many numbers takes."""
    return -(-numbers * bits // 32)


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Numbers (N, K) of any integer type in [-2^(bits-1), 2^(bits-1)) as int32 (N, words(K, bits))."""
    shifted = (numbers.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    rows, columns = shifted.shape
    filled = shifted.new_zeros(rows, words(columns, bits) * 32 // bits)
    filled[:, :columns] = shifted
    if bits == 4:
        filled = filled[:, ::2] | filled[:, 1::2] << 4
    return filled.view(torch.int32) if columns else filled.to(torch.int32)  # no bytes have no words


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """What :func:`pack` was given, (N, columns) int8."""
    if (
        packed.stride(-1) != 1 or not packed.is_contiguous()
    ):  # one column is contiguous with any stride, but has no bytes
        packed = packed.clone(memory_format=torch.contiguous_format)
    shifted = packed.view(torch.uint8)
    if bits == 8:
        return (shifted[:, :columns] ^ 128).view(
            torch.int8
        )  # the highest bit is the only one in which q + 128 and q differ
    halves = torch.stack((shifted & 15, shifted >> 4), dim=-1).flatten(1)
    return halves[:, :columns].view(torch.int8) - 8


def dequantize(packed: Tensor, scales: Tensor, bits: int, group: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight (N, columns) that packed numbers and scales (N, ceil(columns / group)) stand for, in ``dtype``."""
    numbers, scales, group = unpack(packed, bits, columns).to(dtype), scales.to(dtype), min(group, columns)
    if columns % group or scales.requires_grad:
        return numbers * by_column(scales, group, columns)
    # A scale for each number, and a second matrix, take two to four times as long.
    numbers.unflatten(1, (-1, group)).mul_(scales.unsqueeze(-1))
    return numbers


def by_column(scales: Tensor, group: int, columns: int) -> Tensor:
    """(N, columns): of each number of a row the scale of its group."""
    return scales.repeat_interleave(min(group, columns), dim=1)[:, :columns]
