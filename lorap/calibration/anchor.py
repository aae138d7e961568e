"""Inputs of a linear layer behind the compressed layers, token by token beside those that it has in the dense model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from lorap.calibration.stream import CalibrationStream


@torch.no_grad()
def cross_sums(
    index: int,
    layer: nn.Module,
    linear: nn.Linear,
    *,
    compressed: CalibrationStream,
    dense: CalibrationStream,
    as_dense: Callable[[], AbstractContextManager[None]],
) -> Tensor:
    """(K, K) float64: the sum over all real tokens of x x'^T, with x in the dense model and x' in the compressed one.

    Args:
        index: of the layer.
        layer: the decoder layer, in memory, with the projections before ``linear`` compressed already, or not.
        linear: still dense, inside of ``layer``.
        compressed: windows before the layer, behind the compressed ones before it.
        dense: the same windows in the dense model.
        as_dense: while it is entered, ``layer`` is what it was.
    """
    size = linear.in_features
    sums = torch.zeros(size, size, dtype=torch.float64, device=linear.weight.device)
    originals = dense.record(index, layer, linear)
    for batch, (now, *_) in compressed.record(index, layer, linear):
        with as_dense():
            _, (before, *_) = next(originals)
        now, before = (x if batch.mask is None else x[batch.mask] for x in (now, before))
        precision = torch.promote_types(now.dtype, torch.float32)
        sums += before.flatten(0, -2).to(precision).T @ now.flatten(0, -2).to(precision)
    compressed.processes.all_reduce(sums)
    return sums
