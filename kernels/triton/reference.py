"""What every kernel of lorap computes, in plain torch: the meaning of the ops, and their implementation where no kernel fits.

Shapes: x (..., K), right (R, K), left (N, R), weights (N, K). A group is a list of layers that read the same x; a tensor
without elements stands for "none" in a list. Nothing here needs triton, a compiler or a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor

from lorap.kernels import trellis
from lorap.kernels.packing import dequantize
from lorap.kernels.trellis_search import search

# float32 sums run over at most this many tokens before they are added up in float64: over 2^21 tokens one float32
# accumulator is off by 7e-4, this way by 2e-6.
CHUNK_TOKENS = 1024


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,) or None.

    Returns:
        (..., N).
    """
    return F.linear(_without_gaps(x), weight, bias)


def _without_gaps(x: Tensor) -> Tensor:
    """x, copied where torch could multiply what lies between its rows: with AMX, torch 2.13 reads K up to a multiple of 32.

    What is read too much is multiplied by 0, which is NaN where it is NaN or infinite (findings/torch-amx-gaps.sh). bfloat16 was
    seen; processors with AMX for float16 are given the same code.
    """
    halves = x.dtype == torch.bfloat16 or x.dtype == torch.float16
    if halves and x.shape[-1] % 32 and x.is_cpu and x.layout == torch.strided:
        return x.contiguous()
    return x


def low_rank_linear(
    x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None = None, pivot_rows: Tensor | None = None
) -> Tensor:
    """x @ right.T @ left.T + bias.

    Args:
        x: (..., K).
        right: (R, K).
        left: (N, R); with ``pivot_rows`` (N - R, R).
        bias: (N,) or None.
        pivot_rows: (R,) ascending int64, for a layer that is stored pivoted: output row ``pivot_rows[i]`` is the i-th
            output of the shrink stage itself, and ``left`` holds the other rows in their order.

    Returns:
        (..., N).
    """
    if pivot_rows is not None and not len(left):
        return linear(x, right, bias)
    shrunk = linear(x, right)
    if pivot_rows is None:
        return linear(shrunk, left, bias)
    y = torch.cat((shrunk, linear(shrunk, left)), dim=-1)
    y = y.index_select(-1, output_order(pivot_rows, y.shape[-1]))
    return y if bias is None else y + bias


def output_order(pivot_rows: Tensor, out_features: int) -> Tensor:
    """(N,): where each output row is found in [pivot rows, other rows]. Works without reading values back from a GPU."""
    rank = pivot_rows.shape[0]
    is_pivot = torch.zeros(out_features, dtype=torch.bool, device=pivot_rows.device)
    is_pivot = is_pivot.index_fill(0, pivot_rows, True)
    before = is_pivot.cumsum(0)  # pivots up to and including this row
    rows = torch.arange(out_features, device=pivot_rows.device)
    return torch.where(is_pivot, before - 1, rank + rows - before)


def low_rank_linear_group(
    x: Tensor,
    right: Sequence[Tensor],
    left: Sequence[Tensor],
    bias: Sequence[Tensor] | None = None,
    pivot_rows: Sequence[Tensor] | None = None,
) -> Tensor:
    """Several low-rank layers on one x, e.g. q, k and v.

    A dense layer joins a group as the pivoted layer whose every row is a pivot: left (0, N), pivot_rows 0 ... N - 1.

    Args:
        x: (..., K).
        right: (R_i, K) of each layer.
        left: (N_i, R_i) of each, or (N_i - R_i, R_i) where it is pivoted.
        bias: None or empty, or (N_i,) of each, without elements where a layer has none.
        pivot_rows: None or empty, or (R_i,) int64 of each, without elements where a layer has none.

    Returns:
        (..., N_1 + N_2 + ...): their outputs side by side.
    """
    outputs = [low_rank_linear(x, right[i], left[i], _item(bias, i), _item(pivot_rows, i)) for i in range(len(right))]
    return torch.cat(outputs, dim=-1)


def silu_gated_linear(
    x: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor | None = None, up_bias: Tensor | None = None
) -> Tensor:
    """silu(x @ gate.T + gate_bias) * (x @ up.T + up_bias), the first half of a gated FFN.

    Args:
        x: (..., K).
        gate: (N, K).
        up: (N, K).
        gate_bias: (N,) or None.
        up_bias: (N,) or None.

    Returns:
        (..., N).
    """
    return F.silu(linear(x, gate, gate_bias)) * linear(x, up, up_bias)


def low_rank_silu_gated_linear(
    x: Tensor, right: Sequence[Tensor], left: Sequence[Tensor], bias: Sequence[Tensor] | None = None
) -> Tensor:
    """:func:`silu_gated_linear` where gate and up are low-rank; neither is pivoted.

    Args:
        x: (..., K).
        right: (R_i, K) of gate and of up.
        left: (N, R_i) of both.
        bias: None or empty, or (N,) of both, without elements where one has none.

    Returns:
        (..., N).
    """
    gate, up = (low_rank_linear(x, right[i], left[i], _item(bias, i)) for i in range(2))
    return F.silu(gate) * up


def quantized_linear(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, bits: int, group: int) -> Tensor:
    """:func:`linear` with a weight of whole numbers and scales: x @ (q * scale).T + bias.

    Args:
        x: (..., K).
        packed: (N, ceil(K * bits / 32)) int32, see :mod:`lorap.kernels.packing`.
        scales: (N, ceil(K / group)), floating point; taken in the dtype of x.
        bias: (N,) or None.
        bits: of a number: 4 or 8.
        group: how many numbers of a row share a scale, a multiple of 32; the last group may have fewer.

    Returns:
        (..., N).
    """
    return linear(x, dequantize(packed, scales, bits, group, x.shape[-1], x.dtype), bias)


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
    """:func:`low_rank_linear` with both factors as in :func:`quantized_linear`: (x @ right.T) @ left.T + bias.

    Args:
        x: (..., K).
        left_packed: (N, ceil(R * bits / 32)) int32; with ``pivot_rows`` N - R rows.
        left_scales: (N, ceil(R / group)); with ``pivot_rows`` N - R rows.
        right_packed: (R, ceil(K * bits / 32)) int32.
        right_scales: (R, ceil(K / group)).
        bias: (N,) or None.
        bits: of a number, in both factors: 4 or 8.
        group: of both factors, as in :func:`quantized_linear`.
        pivot_rows: (R,) ascending int64, or None, as in :func:`low_rank_linear`.

    Returns:
        (..., N).
    """
    right = dequantize(right_packed, right_scales, bits, group, x.shape[-1], x.dtype)
    left = dequantize(left_packed, left_scales, bits, group, len(right_packed), x.dtype)
    return low_rank_linear(x, right, left, bias, pivot_rows)


def quantized_silu_gated_linear(
    x: Tensor, gate_packed: Tensor, gate_scales: Tensor, up_packed: Tensor, up_scales: Tensor, bits: int, group: int
) -> Tensor:
    """:func:`silu_gated_linear` without biases, gate and up as in :func:`quantized_linear`; x (..., K) to (..., N)."""
    gate = quantized_linear(x, gate_packed, gate_scales, None, bits, group)
    return F.silu(gate) * quantized_linear(x, up_packed, up_scales, None, bits, group)


def trellis_linear(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, bits: int, group: int) -> Tensor:
    """:func:`linear` with a weight of numbers on a trellis and scales, see :mod:`lorap.kernels.trellis`.

    Args:
        x: (..., K).
        packed: (ceil(N / 64), K * 2 * bits) int32.
        scales: (N, ceil(K / group)), floating point; taken in the dtype of x.
        bias: (N,) or None.
        bits: of a weight: 2 to 6.
        group: how many weights of a row share a scale, a multiple of 32; the last group may have fewer.

    Returns:
        (..., N).
    """
    return linear(x, trellis.dequantize(packed, scales, bits, group, x.dtype), bias)


trellis_search = search


def channel_sq_norm(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum over tokens of x_j^2, and the number of tokens: (K,) float64 and () int64.

    ``mask`` of shape (...) marks the tokens that count; what stands in the others, NaN too, has no influence.
    """
    total = torch.zeros(x.shape[-1], dtype=torch.float64, device=x.device)
    for chunk in masked_chunks(x, mask, torch.float32):
        total += chunk.square().sum(0).double()
    return total, token_count(x, mask)


def second_moment(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum over tokens of x x^T, and the number of tokens: (K, K) float64 and () int64; mask as in channel_sq_norm.

    Products and sums are float64: covariances subtract numbers that may agree in all digits of a float32.
    """
    total = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64, device=x.device)
    for chunk in masked_chunks(x, mask, torch.float64):
        total += chunk.T @ chunk
    return total, token_count(x, mask)


def token_count(x: Tensor, mask: Tensor | None) -> Tensor:
    """How many tokens of x (..., K) count: () int64, on the device of x."""
    if mask is not None:
        return mask.bool().sum()
    return torch.full((), x.shape[:-1].numel(), dtype=torch.int64, device=x.device)


def masked_chunks(
    x: Tensor, mask: Tensor | None, dtype: torch.dtype, *, tokens: int = CHUNK_TOKENS
) -> Iterator[Tensor]:
    """The tokens of x in pieces; those that do not count are zero.

    Args:
        x: (..., K).
        mask: (...), False on tokens that do not count; None where all do.
        dtype: of the pieces.
        tokens: at most so many in a piece.

    Returns:
        Pieces (tokens, K).
    """
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    counts = repeat(None) if mask is None else mask.reshape(-1, 1).bool().split(tokens)
    for chunk, counted in zip(x.split(tokens), counts, strict=False):
        chunk = chunk.to(dtype)
        yield chunk if counted is None else chunk.where(counted, 0.0)


def _item(tensors: Sequence[Tensor] | None, index: int) -> Tensor | None:
    return tensors[index] if tensors and tensors[index].numel() else None
