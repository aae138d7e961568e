"""Which calls the kernels of csrc/cuda take: what they are written for, and what they keep in shared memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Tokens of the kernel that multiplies and adds, and of the one on tensor cores; layers that one launch serves.
FMA_TOKENS, MMA_TOKENS, LAYERS = 8, 16, 3
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
    tokens: int, x: Tensor, right: Sequence[Tensor], left: Sequence[Tensor], pivot_rows: Sequence[Tensor] = ()
) -> bool:
    """Whether one launch serves these contiguous tensors on the GPU they are on.

    Args:
        tokens: how many tokens x holds.
        x: (..., K).
        right: (R_i, K) of each layer.
        left: (N_i, R_i) of each, or (N_i - R_i, R_i).
        pivot_rows: empty, or (R_i,) of each, without elements where a layer has none.
    """
    ranks = [len(one) for one in right]
    fits = tokens <= MMA_TOKENS and len(right) <= LAYERS and not any(size % 8 for size in (x.shape[-1], *ranks))
    if not fits or not all(map(is_aligned, (x, *right, *left, *pivot_rows))):
        return False
    gpu = torch.cuda.get_device_properties(x.device)
    pivots = [len(one) for one in pivot_rows] or [0] * len(ranks)
    needed = shared_bytes(tokens, ranks, [len(one) for one in left], pivots, gpu.multi_processor_count)
    return gpu.shared_memory_per_multiprocessor >= needed + RESERVED_BYTES
