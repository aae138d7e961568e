"""y = x @ weight.T + bias for few tokens: x (M, K), weight (N, K), y (M, N); made for M <= 32, right for any M.

So few tokens leave time for nothing but one read of the weights, in loads of 16 bytes and with enough programs to keep
every multiprocessor at it. One token: a program multiplies BLOCK_N rows of the weight with x elementwise, in float32,
and sums at the end; a tensor core would have nothing to do. More tokens: the operands of the matrix product are
swapped, so that 64 rows of the weight fill the side of the tensor core instruction that cannot be smaller than 64, and
the tokens its narrow side. Where N alone gives too few programs, they share K as well: each writes a float32 partial
product, and a second kernel adds these in a fixed order. Beyond 32 tokens each 32 of them read the weights anew, which
torch's own product does better. Compiled for sm_80, 90 and 100, never run on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import Variant
from .configs import lookup

MAX_BLOCK_M = 32
BLOCK_SUM = 512  # 128 threads times 16 bytes of float32
MULTIPROCESSORS = 132  # of an H100; what programs should outnumber
INTERPRETED = triton.knobs.runtime.interpret  # the interpreter takes the bits of a bfloat16 for an integer: see UPCAST
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@triton.jit
def linear_row_kernel(
    x_ptr,  # (1, K)
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,) or None
    y_ptr,  # (SPLIT_K, 1, N)
    N,
    K,
    K_PER_PROGRAM,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    weight_ptrs = weight_ptr + rows[:, None].to(tl.int64) * K
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    start = split * K_PER_PROGRAM
    for k_start in range(start, tl.minimum(start + K_PER_PROGRAM, K), BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)  # (BLOCK_K,)
        weight = tl.load(weight_ptrs + k[None, :], mask=(rows < N)[:, None] & (k < K)[None, :], other=0.0)
        acc += weight.to(tl.float32) * x[None, :]
    y = tl.sum(acc, axis=1)  # (BLOCK_N,)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + split * N + rows, y.to(y_ptr.dtype.element_ty), mask=rows < N)


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x_ptr,  # (M, K)
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,) or None
    y_ptr,  # (SPLIT_K, M, N)
    M,
    N,
    K,
    K_PER_PROGRAM,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    first_token = tl.program_id(2).to(tl.int64) * BLOCK_M
    tokens = tl.arange(0, BLOCK_M)
    present = tokens < M - first_token
    weight_ptrs = weight_ptr + rows[:, None].to(tl.int64) * K
    x_ptrs = x_ptr + first_token * K + tokens[None, :] * K
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    start = split * K_PER_PROGRAM
    for k_start in range(start, tl.minimum(start + K_PER_PROGRAM, K), BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        weight = tl.load(weight_ptrs + k[None, :], mask=(rows < N)[:, None] & (k < K)[None, :], other=0.0)
        x = tl.load(x_ptrs + k[:, None], mask=(k < K)[:, None] & present[None, :], other=0.0)
        if UPCAST:
            weight, x = weight.to(tl.float32), x.to(tl.float32)
        acc = tl.dot(weight, x, acc, input_precision="ieee")  # (BLOCK_N, BLOCK_M)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + (split * M + first_token) * N + tokens[None, :] * N + rows[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(rows < N)[:, None] & present[None, :])


@triton.jit(do_not_specialize=["M"])
def sum_partials_kernel(
    partial_ptr,  # (SPLIT_K, M, N) float32
    bias_ptr,  # (N,) or None
    y_ptr,  # (M, N)
    M,
    N,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLIT_K):
        y += tl.load(partial_ptr + (split * M + token) * N + columns, mask=columns < N, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * N + columns, y.to(y_ptr.dtype.element_ty), mask=columns < N)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See :func:`lorap.kernels.reference.linear`; x and weight are of one dtype."""
    x, (bias,), y = check_operands(x, (weight,), (bias,))
    m, n, k = *x.shape[:1], *weight.shape
    if y.numel() == 0:
        return y
    split, options = _config(m, n, k, x.dtype, x.device)
    k_per_program = triton.cdiv(triton.cdiv(k, split), options["BLOCK_K"]) * options["BLOCK_K"]
    grid = (triton.cdiv(n, options["BLOCK_N"]), split, triton.cdiv(m, MAX_BLOCK_M))
    target = y if split == 1 else torch.empty(split, m, n, dtype=torch.float32, device=x.device)
    tensors = (x, weight.contiguous(), bias if split == 1 else None, target)
    with torch.cuda.device_of(x):
        if m == 1:
            linear_row_kernel[grid](*tensors, n, k, k_per_program, **options, enable_fp_fusion=True)
        else:
            tile = {"BLOCK_M": block_m(m), "UPCAST": INTERPRETED}
            linear_kernel[grid](*tensors, m, n, k, k_per_program, **tile, **options, enable_fp_fusion=True)
        if split > 1:
            grid = (m, triton.cdiv(n, BLOCK_SUM))
            sum_partials_kernel[grid](target, bias, y, m, n, SPLIT_K=split, BLOCK=BLOCK_SUM, enable_fp_fusion=True)
    return y


def check_operands(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor | None], Tensor]:
    """x as (M, K), contiguous biases, and a y to fill, of the leading shape of x.

    Raises an error that names the numbers where they do not fit together.
    """
    n, k = weights[0].shape
    m = math.prod(x.shape[:-1])
    shapes = [tuple(weight.shape) for weight in weights]
    if x.shape[-1] != k or set(shapes) != {(n, k)} or any(b is not None and b.shape != (n,) for b in biases):
        raise ValueError(f"x {tuple(x.shape)}, weights {shapes} and their biases do not fit together")
    if x.dtype not in TYPES or any(weight.dtype != x.dtype for weight in weights):
        raise TypeError(f"x is {x.dtype}, weights are {[weight.dtype for weight in weights]}")
    biases = [bias if bias is None else bias.contiguous() for bias in biases]
    return x.reshape(m, k).contiguous(), biases, x.new_empty(*x.shape[:-1], n)


@lru_cache(4096)
def _config(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> tuple[int, dict[str, Any]]:
    """SPLIT_K and the other launch settings: tuned ones for this GPU, or else those of :func:`heuristic`."""
    options = tuned("linear", m, n, k, dtype, device) or heuristic(m, n, k, dtype.itemsize)
    return options.pop("SPLIT_K"), options


def tuned(kernel: str, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any] | None:
    """What the shipped files say about ``kernel`` on this device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return lookup(kernel, name, m=m, n=n, k=k, dtype=str(dtype).removeprefix("torch."))


def heuristic(m: int, n: int, k: int, itemsize: int, *, weights: int = 1) -> dict[str, Any]:
    """Settings by rule of thumb, for ``weights`` matrices read side by side."""
    if m == 1:
        block_n, least_block_n = 8 // weights, 2
        block_k = 2048 // itemsize  # 128 threads times 16 bytes
        num_stages = 3
    else:
        block_n, least_block_n = 64, 64 if weights == 1 else 32
        block_k = 128 // weights if itemsize == 2 else 32  # float32 goes through registers: 64 would not fit
        num_stages = 4
    blocks_m = triton.cdiv(m, MAX_BLOCK_M)
    while triton.cdiv(n, block_n) * blocks_m <= MULTIPROCESSORS and block_n > least_block_n:
        block_n //= 2
    split = 1
    while weights == 1 and triton.cdiv(n, block_n) * blocks_m * split <= MULTIPROCESSORS and k >= 8 * split * block_k:
        split *= 2
    return {"BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT_K": split, "num_warps": 4, "num_stages": num_stages}


def block_m(m: int) -> int:
    """Tokens a tile has room for. Fewer than 16 would save nothing that takes time: absent ones are not loaded."""
    return min(max(16, triton.next_power_of_2(m)), MAX_BLOCK_M)


# (N, K) of the dense layers of LLaMA-7B and LLaMA-3-8B that read or write the residual stream
SHIPPED_SHAPES = ((4096, 4096), (4096, 11008), (1024, 4096), (11008, 4096), (14336, 4096), (4096, 14336))


def shipped_configs() -> Iterator[Variant]:
    """Every kernel that the rule of thumb launches for the layers of LLaMA-7B and LLaMA-3-8B, each once."""
    cases = [(m, *shape, torch.bfloat16) for shape in SHIPPED_SHAPES for m in (1, 16, 32)]
    cases += [(m, *SHIPPED_SHAPES[0], torch.float32) for m in (1, 32)]
    yield from {variant.name: variant for case in cases for variant in _variants(*case)}.values()


def _variants(m: int, n: int, k: int, dtype: torch.dtype) -> Iterator[Variant]:
    options = heuristic(m, n, k, dtype.itemsize)
    split, warps, stages = (options.pop(name) for name in ("SPLIT_K", "num_warps", "num_stages"))
    typename = TYPES[dtype]
    out = typename if split == 1 else "fp32"
    tile = options if m == 1 else {"BLOCK_M": block_m(m), **options}
    label = "-".join(f"{name.removeprefix('BLOCK_')}{value}" for name, value in tile.items())
    sizes = (*(() if m == 1 else ("M",)), "N", "K", "K_PER_PROGRAM")
    kernel = linear_row_kernel if m == 1 else linear_kernel
    yield Variant(
        name=f"{kernel.__name__}-{typename}-to-{out}-{label}",
        kernel=kernel,
        signature={"x_ptr": f"*{typename}", "weight_ptr": f"*{typename}", "y_ptr": f"*{out}"}
        | dict.fromkeys(sizes, "i32"),
        constexprs={"bias_ptr": None, **tile} | ({} if m == 1 else {"UPCAST": False}),
        divisible=("x_ptr", "weight_ptr", "y_ptr", "N", "K", "K_PER_PROGRAM"),
        num_warps=warps,
        num_stages=stages,
    )
    if split > 1:
        yield Variant(
            name=f"sum_partials_kernel-{typename}-S{split}",
            kernel=sum_partials_kernel,
            signature={"partial_ptr": "*fp32", "y_ptr": f"*{typename}", "M": "i32", "N": "i32"},
            constexprs={"bias_ptr": None, "SPLIT_K": split, "BLOCK": BLOCK_SUM},
            divisible=("partial_ptr", "y_ptr", "N"),
            num_warps=4,
            num_stages=3,
        )
