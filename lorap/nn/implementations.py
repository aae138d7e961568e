"""Who can run which op: functions by backend and op, without the choice between them (:mod:`lorap.nn.dispatch`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorap.algorithms.symmetric import add_outer_products
from lorap.kernels import reference
from lorap.nn import native

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
LINEAR_OPS = ("linear", "low_rank_linear", "low_rank_linear_group", "silu_gated_linear", "low_rank_silu_gated_linear")
OPS = (*LINEAR_OPS, "channel_sq_norm", "second_moment")


def tokens_of(x: Tensor) -> int:
    """Rows of x (..., K); 0, and so the reference, where x is empty or a scalar."""
    return x.numel() // x.shape[-1] if x.dim() and x.shape[-1] else 0


def _cpu(op: str) -> Callable[..., Any]:
    return getattr(torch.ops.lorap_cpu, op).default if native.HAS_CPU else getattr(reference, op)


def _cuda_low_rank(x: Tensor, right: Tensor, left: Tensor, bias: Any = None, pivot_rows: Any = None) -> Any:
    # What the kernel is written for; a forced backend must not stop the prefill of a model.
    fits = pivot_rows is None and tokens_of(x) <= 8 and x.shape[-1] % 8 == 0 and right.shape[0] % 8 == 0
    if not fits:
        return reference.low_rank_linear(x, right, left, bias, pivot_rows)
    return torch.ops.lorap_cuda.low_rank_linear.default(x.contiguous(), right.contiguous(), left.contiguous(), bias)


def _triton(module: str, function: str) -> Callable[..., Any]:
    """Imports triton only when one of its kernels is really used."""

    def launch(*arguments: Any) -> Any:
        import importlib

        return getattr(importlib.import_module(f"lorap.kernels.{module}"), function)(*arguments)

    return launch


def _triton_low_rank(x: Tensor, right: Tensor, left: Tensor, bias: Any = None, pivot_rows: Any = None) -> Any:
    from lorap.kernels.low_rank_fused import low_rank_fused, one_launch_wins
    from lorap.kernels.low_rank_linear import low_rank_linear_group

    if pivot_rows is None and one_launch_wins(tokens_of(x), x.shape[-1], right.shape[0], left.shape[0]):
        return low_rank_fused(x, right, left, bias)
    some = [] if bias is None else [bias]
    return low_rank_linear_group(x, [right], [left], some, [] if pivot_rows is None else [pivot_rows])


def _second_moment(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """On a GPU, products of two bfloat16 or float16 are exact in float32, so tensor cores may do the work."""
    on_tensor_cores = x.is_cuda and x.dtype in HALVES
    total = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64, device=x.device)
    for chunk in reference.masked_chunks(x, mask, x.dtype if on_tensor_cores else torch.float64):
        if on_tensor_cores:
            total += torch.mm(chunk.T, chunk, out_dtype=torch.float32)
        else:
            add_outer_products(total, chunk)
    return total, reference.token_count(x, mask)


IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "reference": {op: getattr(reference, op) for op in OPS} | {"second_moment": _second_moment},
    "cpu": {op: _cpu(op) for op in LINEAR_OPS},
    "triton": {
        "linear": _triton("linear", "linear"),
        "low_rank_linear": _triton_low_rank,
        "low_rank_linear_group": _triton("low_rank_linear", "low_rank_linear_group"),
        "silu_gated_linear": _triton("silu_gated_linear", "silu_gated_linear"),
        "low_rank_silu_gated_linear": _triton("low_rank_linear", "low_rank_silu_gated_linear"),
        "channel_sq_norm": _triton("channel_sq_norm", "channel_sq_norm"),
    },
    "cuda": {"low_rank_linear": _cuda_low_rank},
}


def implementation(op: str, backend: str) -> Callable[..., Any]:
    """The function that runs ``op`` on one backend, without dispatch; for tests, self-checks and benchmarks."""
    return IMPLEMENTATIONS[backend][op]


def example(op: str, device: torch.device, dtype: torch.dtype, tokens: int = 3, k: int = 176) -> tuple[Any, ...]:
    """Small arguments of ``op`` with sizes that are no powers of two; the same on every device.

    Args:
        op: one of ``OPS``.
        device: for the tensors.
        dtype: of those that are floating point.
        tokens: rows of x; statistics have 100.
        k: size of the last axis of x.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).mul(size[-1] ** -0.5).to(device, dtype)

    rank, n = 48, 112
    x = random(tokens, k)
    right, left = [random(rank, k), random(rank + 16, k)], [random(n, rank), random(n, rank + 16)]
    by_op: dict[str, tuple[Any, ...]] = {
        "linear": (x, right[0]),
        "low_rank_linear": (x, right[0], left[0], random(n)),
        "low_rank_linear_group": (x, right, left, [random(n), random(n)], []),
        "silu_gated_linear": (x, right[0], random(rank, k)),
        "low_rank_silu_gated_linear": (x, right, left, []),
        "channel_sq_norm": (random(100, k), torch.arange(100, device=device) % 3 > 0),
        "second_moment": (random(100, k), torch.arange(100, device=device) % 3 > 0),
    }
    return by_op[op]
