"""Products of many tokens with weights in few bits on a CPU: some rows after the other become a matrix, which torch multiplies.

What one call makes of rows is read from the cache, and its memory serves the next ones. A whole matrix of 4096 x 4096 in 16 bits
is too large for glibc's allocator to keep: writing it costs a page fault for every 4 KB, which takes seven times as long as the
numbers do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorap.kernels import reference, trellis
from lorap.nn import native, shape_checks

# Of rows that are multiplied at a time. With 2 MB and 512 tokens, 4096 x 4096 takes 1.08 x as long as dense on a Zen 4 core, with
# 512 KB 1.08, with 128 KB 2.6; 64 tokens want 2 MB or more.
BLOCK_BYTES = 2**21
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantized_linear(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, bits: int, group: int) -> Tensor:
    """:func:`lorap.kernels.reference.quantized_linear` of tensors that need no gradients, with the same weights."""
    if not _served(x, packed, scales):
        return reference.quantized_linear(x, packed, scales, bias, bits, group)
    columns, unpack = x.shape[-1], torch.ops.lorap_cpu.quantized_weight.default

    def rows(part: slice) -> Tensor:
        return unpack(packed[part], scales[part], columns, bits, group, x.dtype).T

    return _by_rows(x, len(packed), rows, bias)


def quantized_low_rank_linear(x: Tensor, *rest: Any) -> Tensor:
    """:func:`lorap.kernels.reference.quantized_low_rank_linear`, likewise."""
    return two_products(quantized_linear, x, *rest)


def quantized_silu_gated_linear(x: Tensor, gate: Tensor, gate_scales: Tensor, *rest: Any) -> Tensor:
    """:func:`lorap.kernels.reference.quantized_silu_gated_linear`, likewise."""
    up, up_scales, bits, group = rest
    y = F.silu(quantized_linear(x, gate, gate_scales, None, bits, group))
    return y.mul_(quantized_linear(x, up, up_scales, None, bits, group))


def trellis_linear(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, bits: int, group: int) -> Tensor:
    """:func:`lorap.kernels.reference.trellis_linear`, likewise."""
    if not _served(x, packed, scales):
        return reference.trellis_linear(x, packed, scales, bias, bits, group)
    columns, unpack = x.shape[-1], torch.ops.lorap_cpu.trellis_weight.default

    def rows(part: slice) -> Tensor:
        tiles = slice(part.start // trellis.TILE, trellis.tiles(part.stop))
        return unpack(packed[tiles], scales[part], columns, bits, group, x.dtype)

    return _by_rows(x, len(scales), rows, bias)


def two_products(product: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
    """A factor pair by two products; with pivots, torch puts their outputs into their order.

    Args:
        product: of the signature of :func:`quantized_linear`.
        x: (..., K).
        rest: the other arguments of :func:`lorap.kernels.reference.quantized_low_rank_linear`.
    """
    shape_checks.CHECKS["quantized_low_rank_linear"](x, *rest)  # torch lets some misfits pass
    left, left_scales, right, right_scales, bias, bits, group, pivot_rows = rest if len(rest) == 8 else (*rest, None)
    shrunk = product(x, right, right_scales, None, bits, group)
    if pivot_rows is None:
        return product(shrunk, left, left_scales, bias, bits, group)
    y = torch.cat((shrunk, product(shrunk, left, left_scales, None, bits, group)), dim=-1)
    y = y.index_select(-1, reference.output_order(pivot_rows, y.shape[-1]))
    return y if bias is None else y + bias


def _served(x: Tensor, packed: Tensor, scales: Tensor) -> bool:
    fits = x.dtype in DTYPES and scales.dtype in DTYPES and x.numel() > 0
    return native.HAS_CPU and fits and x.is_cpu and packed.is_cpu and scales.is_cpu


def _by_rows(x: Tensor, count: int, rows: Callable[[slice], Tensor], bias: Tensor | None) -> Tensor:
    """x @ weight^T + bias (..., count) of a weight (count, K) whose rows ``rows`` returns, transposed: (K, some)."""
    tokens = x.reshape(-1, x.shape[-1]).contiguous()  # gaps: see reference.linear
    y = tokens.new_empty(len(tokens), count)
    threads = torch.get_num_threads()
    tiles = BLOCK_BYTES * min(max(threads / 2, 1), 8) // (x.shape[-1] * x.element_size() * trellis.TILE)
    step = max(int(tiles), threads) * trellis.TILE
    for first in range(0, count, step):
        part = slice(first, min(first + step, count))
        if bias is None:
            torch.mm(tokens, rows(part), out=y[:, part])
        else:
            torch.addmm(bias[part], tokens, rows(part), out=y[:, part])
    return y.view(*x.shape[:-1], count)
