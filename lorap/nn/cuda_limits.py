"""Which calls the kernels of csrc/cuda take: what they are written for, and what they keep in shared memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorap.kernels import cost, packing

# Tokens of the kernel that multiplies and adds, and of the one on tensor cores; layers that one launch serves.
FMA_TOKENS, MMA_TOKENS, LAYERS = 8, 16, 3
PACKED_COLUMNS = 2**19  # less of these
# Bytes of shared memory that the one on tensor cores takes on a multiprocessor, beside 8 for each pivot; that CUDA keeps of it.
MMA_SHARED_BYTES, RESERVED_BYTES = 104 * 1024, 1024


def is_aligned(tensor: Tensor) -> bool:
    """Whether loads of 16 bytes can begin where the tensor does."""
    return tensor.data_ptr() % 16 == 0


def shared_bytes(tokens: int, ranks: Sequence[int], rows: Sequence[int], pivots: Sequence[int], blocks: int) -> int:
    """Bytes of shared memory without which a launch fails; with more, the kernel for few tokens fetches ``left`` early.

    Args:
        tokens: 1 to ``MMA_TOKENS``.
        ranks: of each layer.
        rows: of each left factor.
        pivots: rows of each output that are rows of the shrink stage.
        blocks: of the launch, one for each multiprocessor.
    """
    needed = [bool(count) for count in rows]  # a layer of nothing but pivots keeps neither these nor what it shrinks to
    pivot_bytes = 8 * sum(count for count, one in zip(pivots, needed, strict=True) if one)
    if tokens > FMA_TOKENS:
        return MMA_SHARED_BYTES + pivot_bytes
    shrunk = sum(rank for rank, one in zip(ranks, needed, strict=True) if one)
    partial_sums = 8 * sum(-(-rank // blocks) for rank in ranks)  # of each warp
    return 4 * (1 << (tokens - 1).bit_length()) * max(shrunk, partial_sums) + pivot_bytes


def takes(
    tokens: int,
    x: Tensor,
    right: Sequence[Tensor],
    left: Sequence[Tensor],
    pivot_rows: Sequence[Tensor] = (),
    *,
    bits: Sequence[int] = (),
    scales: Sequence[Tensor] = (),
) -> bool:
    """Whether one launch serves these contiguous tensors on the GPU they are on.

    K and each R are multiples of the weights that 16 bytes hold. Layers of 4 and of 8 bits may be mixed.

    Args:
        tokens: how many tokens x holds.
        x: (..., K).
        right: (R_i, K) of each layer, or as many rows of packed words.
        left: (N_i, R_i) of each, or (N_i - R_i, R_i); or as many rows of packed words.
        pivot_rows: empty, or (R_i,) of each, without elements where a layer has none.
        bits: of each layer's packed words; empty for weights of 16 bits.
        scales: of all packed factors.
    """
    ranks, k = [len(one) for one in right], x.shape[-1]
    multiples = [128 // one for one in bits] or [8] * len(ranks)
    fits = tokens <= (FMA_TOKENS if bits else MMA_TOKENS) and len(right) <= LAYERS
    fits = fits and not any(k % one or rank % one for rank, one in zip(ranks, multiples, strict=True))
    if not fits or (bits and max(k, *ranks) >= PACKED_COLUMNS):
        return False
    if not all(map(is_aligned, (x, *right, *left, *pivot_rows, *scales))):
        return False
    gpu = torch.cuda.get_device_properties(x.device)
    pivots = [len(one) for one in pivot_rows] or [0] * len(ranks)
    needed = shared_bytes(tokens, ranks, [len(one) for one in left], pivots, gpu.multi_processor_count)
    return gpu.shared_memory_per_multiprocessor >= needed + RESERVED_BYTES


def takes_packed(tokens: int, x: Tensor, layers: Sequence[Sequence[Any]]) -> bool:
    """:func:`takes` for layers of few bits on one x, each as what follows x in ``lorap.nn.ops.quantized_low_rank_linear``."""
    left, left_scales, right, right_scales, _, bits, group, *pivots = zip(*layers, strict=True)
    if not set(bits) <= set(packing.BITS) or min(group) < 32:
        return False
    rows = [one for one in (pivots[0] if pivots else ()) if one is not None]
    scales = (*left_scales, *right_scales)
    plain = all(one.is_contiguous() for one in (*left, *right, *scales, *rows))
    if not plain or any(one.dtype != x.dtype for one in scales):
        return False
    given = [right[0].new_empty(0) if one is None else one for one in pivots[0]] if rows else []
    return takes(tokens, x, right, left, given, bits=bits, scales=scales)


def pays_packed(tokens: int, x: Tensor, layers: Sequence[Sequence[Any]]) -> bool:
    """Whether one launch for them is modelled faster than the Triton kernels, layer by layer."""
    left, _, right, _, _, bits, group, *_ = zip(*layers, strict=True)
    return cost.one_launch_pays(tokens, x.shape[-1], tuple(map(len, right)), tuple(map(len, left)), bits, group)
