"""Device code of :mod:`lorap.kernels.low_rank_linear`: T = x @ right.T (shrink), y = T @ left.T + bias (expand).

Shapes: x (M, K), right (rank, K) and left (rows, rank) of up to three layers, T (PARTS, M, R) float32 with the ranks of
all layers side by side, y (M, N) with their outputs side by side. Both stages, of every layer, are the same product of
a weight and a few tokens, ``weight_product``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pick(index, a, b, c, NUM_LAYERS: tl.constexpr):
    """The index-th of a, b, c. Chosen this way a pointer stays known as a multiple of 16, so loads stay wide."""
    picked = a
    if NUM_LAYERS > 1:  # noqa: SIM102 (one is known when compiling, the other is not)
        if index == 1:
            picked = b
    if NUM_LAYERS > 2:  # noqa: SIM102
        if index == 2:
            picked = c
    return picked


@triton.jit
def _layer_of(program, programs_0, programs_1, NUM_LAYERS: tl.constexpr):
    """The layer that a program works on, and the program's index within that layer."""
    layer = 0
    if NUM_LAYERS > 1:
        layer += (program >= programs_0).to(tl.int32)
    if NUM_LAYERS > 2:
        layer += (program >= programs_0 + programs_1).to(tl.int32)
    return layer, program - _pick(layer, 0, programs_0, programs_0 + programs_1, NUM_LAYERS)


@triton.jit
def load_sum(ptr, stride_part, mask, PARTS: tl.constexpr):
    """What the parts hold at ``ptr``, added up from the first part to the last."""
    total = tl.load(ptr, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(ptr + part * stride_part, mask=mask, other=0.0)
    return total


@triton.jit
def weight_product(
    weight_ptr,  # (num_rows, length)
    num_rows,
    length,
    start,
    stop,
    v_ptr,  # (PARTS, num_tokens, length)
    num_tokens,
    stride_vm,
    stride_vp,
    PARTS: tl.constexpr,
    GEMV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WAIT: tl.constexpr,
    WHOLE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """weight[:num_rows, start:stop] @ v[:num_tokens, start:stop].T: (BLOCK_N, BLOCK_M) float32.

    v is the sum of PARTS tensors. With WAIT it is what the kernel launched before this one writes, and the first tile
    of the weights is read while that one still runs; for one token only where WHOLE says that this tile is all there is,
    BLOCK_K being no less than stop - start.
    """
    dtype: tl.constexpr = tl.float32 if UPCAST else weight_ptr.dtype.element_ty
    columns = tl.arange(0, BLOCK_K)
    rows = tl.arange(0, BLOCK_N)[:, None]
    weight_ptrs = weight_ptr + rows * length + columns[None, :]
    if GEMV:
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        if WHOLE:
            weight = tl.load(weight_ptrs + start, mask=(rows < num_rows) & (columns < stop - start)[None, :], other=0.0)
            if WAIT:
                tl.extra.cuda.gdc_wait()
            v = load_sum(v_ptr + start + columns, stride_vp, columns < stop - start, PARTS)
            acc = weight.to(tl.float32) * v.to(tl.float32)[None, :]
        else:
            if WAIT:
                tl.extra.cuda.gdc_wait()
            # A prefetch written by hand is undone: ptxas moves the loads below the products that wait for the tile before. As
            # asynchronous copies into shared memory (LDGSTS.128, three tiles in flight) they stay where the compiler puts them.
            for k in tl.range(start, stop, BLOCK_K, num_stages=4):
                weight = tl.load(weight_ptrs + k, mask=(rows < num_rows) & (columns < stop - k)[None, :], other=0.0)
                v = load_sum(v_ptr + k + columns, stride_vp, columns < stop - k, PARTS)
                acc += weight.to(tl.float32) * v.to(tl.float32)[None, :]
        product = tl.sum(acc, 1)[:, None]
    else:
        tokens = tl.arange(0, BLOCK_M)[None, :]
        v_ptrs = v_ptr + tokens * stride_vm + columns[:, None]
        product = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if WAIT:
            weight = tl.load(weight_ptrs + start, mask=(rows < num_rows) & (columns < stop - start)[None, :], other=0.0)
            tl.extra.cuda.gdc_wait()
            mask = (tokens < num_tokens) & (columns < stop - start)[:, None]
            v = load_sum(v_ptrs + start, stride_vp, mask, PARTS)
            product = tl.dot(weight.to(dtype), v.to(dtype), product, input_precision="ieee")
            start += BLOCK_K
        for k in range(start, stop, BLOCK_K):
            weight = tl.load(weight_ptrs + k, mask=(rows < num_rows) & (columns < stop - k)[None, :], other=0.0)
            mask = (tokens < num_tokens) & (columns < stop - k)[:, None]
            v = load_sum(v_ptrs + k, stride_vp, mask, PARTS)
            product = tl.dot(weight.to(dtype), v.to(dtype), product, input_precision="ieee")
    return product


@triton.jit(do_not_specialize=["M"])
def shrink_kernel(
    x_ptr,  # (M, K)
    right_0_ptr,  # (rank_0, K)
    right_1_ptr,  # (rank_1, K), or None from NUM_LAYERS on
    right_2_ptr,
    t_ptr,  # (PARTS, M, R) float32
    M,
    K,
    k_per_part,
    rank_0,
    rank_1,
    rank_2,
    stride_xm,
    stride_tm,
    stride_tp,
    NUM_LAYERS: tl.constexpr,
    GEMV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """T[part, m, r] = x[m] @ right[r] over the k_per_part columns of x and right that are the part's."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    layer, block = _layer_of(tl.program_id(0), tl.cdiv(rank_0, BLOCK_N), tl.cdiv(rank_1, BLOCK_N), NUM_LAYERS)
    right_ptr = _pick(layer, right_0_ptr, right_1_ptr, right_2_ptr, NUM_LAYERS)
    rank = _pick(layer, rank_0, rank_1, rank_2, NUM_LAYERS)
    t_ptr += _pick(layer, 0, rank_0, rank_0 + rank_1, NUM_LAYERS)
    part = tl.program_id(1)
    first_token = tl.program_id(2) * BLOCK_M
    product = weight_product(
        right_ptr + (block * BLOCK_N).to(tl.int64) * K,
        rank - block * BLOCK_N,
        K,
        part * k_per_part,
        tl.minimum((part + 1) * k_per_part, K),
        x_ptr + first_token.to(tl.int64) * stride_xm,
        M - first_token,
        stride_xm,
        0,
        1,
        GEMV,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        False,
        False,
        UPCAST,
    )
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    tokens = first_token + tl.arange(0, BLOCK_M)[None, :]
    t_ptrs = t_ptr + part.to(tl.int64) * stride_tp + tokens.to(tl.int64) * stride_tm + rows
    tl.store(t_ptrs, product, mask=(tokens < M) & (rows < rank))


@triton.jit
def output_rows(first_row, pivots, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """(BLOCK_N,): in which rows of the output the rows of ``left`` from ``first_row`` on are found.

    Row j of left comes after all pivots with pivots[i] - i <= j. A histogram counts these for the whole block at once:
    a search by row would wait for memory log2(rank) times.
    """
    rows = tl.arange(0, BLOCK_N)
    distance = pivots - tl.arange(0, BLOCK_P) - first_row
    before = tl.sum((distance <= 0).to(tl.int32), 0)
    within = tl.histogram(tl.where((distance > 0) & (distance < BLOCK_N), distance, 0), BLOCK_N)
    return first_row + rows + tl.cumsum(tl.where(rows == 0, before, within), 0)


@triton.jit(do_not_specialize=["M"])
def expand_kernel(
    t_ptr,  # (PARTS, M, R) float32
    left_0_ptr,  # (rows_0, rank_0)
    left_1_ptr,
    left_2_ptr,
    bias_0_ptr,  # (N_0,)
    bias_1_ptr,
    bias_2_ptr,
    pivots_0_ptr,  # (rank_0,) int64, ascending
    pivots_1_ptr,
    pivots_2_ptr,
    y_ptr,  # (M, N_0 + N_1 + N_2), N_i being rows_i, and rank_i more with pivots
    M,
    rank_0,
    rank_1,
    rank_2,
    rows_0,
    rows_1,
    rows_2,
    stride_tm,
    stride_tp,
    stride_ym,
    NUM_LAYERS: tl.constexpr,
    BIASED: tl.constexpr,
    PIVOTED: tl.constexpr,
    PARTS: tl.constexpr,
    GEMV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
    WHOLE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """y[m, n] = T[m] @ left[n] + bias[n]; in a pivoted layer also y[m, pivots[r]] = T[m, r] + bias[pivots[r]].

    BIASED and PIVOTED have bit i set where layer i has a bias or pivots. rows_i is the number of rows of left.
    A layer's first programs multiply, those after them copy the pivot rows.
    """
    pivots_0 = rank_0 if PIVOTED & 1 else 0
    pivots_1 = rank_1 if PIVOTED & 2 else 0
    pivots_2 = rank_2 if PIVOTED & 4 else 0
    layer, block = _layer_of(
        tl.program_id(0),
        tl.cdiv(rows_0, BLOCK_N) + tl.cdiv(pivots_0, BLOCK_N),
        tl.cdiv(rows_1, BLOCK_N) + tl.cdiv(pivots_1, BLOCK_N),
        NUM_LAYERS,
    )
    left_ptr = _pick(layer, left_0_ptr, left_1_ptr, left_2_ptr, NUM_LAYERS)
    rank = _pick(layer, rank_0, rank_1, rank_2, NUM_LAYERS)
    num_rows = _pick(layer, rows_0, rows_1, rows_2, NUM_LAYERS)
    first_token = tl.program_id(1) * BLOCK_M
    t_ptr += first_token.to(tl.int64) * stride_tm + _pick(layer, 0, rank_0, rank_0 + rank_1, NUM_LAYERS)
    y_offset = _pick(layer, 0, rows_0 + pivots_0, rows_0 + pivots_0 + rows_1 + pivots_1, NUM_LAYERS)
    tokens = tl.arange(0, BLOCK_M)[None, :]
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)

    if PIVOTED:
        num_pivots = _pick(layer, pivots_0, pivots_1, pivots_2, NUM_LAYERS)
        pivots_ptr = _pick(layer, pivots_0_ptr, pivots_1_ptr, pivots_2_ptr, NUM_LAYERS)
        copies = block - tl.cdiv(num_rows, BLOCK_N)
    else:
        copies: tl.constexpr = -1
    if copies >= 0:
        rows = copies * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = rows < rank
        if PDL:
            tl.extra.cuda.gdc_wait()
        t_mask = mask[:, None] & (tokens < M - first_token)
        y = load_sum(t_ptr + tokens * stride_tm + rows[:, None], stride_tp, t_mask, PARTS)
        outputs = tl.load(pivots_ptr + rows, mask=mask, other=0).to(tl.int32)
    else:
        mask = rows < num_rows
        if PIVOTED:
            index = tl.arange(0, BLOCK_P)
            pivots = tl.load(pivots_ptr + index, mask=index < num_pivots, other=2**31 - 1).to(tl.int32)
        y = weight_product(
            left_ptr + (block * BLOCK_N).to(tl.int64) * rank,
            num_rows - block * BLOCK_N,
            rank,
            0,
            rank,
            t_ptr,
            M - first_token,
            stride_tm,
            stride_tp,
            PARTS,
            GEMV,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            PDL,
            WHOLE,
            UPCAST,
        )
        outputs = rows
        if PIVOTED:
            outputs = output_rows(block * BLOCK_N, pivots, BLOCK_N, BLOCK_P)
    if BIASED:
        bias_ptr = _pick(layer, bias_0_ptr, bias_1_ptr, bias_2_ptr, NUM_LAYERS)
        num_biased = _pick(layer, (BIASED & 1) << 30, (BIASED & 2) << 29, (BIASED & 4) << 28, NUM_LAYERS)  # all or 0
        y += tl.load(bias_ptr + outputs, mask=mask & (outputs < num_biased), other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + y_offset + (first_token + tokens).to(tl.int64) * stride_ym + outputs[:, None]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask[:, None] & (tokens < M - first_token))


@triton.jit(do_not_specialize=["M"])
def silu_gated_expand_kernel(
    t_ptr,  # (PARTS, M, gate_rank + up_rank) float32
    gate_ptr,  # (N, gate_rank)
    up_ptr,  # (N, up_rank)
    gate_bias_ptr,  # (N,) or None
    up_bias_ptr,  # (N,) or None
    y_ptr,  # (M, N)
    M,
    N,
    gate_rank,
    up_rank,
    stride_tm,
    stride_tp,
    stride_ym,
    PARTS: tl.constexpr,
    GEMV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
    WHOLE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """y = silu(T_gate @ gate.T + gate_bias) * (T_up @ up.T + up_bias), T holding T_gate and T_up side by side."""
    first_row = tl.program_id(0) * BLOCK_N
    first_token = tl.program_id(1) * BLOCK_M
    num_tokens = M - first_token
    t_ptr += first_token.to(tl.int64) * stride_tm
    gate = weight_product(
        gate_ptr + first_row.to(tl.int64) * gate_rank,
        N - first_row,
        gate_rank,
        0,
        gate_rank,
        t_ptr,
        num_tokens,
        stride_tm,
        stride_tp,
        PARTS,
        GEMV,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        PDL,
        WHOLE,
        UPCAST,
    )
    up = weight_product(
        up_ptr + first_row.to(tl.int64) * up_rank,
        N - first_row,
        up_rank,
        0,
        up_rank,
        t_ptr + gate_rank,
        num_tokens,
        stride_tm,
        stride_tp,
        PARTS,
        GEMV,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        False,
        WHOLE,
        UPCAST,
    )
    rows = first_row + tl.arange(0, BLOCK_N)
    if gate_bias_ptr is not None:
        gate += tl.load(gate_bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    if up_bias_ptr is not None:
        up += tl.load(up_bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    tokens = tl.arange(0, BLOCK_M)[None, :]
    y_ptrs = y_ptr + (first_token + tokens).to(tl.int64) * stride_ym + rows[:, None]
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(rows < N)[:, None] & (tokens < num_tokens))
