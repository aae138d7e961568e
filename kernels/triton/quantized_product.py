"""Device code for weights of 4 and 8 bits (:mod:`lorap.kernels.packing`), which become numbers in registers and nowhere else.

A row of a weight is ``ceil(K * bits / 32)`` words and ``ceil(K / GROUP)`` scales. Sums over the whole numbers of a group come
first and are multiplied by the group's scale then, so a scale costs one multiplication for 32 numbers and more.

A float32 with the bits of 2^23 holds a whole number of up to 23 bits in its lowest ones: or-ing these in and subtracting 2^23
makes a float of an integer without a conversion, which a GPU computes at a quarter of the rate or less.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .low_rank_kernels import load_sum


@triton.jit
def centered(stored, BITS: tl.constexpr, dtype: tl.constexpr):
    """q in ``dtype``, of q + 2^(BITS - 1) as it is stored; exact, also in 16 bits."""
    half: tl.constexpr = 1 << (BITS - 1)
    if dtype == tl.float16:  # the bits of 1024 are followed by ten that count ones
        number = (stored.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - (1024.0 + half)
    elif dtype == tl.bfloat16 and BITS == 4:  # those of 128 by seven
        number = (stored.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - (128.0 + half)
    else:
        number = (stored.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + half)
    return number.to(dtype)


@triton.jit
def _in_place(words, BITS: tl.constexpr, PLACE: tl.constexpr):
    """q * 2^(BITS * PLACE) in float32, of the number that is stored at that place of the lower half of each word."""
    ONE: tl.constexpr = 1 << (BITS * PLACE)
    stored = ((words & (ONE * ((1 << BITS) - 1))) | 0x4B000000).to(tl.float32, bitcast=True)
    return stored - (8388608.0 + ONE * (1 << (BITS - 1)))


@triton.jit
def _by_place(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PLACES: tl.constexpr):
    """x (ROWS, COLUMNS, PLACES) taken apart along its last axis, in order: what each place of a word is multiplied by."""
    even, odd = tl.split(tl.reshape(x, (ROWS, COLUMNS, PLACES // 2, 2)))
    if PLACES == 2:
        by_place = tl.reshape(even, (ROWS, COLUMNS)), tl.reshape(odd, (ROWS, COLUMNS))
    elif PLACES == 4:
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        by_place = x0, x1, x2, x3
    else:
        x04, x26 = tl.split(tl.reshape(even, (ROWS, COLUMNS, 2, 2)))
        x15, x37 = tl.split(tl.reshape(odd, (ROWS, COLUMNS, 2, 2)))
        x0, x4 = tl.split(x04)
        x1, x5 = tl.split(x15)
        x2, x6 = tl.split(x26)
        x3, x7 = tl.split(x37)
        by_place = x0, x1, x2, x3, x4, x5, x6, x7
    return by_place


@triton.jit
def _row_product(
    packed_ptr,  # (num_rows, row_steps * ALIGN) int32
    scales_ptr,  # (num_rows, row_groups)
    num_rows,
    length,
    row_steps,
    row_groups,
    start,  # of the steps of a loop
    stop,
    x_ptr,  # (PARTS, length)
    stride_xp,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One token: (BLOCK_N, 1) float32. Four words, 16 bytes, are a thread's unit; its numbers share a scale.

    The numbers of half a word are left where they are: multiplied by 2^(their place), and x by the reciprocal.
    """
    NUMBERS: tl.constexpr = 128 // BITS  # of a unit
    PLACES: tl.constexpr = 16 // BITS
    BLOCK_U: tl.constexpr = BLOCK_K // NUMBERS
    row_words = row_steps * ALIGN
    rows = tl.arange(0, BLOCK_N)
    units = tl.arange(0, BLOCK_U)
    words = units[:, None] * 4 + tl.arange(0, 4)[None, :]
    columns = words[:, :, None] * (32 // BITS) + tl.arange(0, 32 // BITS)[None, None, :]
    packed_ptrs = packed_ptr + rows[:, None, None] * row_words + words[None, :, :]
    scales_ptrs = scales_ptr + rows[:, None] * row_groups
    acc = tl.zeros((BLOCK_N, BLOCK_U), tl.float32)
    for step in range(start, stop):
        k, word = step * BLOCK_K, step * BLOCK_U * 4
        there = (rows < num_rows)[:, None, None] & (words + word < row_words)[None, :, :]
        packed = tl.load(packed_ptrs + word, mask=there, other=0)  # (BLOCK_N, BLOCK_U, 4)
        scale_mask = (rows < num_rows)[:, None] & (k + units * NUMBERS < length)[None, :]
        scales = tl.load(scales_ptrs + ((k + units * NUMBERS) // GROUP)[None, :], mask=scale_mask, other=0.0)
        x = load_sum(x_ptr + k + columns, stride_xp, k + columns < length, PARTS).to(tl.float32)
        x_by_place = _by_place(x, BLOCK_U, 4, 32 // BITS)
        total = tl.zeros((BLOCK_N, BLOCK_U, 4), tl.float32)
        for upper in tl.static_range(2):
            bits = packed >> (16 * upper)
            for place in tl.static_range(PLACES):
                x_there = x_by_place[upper * PLACES + place] * (1.0 / (1 << (BITS * place)))
                total += _in_place(bits, BITS, place) * x_there[None, :, :]
        acc += tl.sum(total, 2) * scales.to(tl.float32)
    return tl.sum(acc, 1)[:, None]


@triton.jit
def _tile_product(
    packed_ptr,  # (num_rows, row_steps * ALIGN) of 8, 16 or 32 bits
    scales_ptr,  # (num_rows, row_groups)
    num_rows,
    length,
    row_steps,
    row_groups,
    start,  # of the steps of a loop, TILES each
    stop,
    x_ptr,  # (PARTS, num_tokens, length)
    num_tokens,
    stride_xm,
    stride_xp,
    dtype: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Several tokens: (BLOCK_N, BLOCK_M) float32. A tile of BLOCK_K columns, which divides GROUP, has one scale for a row.

    A product does not mind the order of its columns, so the numbers stay together that stand at one place of 16 elements: each
    place is a ``tl.dot`` over 16 columns, and no number moves to another register. x is taken apart alike.
    """
    PLACES: tl.constexpr = BLOCK_K // 16  # numbers in an element of ``packed``, of which 16 make a tile
    row_elements = row_steps * ALIGN
    rows = tl.arange(0, BLOCK_N)
    elements = tl.arange(0, 16)
    tokens = tl.arange(0, BLOCK_M)[:, None, None]
    columns = elements[None, :, None] * PLACES + tl.arange(0, PLACES)[None, None, :]
    packed_ptrs = packed_ptr + rows[:, None] * row_elements + elements[None, :]
    x_ptrs = x_ptr + tokens * stride_xm + columns
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(start, stop):
        for tile in tl.static_range(TILES):
            k, element = (step * TILES + tile) * BLOCK_K, (step * TILES + tile) * 16
            there = (rows < num_rows)[:, None] & (elements + element < row_elements)[None, :]
            stored = tl.load(packed_ptrs + element, mask=there, other=0)  # (BLOCK_N, 16)
            x = load_sum(x_ptrs + k, stride_xp, (columns + k < length) & (tokens < num_tokens), PARTS).to(dtype)
            x_by_place = _by_place(x, BLOCK_M, 16, PLACES)
            group = tl.minimum(k // GROUP, row_groups - 1)  # what is past the end of a row is multiplied by zeros
            scales = tl.load(scales_ptr + rows * row_groups + group, mask=rows < num_rows, other=0.0)
            product = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for place in tl.static_range(PLACES):
                number = centered((stored >> (BITS * place)) & ((1 << BITS) - 1), BITS, dtype)
                product = tl.dot(number, tl.trans(x_by_place[place]), product, input_precision="ieee")
            acc += product * scales.to(tl.float32)[:, None]
    return acc


@triton.jit
def packed_product(
    packed_ptr,
    scales_ptr,
    num_rows,
    length,
    row_steps,
    row_groups,
    start,
    stop,
    x_ptr,
    num_tokens,
    stride_xm,
    stride_xp,
    dtype: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """weight[:num_rows] @ x[:num_tokens].T over the columns of some steps: (BLOCK_N, BLOCK_M) float32; x: a sum of PARTS."""
    if BLOCK_M == 1:
        product = _row_product(
            packed_ptr,
            scales_ptr,
            num_rows,
            length,
            row_steps,
            row_groups,
            start,
            stop,
            x_ptr,
            stride_xp,
            PARTS,
            BITS,
            GROUP,
            ALIGN,
            BLOCK_N,
            BLOCK_K,
        )
    else:
        product = _tile_product(
            packed_ptr,
            scales_ptr,
            num_rows,
            length,
            row_steps,
            row_groups,
            start,
            stop,
            x_ptr,
            num_tokens,
            stride_xm,
            stride_xp,
            dtype,
            PARTS,
            BITS,
            GROUP,
            ALIGN,
            TILES,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
    return product
