"""y = silu(x @ gate.T + gate_bias) * (x @ up.T + up_bias) for few tokens: the first half of a gated FFN in one launch.

x (M, K), gate and up (N, K), y (M, N). The forms for one token and for more, and their reasons, are those of
:mod:`lorap.kernels.linear`; here a program reads the same rows of both weights side by side, so x is read once for two
products and these meet in registers. K is never shared between programs: an FFN is wide enough to fill a GPU without,
and partial products could not go through silu. Compiled for sm_80, 90 and 100, never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import Variant
from .linear import INTERPRETED, MAX_BLOCK_M, TYPES, block_m, check_operands, heuristic, tuned


@triton.jit
def silu_gated_linear_row_kernel(
    x_ptr,  # (1, K)
    gate_ptr,  # (N, K)
    up_ptr,  # (N, K)
    gate_bias_ptr,  # (N,) or None
    up_bias_ptr,  # (N,) or None
    y_ptr,  # (1, N)
    N,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_offsets = rows[:, None].to(tl.int64) * K
    gate_acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up_acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k_start in range(0, K, BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        inside = (rows < N)[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        gate = tl.load(gate_ptr + row_offsets + k[None, :], mask=inside, other=0.0)  # (BLOCK_N, BLOCK_K)
        up = tl.load(up_ptr + row_offsets + k[None, :], mask=inside, other=0.0)
        gate_acc += gate.to(tl.float32) * x
        up_acc += up.to(tl.float32) * x
    gate = tl.sum(gate_acc, axis=1)  # (BLOCK_N,)
    up = tl.sum(up_acc, axis=1)
    if gate_bias_ptr is not None:
        gate += tl.load(gate_bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)
    if up_bias_ptr is not None:
        up += tl.load(up_bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + rows, y.to(y_ptr.dtype.element_ty), mask=rows < N)


@triton.jit(do_not_specialize=["M"])
def silu_gated_linear_kernel(
    x_ptr,  # (M, K)
    gate_ptr,  # (N, K)
    up_ptr,  # (N, K)
    gate_bias_ptr,  # (N,) or None
    up_bias_ptr,  # (N,) or None
    y_ptr,  # (M, N)
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_token = tl.program_id(1).to(tl.int64) * BLOCK_M
    tokens = tl.arange(0, BLOCK_M)
    present = tokens < M - first_token
    row_offsets = rows[:, None].to(tl.int64) * K
    x_ptrs = x_ptr + first_token * K + tokens[None, :] * K
    gate_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k_start in range(0, K, BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        inside = (rows < N)[:, None] & (k < K)[None, :]
        x = tl.load(x_ptrs + k[:, None], mask=(k < K)[:, None] & present[None, :], other=0.0)  # (BLOCK_K, BLOCK_M)
        gate = tl.load(gate_ptr + row_offsets + k[None, :], mask=inside, other=0.0)  # (BLOCK_N, BLOCK_K)
        up = tl.load(up_ptr + row_offsets + k[None, :], mask=inside, other=0.0)
        if UPCAST:
            x, gate, up = x.to(tl.float32), gate.to(tl.float32), up.to(tl.float32)
        gate_acc = tl.dot(gate, x, gate_acc, input_precision="ieee")
        up_acc = tl.dot(up, x, up_acc, input_precision="ieee")
    if gate_bias_ptr is not None:
        gate_acc += tl.load(gate_bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    if up_bias_ptr is not None:
        up_acc += tl.load(up_bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    y = gate_acc * tl.sigmoid(gate_acc) * up_acc
    y_ptrs = y_ptr + first_token * N + tokens[None, :] * N + rows[:, None]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(rows < N)[:, None] & present[None, :])


def silu_gated_linear(
    x: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor | None = None, up_bias: Tensor | None = None
) -> Tensor:
    """See :func:`lorap.kernels.reference.silu_gated_linear`; x and weights are of one dtype."""
    x, biases, y = check_operands(x, (gate, up), (gate_bias, up_bias))
    m, n, k = *x.shape[:1], *gate.shape
    if y.numel() == 0:
        return y
    options = _config(m, n, k, x.dtype, x.device)
    grid = (triton.cdiv(n, options["BLOCK_N"]), triton.cdiv(m, MAX_BLOCK_M))
    tensors = (x, gate.contiguous(), up.contiguous(), *biases, y)
    with torch.cuda.device_of(x):
        if m == 1:
            silu_gated_linear_row_kernel[grid](*tensors, n, k, **options, enable_fp_fusion=True)
        else:
            tile = {"BLOCK_M": block_m(m), "UPCAST": INTERPRETED}
            silu_gated_linear_kernel[grid](*tensors, m, n, k, **tile, **options, enable_fp_fusion=True)
    return y


@lru_cache(4096)
def _config(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Launch settings: tuned ones for this GPU, or else the rule of thumb."""
    options = tuned("silu_gated_linear", m, n, k, dtype, device) or heuristic(m, n, k, dtype.itemsize, weights=2)
    return {name: value for name, value in options.items() if name != "SPLIT_K"}


def shipped_configs() -> Iterator[Variant]:
    """Every kernel that the rule of thumb launches for the FFNs of LLaMA-7B and LLaMA-3-8B, whole and half, each once."""
    cases = [(m, n, 4096, torch.bfloat16) for n in (11008, 14336, 5504, 7168) for m in (1, 16, 32)]
    cases += [(m, 11008, 4096, torch.float32) for m in (1, 32)]
    yield from {variant.name: variant for variant in (_variant(*case) for case in cases)}.values()


def _variant(m: int, n: int, k: int, dtype: torch.dtype) -> Variant:
    options = _config(m, n, k, dtype, torch.device("cpu"))
    blocks = {name: value for name, value in options.items() if name.startswith("BLOCK")}
    tile = blocks if m == 1 else {"BLOCK_M": block_m(m), **blocks}
    label = "-".join(f"{name.removeprefix('BLOCK_')}{value}" for name, value in tile.items())
    kernel = silu_gated_linear_row_kernel if m == 1 else silu_gated_linear_kernel
    pointers = ("x_ptr", "gate_ptr", "up_ptr", "y_ptr")
    sizes = ("N", "K") if m == 1 else ("M", "N", "K")
    return Variant(
        name=f"{kernel.__name__}-{TYPES[dtype]}-{label}",
        kernel=kernel,
        signature=dict.fromkeys(pointers, f"*{TYPES[dtype]}") | dict.fromkeys(sizes, "i32"),
        constexprs={"gate_bias_ptr": None, "up_bias_ptr": None, **tile} | ({} if m == 1 else {"UPCAST": False}),
        divisible=(*pointers, "N", "K"),
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
    )
