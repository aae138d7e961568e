"""y = x @ right.T @ left.T + bias for a few rows of x and a small rank, in one launch.

Every output depends on all of T (M, R) = x (M, K) @ right.T, so one launch needs either a barrier between all programs
or a T of each program's own. Here each program computes all of T, in registers, and then its own columns of y: nothing
to wait for, the same bytes on every run, but ``right`` is read once per program, from L2 after the first time. That
pays only while reading ``right`` through one SM takes less time than a second launch; ``one_launch_wins`` says when,
and the answer is small models and small ranks (r <= 47 at K = 576, r <= 6 at K = 4096).

Compiled and interpreted, never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import Variant
from .hardware import L2_BANDWIDTH, LAUNCH, MEMORY_BANDWIDTH, NUM_SMS
from .low_rank_kernels import weight_product
from .low_rank_linear import INTERPRETED, Launch, checked, run, variant
from .low_rank_settings import Settings, block_m, cdiv, power_of_2

MAX_BLOCK_N = 64


def one_launch_wins(m: int, k: int, r: int, n: int, *, itemsize: int = 2, num_sms: int = NUM_SMS) -> bool:
    """Whether one launch is modelled to be faster than the two of low_rank_linear.

    two launches: 2 LAUNCH + (bytes of right + bytes of left) / MEMORY_BANDWIDTH
    one launch:     LAUNCH + bytes of left / MEMORY_BANDWIDTH + waves * bytes of right / one SM's share of L2

    There is one wave while n is at most 64 rows for each SM. More than 32 rows of x would recompute T as well.
    """
    right_bytes = itemsize * r * k
    waves = cdiv(cdiv(n, MAX_BLOCK_N), num_sms)
    recomputing = waves * right_bytes / (L2_BANDWIDTH / num_sms) - right_bytes / MEMORY_BANDWIDTH
    return m <= 32 and recomputing < LAUNCH


@triton.jit(do_not_specialize=["M"])
def low_rank_fused_kernel(
    x_ptr,
    right_ptr,
    left_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_ym,
    GEMV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    dtype: tl.constexpr = tl.float32 if UPCAST else left_ptr.dtype.element_ty
    first_row = tl.program_id(0) * BLOCK_N
    first_token = tl.program_id(1) * BLOCK_M
    rows = tl.arange(0, BLOCK_N)[:, None]
    tokens = tl.arange(0, BLOCK_M)[None, :]
    ranks = tl.arange(0, BLOCK_R)[None, :]
    x_ptr += first_token.to(tl.int64) * stride_xm
    left_ptrs = left_ptr + first_row.to(tl.int64) * R + rows * R + ranks
    y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for r in range(0, R, BLOCK_R):
        left = tl.load(left_ptrs + r, mask=(rows < N - first_row) & (ranks < R - r), other=0.0)
        t = weight_product(
            right_ptr + r * K,
            R - r,
            K,
            0,
            K,
            x_ptr,
            M - first_token,
            stride_xm,
            0,
            1,
            GEMV,
            BLOCK_M,
            BLOCK_R,
            BLOCK_K,
            False,
            False,
            UPCAST,
        )
        if GEMV:
            y += tl.sum(left.to(tl.float32) * tl.trans(t), 1)[:, None]
        else:
            y = tl.dot(left.to(dtype), t.to(dtype), y, input_precision="ieee")
    if bias_ptr is not None:
        y += tl.load(bias_ptr + first_row + rows, mask=rows < N - first_row, other=0.0).to(tl.float32)
    y_ptrs = y_ptr + (first_token + tokens).to(tl.int64) * stride_ym + first_row + rows
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(rows < N - first_row) & (tokens < M - first_token))


def low_rank_fused(x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`lorap.kernels.reference.low_rank_linear` without pivots. Right for any size, fast for few."""
    y, launches = fused_launches(x, right, left, bias)
    run(launches, x)
    return y


def fused_launches(x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None) -> tuple[Tensor, list[Launch]]:
    tokens, (right,), (left,) = checked(x, [right], [left])
    (m, k), (n, rank) = tokens.shape, left.shape
    y = x.new_empty(*x.shape[:-1], n)
    if y.numel() == 0:
        return y, []
    options = fused_config(m, k, rank, n, itemsize=x.element_size())
    options |= {"GEMV": m == 1, "BLOCK_M": block_m(m), "UPCAST": INTERPRETED, "enable_fp_fusion": True}
    grid = cdiv(n, options["BLOCK_N"]), cdiv(m, options["BLOCK_M"])
    bias = None if bias is None else bias.contiguous()
    arguments = (tokens, right, left, bias, y, m, n, k, rank, tokens.stride(0), n)
    return y, [Launch(low_rank_fused_kernel, grid, arguments, options)]


def fused_config(m: int, k: int, r: int, n: int, *, itemsize: int = 2, num_sms: int = NUM_SMS) -> Settings:
    """At most one program per SM, as long as 64 rows of y for each are enough.

    For M = 1 a block has fewer columns than threads, as in expand, and more elements of ``left`` than threads: fewer
    would be read one by one.
    """
    block_n = min(MAX_BLOCK_N, max(32, power_of_2(cdiv(n, num_sms))))
    sides = {"BLOCK_N": block_n, "BLOCK_K": 256 // itemsize, "BLOCK_R": min(64, max(16, power_of_2(r)))}
    return sides | ({"num_warps": 8, "num_stages": 1} if m == 1 else {"num_warps": 4, "num_stages": 4})


def shipped_configs() -> Iterator[Variant]:
    """The kernel as launched for a small rank in SmolLM2-135M, whose hidden size is 576."""
    for m in (1, 8, 32):
        shapes = ((m, 576), (32, 576), (576, 32))
        x, right, left = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
        yield from (variant(launch, f"m{m}-k576-576r32") for launch in fused_launches(x, right, left, None)[1])
