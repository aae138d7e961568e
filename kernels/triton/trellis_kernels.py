"""Device code for weights on a trellis (:mod:`lorap.kernels.trellis`), which become numbers in registers and nowhere else.

A thread takes eight rows of a column, of 5 and 6 bits four, from two neighbouring words of its ring, as one word of 64 bits:
their windows are that word shifted by constants. A window costs a shift, a mask and a multiplication; the four bytes of the
product, signed, are added up by one instruction (dp4a), which begins with the bits of a float so large that its lowest bits
count ones. Subtracting that float makes a number of it, without a conversion of integers, which a GPU computes at a quarter of
the rate or less.

Numbers are whole here, from -476 to 450, and ``UNIT`` is multiplied by at the end. float16 and float32 hold all of them; bfloat16
rounds odd ones above 256, 4 % of all, by 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import trellis

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
TILE = tl.constexpr(trellis.TILE)
FACTOR = tl.constexpr(trellis.FACTOR)
UNIT = tl.constexpr(trellis.UNIT)
LAST = tl.constexpr(2**trellis.WINDOW - 1)


@triton.jit
def _plus_signed_bytes(start: tl.constexpr, products):
    """start + the sum of the four signed bytes of each int32."""
    if INTERPRETED:  # which has no inline PTX
        total = start + (products >> 24) + (products << 8 >> 24) + (products << 16 >> 24) + (products << 24 >> 24)
    else:
        total = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [products, 0x01010101, start], tl.int32, is_pure=True, pack=1
        )
    return total


@triton.jit
def _numbers(windows, dtype: tl.constexpr):
    """What windows (any integer type, with any bits above their own) stand for, in ``UNIT``, in ``dtype``."""
    # In 32 bits, the lowest of the product; the interpreter takes an overflow for a mistake unless told otherwise.
    products = tl.mul(windows.to(tl.int32) & LAST, FACTOR, sanitize_overflow=False)
    if dtype == tl.float16:  # the bits of 1536 are followed by nine that count ones, and one more may be borrowed
        numbers = _plus_signed_bytes(0x6600, products).to(tl.int16).to(tl.float16, bitcast=True) - 1536.0
    else:  # those of 1.5 * 2^23
        numbers = _plus_signed_bytes(0x4B400000, products).to(tl.float32, bitcast=True) - 12582912.0
    return numbers.to(dtype)


@triton.jit
def tile_numbers(
    packed_ptr,  # to the first word of a column of a tile
    num_columns,
    dtype: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_K, 64): the columns from there on of one tile, each a row here; zeros from num_columns on."""
    WORDS: tl.constexpr = TILE * BITS // 32
    ROWS: tl.constexpr = 8 if BITS <= 4 else 4  # whose windows end in the word after the one that the first begins in
    first = tl.arange(0, TILE // ROWS) * (ROWS * BITS)  # bits of the ring
    columns = tl.arange(0, BLOCK_K)[:, None]
    packed_ptrs = packed_ptr + columns * WORDS
    low = tl.load(packed_ptrs + (first // 32)[None, :], mask=columns < num_columns, other=0)
    high = tl.load(packed_ptrs + ((first // 32 + 1) % WORDS)[None, :], mask=columns < num_columns, other=0)
    windows = low.to(tl.uint32, bitcast=True).to(tl.uint64) | (high.to(tl.uint64) << 32)  # (BLOCK_K, TILE // ROWS)
    if BITS != 4:  # where all begin with a word
        windows = windows >> (first % 32).to(tl.uint64)[None, :]
    if ROWS == 8:
        windows = tl.join(windows, windows >> (4 * BITS))
    windows = tl.join(windows, windows >> (2 * BITS))
    windows = tl.join(windows, windows >> BITS)
    return _numbers(tl.reshape(windows, (BLOCK_K, TILE)), dtype)


@triton.jit(do_not_specialize=["M"])
def trellis_linear_kernel(
    x_ptr,  # (M, K)
    packed_ptr,  # (tiles, K * words)
    scales_ptr,  # (N, row_groups)
    bias_ptr,  # (N,) or None
    y_ptr,  # (SPLIT_K, M, N)
    M,
    N,
    K,
    row_groups,
    steps_per_part,
    stride_xm,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """y[part, m] = weight @ x[m] for the rows of one tile, over the columns of the part. BLOCK_K divides GROUP."""
    part = tl.program_id(1)
    first_token = tl.program_id(2) * BLOCK_M
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tokens = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_K)
    present = (tokens < M - first_token)[:, None]
    packed_ptr += tl.program_id(0).to(tl.int64) * K * (TILE * BITS // 32)
    scales_ptrs = scales_ptr + rows.to(tl.int64) * row_groups
    x_ptrs = x_ptr + (first_token + tokens).to(tl.int64)[:, None] * stride_xm + columns[None, :]
    acc = tl.zeros((BLOCK_M, TILE), tl.float32)
    for step in range(part * steps_per_part, tl.minimum((part + 1) * steps_per_part, tl.cdiv(K, BLOCK_K))):
        k = step * BLOCK_K
        numbers = tile_numbers(packed_ptr + k * (TILE * BITS // 32), K - k, DTYPE, BITS, BLOCK_K)
        x = tl.load(x_ptrs + k, mask=present & (columns < K - k)[None, :], other=0.0).to(DTYPE)
        scales = tl.load(scales_ptrs + k // GROUP, mask=rows < N, other=0.0).to(tl.float32)
        acc += tl.dot(x, numbers, input_precision="ieee") * scales[None, :]
    y = acc * UNIT
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + (part * M + first_token + tokens).to(tl.int64)[:, None] * N + rows[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=present & (rows < N)[None, :])


@triton.jit
def dequantize_trellis_kernel(
    packed_ptr,  # (tiles, K * words)
    scales_ptr,  # (N, row_groups)
    dense_ptr,  # (N, K)
    N,
    K,
    row_groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dense = numbers * scales, rounded once. BLOCK_K divides GROUP."""
    k = tl.program_id(1) * BLOCK_K
    columns = tl.arange(0, BLOCK_K)[None, :]
    rows = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    packed_ptr += (tl.program_id(0).to(tl.int64) * K + k) * (TILE * BITS // 32)
    numbers = tile_numbers(packed_ptr, K - k, tl.float32, BITS, BLOCK_K)
    scales = tl.load(scales_ptr + rows * row_groups + k // GROUP, mask=rows < N, other=0.0).to(tl.float32)
    weight = tl.trans(numbers) * (scales * UNIT)[:, None]
    dense_ptrs = dense_ptr + rows[:, None] * K + k + columns
    tl.store(dense_ptrs, weight.to(dense_ptr.dtype.element_ty), mask=(rows < N)[:, None] & (columns < K - k))
