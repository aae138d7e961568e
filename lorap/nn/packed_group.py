"""Low-rank layers of few bits that read the same x, such as q, k and v, in one launch of csrc/cuda."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorap.nn import cuda_limits, dispatch
from lorap.nn.implementations import tokens_of
from lorap.nn.linear import LowRankLinear, is_autocast

OP = "quantized_low_rank_linear"


def in_one_launch(x: Tensor, layers: Sequence[nn.Module]) -> Tensor | None:
    """The outputs of layers side by side, for inference on a GPU.

    Args:
        x: (..., in_features).
        layers: up to 3, each with bits and groups of its own.

    Returns:
        (..., sum of out_features); None where each must run by itself: where one has weights of another kind, a hook or an
        adapter, where the kernel does not take them or is not modelled faster, and in what torch.compile sees.
    """
    if not x.is_cuda or not 1 < len(layers) <= cuda_limits.LAYERS:
        return None
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or is_autocast(x):
        return None
    packed = [layer.packed_arguments() if isinstance(layer, LowRankLinear) else None for layer in layers]
    tokens = tokens_of(x)
    if any(one is None for one in packed) or dispatch.current() != "auto" or dispatch.choose(OP, x, tokens) != "cuda":
        return None
    known: list[Any] = packed
    x = x.contiguous()
    if not cuda_limits.takes_packed(tokens, x, known) or not cuda_limits.pays_packed(tokens, x, known):
        return None
    *factors, bias, bits, group, pivots = map(list, zip(*known, strict=True))
    none = factors[0][0].new_empty(0)
    bias, pivots = ([none if one is None else one for one in some] for some in (bias, pivots))
    y: Tensor = torch.ops.lorap_cuda.quantized_low_rank_linear_group.default(x, *factors, bias, bits, group, pivots)
    return y
