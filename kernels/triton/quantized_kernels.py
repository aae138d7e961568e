"""The kernels on weights of 4 and 8 bits, around the products of :mod:`lorap.kernels.quantized_product`."""

from __future__ import annotations

import triton
import triton.language as tl

from .low_rank_kernels import load_sum, output_rows
from .quantized_product import centered, packed_product


@triton.jit(do_not_specialize=["M"])
def quantized_linear_kernel(
    x_ptr,  # (PARTS, M, K)
    packed_ptr,  # (N, row_steps * ALIGN), int32 for one token
    scales_ptr,  # (N, row_groups)
    bias_ptr,  # (N + pivots,) or None
    pivots_ptr,  # (K,) int64, ascending, or None
    y_ptr,  # (SPLIT_K, M, N + pivots)
    M,
    N,
    K,
    row_steps,
    row_groups,
    steps_per_part,
    stride_xm,
    stride_xp,
    stride_ym,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """y[part, m] = weight @ x[m] over the columns of the part; with pivots the last programs write y[m, pivots[r]] = x[m, r]."""
    block = tl.program_id(0)
    part = tl.program_id(1)
    first_token = tl.program_id(2) * BLOCK_M
    tokens = tl.arange(0, BLOCK_M)[None, :]
    present = tokens < M - first_token
    x_ptr += first_token.to(tl.int64) * stride_xm
    if pivots_ptr is not None:
        copies = block - tl.cdiv(N, BLOCK_N)
    else:
        copies: tl.constexpr = -1
    if copies >= 0:
        rows = copies * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = rows < K
        y = load_sum(x_ptr + tokens * stride_xm + rows[:, None], stride_xp, mask[:, None] & present, PARTS).to(
            tl.float32
        )
        outputs = tl.load(pivots_ptr + rows, mask=mask, other=0).to(tl.int32)
    else:
        rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = rows < N
        first_row = (block * BLOCK_N).to(tl.int64)
        y = packed_product(
            packed_ptr + first_row * row_steps * ALIGN,
            scales_ptr + first_row * row_groups,
            N - block * BLOCK_N,
            K,
            row_steps,
            row_groups,
            part * steps_per_part,
            tl.minimum((part + 1) * steps_per_part, tl.cdiv(K, TILES * BLOCK_K)),
            x_ptr,
            M - first_token,
            stride_xm,
            stride_xp,
            DTYPE,
            PARTS,
            BITS,
            GROUP,
            ALIGN,
            TILES,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        outputs = rows
        if pivots_ptr is not None:
            index = tl.arange(0, BLOCK_P)
            pivots = tl.load(pivots_ptr + index, mask=index < K, other=2**31 - 1).to(tl.int32)
            outputs = output_rows(block * BLOCK_N, pivots, BLOCK_N, BLOCK_P)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + outputs, mask=mask, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + (part * M + first_token + tokens).to(tl.int64) * stride_ym + outputs[:, None]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask[:, None] & present)


@triton.jit(do_not_specialize=["M"])
def quantized_silu_gated_kernel(
    x_ptr,  # (M, K)
    gate_ptr,  # (N, row_steps * ALIGN), int32 for one token
    gate_scales_ptr,  # (N, row_groups)
    up_ptr,
    up_scales_ptr,
    y_ptr,  # (M, N)
    M,
    N,
    K,
    row_steps,
    row_groups,
    stride_xm,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """y = silu(x @ gate.T) * (x @ up.T)."""
    first_row = (tl.program_id(0) * BLOCK_N).to(tl.int64)
    first_token = tl.program_id(1) * BLOCK_M
    words, groups = first_row * row_steps * ALIGN, first_row * row_groups
    x_ptr += first_token.to(tl.int64) * stride_xm
    gate = packed_product(
        gate_ptr + words,
        gate_scales_ptr + groups,
        N - first_row.to(tl.int32),
        K,
        row_steps,
        row_groups,
        0,
        tl.cdiv(K, TILES * BLOCK_K),
        x_ptr,
        M - first_token,
        stride_xm,
        0,
        DTYPE,
        1,
        BITS,
        GROUP,
        ALIGN,
        TILES,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    up = packed_product(
        up_ptr + words,
        up_scales_ptr + groups,
        N - first_row.to(tl.int32),
        K,
        row_steps,
        row_groups,
        0,
        tl.cdiv(K, TILES * BLOCK_K),
        x_ptr,
        M - first_token,
        stride_xm,
        0,
        DTYPE,
        1,
        BITS,
        GROUP,
        ALIGN,
        TILES,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    tokens = tl.arange(0, BLOCK_M)[None, :]
    y = gate * tl.sigmoid(gate) * up
    y_ptrs = y_ptr + (first_token + tokens).to(tl.int64) * N + rows
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(rows < N) & (tokens < M - first_token))


@triton.jit
def dequantize_kernel(
    packed_ptr,  # (N, row_words * 4) uint8
    scales_ptr,  # (N, row_groups)
    dense_ptr,  # (N, K)
    N,
    K,
    row_words,
    row_groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dense = numbers * scales, rounded once."""
    BYTES: tl.constexpr = BLOCK_K * BITS // 8
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    places = tl.program_id(1) * BYTES + tl.arange(0, BYTES)[None, :]
    stored = tl.load(packed_ptr + rows * row_words * 4 + places, mask=(rows < N) & (places < row_words * 4), other=0)
    if BITS == 4:
        stored = tl.reshape(tl.join(stored & 15, stored >> 4), (BLOCK_N, BLOCK_K))
    inside = (rows < N) & (columns < K)
    scales = tl.load(scales_ptr + rows * row_groups + columns // GROUP, mask=inside, other=0.0).to(tl.float32)
    weight = centered(stored, BITS, tl.float32) * scales
    tl.store(dense_ptr + rows * K + columns, weight.to(dense_ptr.dtype.element_ty), mask=inside)
