"""Weights are numbers: NaN and infinity are refused by the name of the tensor, in the same words wherever they are found."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lorap.errors import CheckpointError


def check_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights with NaN or infinity.

    Args:
        tensors: names and weights, such as ``model.named_parameters()``; of any shape, dtype and device.

    Raises:
        CheckpointError: naming the first such tensor.
    """
    for name, tensor in tensors:
        refuse_not_finite(name, sum(map(count_not_finite, _parts(tensor))), tensor.dtype)


def count_not_finite(tensor: Tensor) -> int:
    """How many values of a tensor are NaN or infinite; of whole numbers and of a meta tensor none are."""
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return 0
    if tensor.dtype.itemsize == 1:
        tensor = tensor.to(torch.bfloat16)  # torch does not ask all kinds of float8
    # NaN goes through both; isfinite makes three tensors as large as this one, and takes 20 times as long on a CPU.
    if all(map(math.isfinite, (end.item() for end in torch.aminmax(tensor)))):
        return 0
    return int((~torch.isfinite(tensor)).sum())


def refuse_not_finite(name: str, count: int, dtype: torch.dtype) -> None:
    """Refuse a tensor with values that are not finite; nothing happens where there are none.

    Args:
        name: of the tensor.
        count: how many of its values are NaN or infinite.
        dtype: that it has in memory.

    Raises:
        CheckpointError: ``count`` is above 0.
    """
    if count:
        narrow = ", or they are too large for float16: try --dtype float32" if dtype == torch.float16 else ""
        raise CheckpointError(
            f"{name} contains {count:,} values that are NaN or infinite; the checkpoint is damaged{narrow}"
        )


def check_scales(scales: Tensor, name: str) -> None:
    """Refuse scales that are no floating-point numbers.

    Args:
        scales: (rows, groups).
        name: full name of the tensor.

    Raises:
        CheckpointError: naming tensor, dtype or place, and value.
    """
    if not scales.is_floating_point():
        raise CheckpointError(f"{name} is {scales.dtype}; floating point is needed")
    if not bool(torch.isfinite(scales).all()):
        row, group = (~torch.isfinite(scales)).nonzero()[0].tolist()
        raise CheckpointError(
            f"{name} is {float(scales[row, group])} in row {row}, group {group}; the checkpoint is damaged, "
            "download or copy it again"
        )


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """What a quantized or distributed tensor holds: integers and scales, or its piece."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _parts(getattr(tensor, name))
