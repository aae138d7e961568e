"""Ranks that are no multiple of 16, on a GPU: the factors get zeros beside them in memory, and keep their shapes.

A row of ``left`` with 1,638 numbers of 16 bits begins where loads of 16 bytes cannot, so that kernels, cuBLAS's too, read 2 to 4
bytes at a time. With rows of zeros below ``right`` and columns of zeros beside ``left`` the layer computes the same with a rank
of 1,648. The parameters become views of the larger tensors: names, shapes and what is saved stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MULTIPLE = 16


def pad_ranks(model: nn.Module) -> None:
    """Pad the plain low-rank layers of ``model`` that are on a GPU in 16 bits, see :func:`pad_rank`."""
    for module in model.modules():
        if hasattr(module, "padded"):
            weight = getattr(module.right, "weight", None)
            if type(weight) is nn.Parameter and gains(weight):
                pad_rank(module)


def gains(weight: Tensor) -> bool:
    """Whether wide loads matter where this tensor is."""
    return weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)


def pad_rank(layer: Any) -> None:
    """Lay the factors of a ``LowRankLinear`` out with zeros up to the next rank that is a multiple of 16.

    A pivoted layer stays as it is: each of its ranks is a row of the output.
    """
    right, left = layer.right.weight, layer.left.weight
    rank, room = layer.rank, -layer.rank % MULTIPLE
    if not room or layer.pivot_rows is not None or type(left) is not nn.Parameter:
        return
    rows, columns = right.new_zeros(rank + room, right.shape[1]), left.new_zeros(left.shape[0], rank + room)
    rows[:rank], columns[:, :rank] = right.data, left.data
    right.data, left.data = rows[:rank], columns[:, :rank]
    layer.padded = rows, columns


def factors(layer: Any, right: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """The padded factors of a layer, or those given where these are no longer views of them, or need gradients.

    Args:
        layer: a ``LowRankLinear`` that :func:`pad_rank` has seen.
        right: its factor as it is now, (rank, in_features).
        left: its factor as it is now, (out_features, rank).
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return right, left
    rows, columns = layer.padded
    moved = right.data_ptr() != rows.data_ptr() or left.data_ptr() != columns.data_ptr()
    return (right, left) if moved or left.stride() != columns.stride() else (rows, columns)
