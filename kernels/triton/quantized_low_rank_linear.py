"""y = x @ right.T @ left.T + bias with both factors in 4 or 8 bits, by the kernel of :mod:`lorap.kernels.quantized_linear`.

One token: the first launch leaves T (parts, R) in float32, several parts where few ranks make few programs; the second adds
them up as it reads them, in their order. More: reading several parts of M rows in each program would take longer than a launch
between them that adds up, so these are two products. Of a pivoted layer the last programs write the columns of T to the rows that
are pivots.

Compiled for sm_80, 90 and 100 and interpreted, never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .aot import Variant
from .low_rank_linear import Launch, run
from .quantized_linear import (
    Weight,
    as_rows,
    check_vector,
    checked,
    linear_launches,
    meta_weight,
    product_launch,
    unique,
)
from .quantized_settings import parts, settings


def quantized_low_rank_linear(
    x: Tensor,
    left_packed: Tensor,
    left_scales: Tensor,
    right_packed: Tensor,
    right_scales: Tensor,
    bias: Tensor | None,
    bits: int,
    group: int,
    pivot_rows: Tensor | None = None,
) -> Tensor:
    """See :func:`lorap.kernels.reference.quantized_low_rank_linear`; for at most ``FUSED_TOKENS`` tokens fast, for more right."""
    right = checked(right_packed, right_scales, bits, group, x.shape[-1], x.dtype)
    left = checked(left_packed, left_scales, bits, group, len(right_packed), x.dtype)
    tokens, n = as_rows(x), len(left_packed) + (0 if pivot_rows is None else len(right_packed))
    check_vector("bias", bias, n)
    check_vector("pivot_rows", pivot_rows, len(right_packed))
    y = x.new_empty(*x.shape[:-1], n)
    run(low_rank_launches(tokens, left, right, bias, pivot_rows, y.view(len(tokens), n)), x)
    return y


def low_rank_launches(
    x: Tensor, left: Weight, right: Weight, bias: Tensor | None, pivot_rows: Tensor | None, y: Tensor
) -> list[Launch]:
    """What writes y (M, N) for x (M, K); nothing where y has no elements."""
    if not y.numel():
        return []
    (m, k), rank = x.shape, len(right.packed)
    bias = None if bias is None else bias.contiguous()
    pivot_rows = None if pivot_rows is None else pivot_rows.contiguous()
    expand = settings(m, rank, len(left.packed), left.bits, left.group) | {"SPLIT_K": 1}
    if m == 1:
        shrink = settings(m, k, rank, right.bits, right.group)
        t = torch.empty(parts(k, shrink), m, rank, dtype=torch.float32, device=x.device)
        first = [product_launch(x[None], right, t, shrink)] if rank else []
        if pivot_rows is not None:  # which take registers, too
            expand["BLOCK_N"] = max(1, expand["BLOCK_N"] // 2)
        return [*first, product_launch(t, left, y[None], expand, bias=bias, pivot_rows=pivot_rows)]
    t = x.new_empty(m, rank)
    first = linear_launches(x, right, None, t)
    if pivot_rows is None:
        return [*first, *linear_launches(t, left, bias, y)]
    return [*first, product_launch(t[None], left, y[None], expand, bias=bias, pivot_rows=pivot_rows)]


def shipped_configs() -> Iterator[Variant]:
    """The kernels as launched on an H200 for layers of known models: plain, and pivoted in 8 bits."""
    yield from unique(_shipped_launches())


def _shipped_launches() -> Iterator[tuple[str, Sequence[Launch]]]:
    for bits, pivoted in ((4, False), (8, False), (8, True)):
        for k, rank, n in ((4096, 1024, 4096), (4096, 1472, 11008)):
            for m in (1, 16):
                x, y = (torch.empty(m, size, dtype=torch.bfloat16, device="meta") for size in (k, n))
                left, right = meta_weight(n - rank * pivoted, rank, bits, 64), meta_weight(rank, k, bits, 64)
                pivots = torch.empty(rank, dtype=torch.int64, device="meta") if pivoted else None
                name = f"low_rank-int{bits}-m{m}-k{k}-{n}r{rank}" + "-pivoted" * pivoted
                yield name, low_rank_launches(x, left, right, None, pivots, y)
