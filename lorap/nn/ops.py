"""torch.ops.lorap: the operators that compressed models are made of.

================================  ==================================================  ==========================
op                                computes                                            output
================================  ==================================================  ==========================
``linear``                        x weight^T + bias                                   (..., N)
``low_rank_linear``               x right^T left^T + bias                             (..., N)
``low_rank_linear_group``         several of them on one x, side by side              (..., N_1 + N_2 + ...)
``silu_gated_linear``             silu(x gate^T) * (x up^T)                           (..., N)
``low_rank_silu_gated_linear``    the same with low-rank gate and up                  (..., N)
``channel_sq_norm``               sum over tokens of x_j^2, token count               (K,) float64, () int64
``second_moment``                 sum over tokens of x x^T, token count               (K, K) float64, () int64
================================  ==================================================  ==========================

What each computes exactly is written in ``lorap.kernels.reference``, in plain torch; that is also their implementation
wherever no kernel is better (:mod:`lorap.nn.dispatch`). Each has a schema, a fake kernel and gradients, so it works under
``torch.compile(fullgraph=True)``, export and autograd.

The functions here are the ops, minus the cost of torch's Python dispatch where neither gradients nor a compiler are involved:
4 us a call, as much as a small layer takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

from lorap.algorithms.symmetric import add_outer_products
from lorap.errors import ShapeError
from lorap.kernels import reference
from lorap.nn import dispatch, native, shape_checks

# Lists have no defaults: torch 2.13 refuses gradients of a list op that was called without one of its arguments.
_LOW_RANK_LISTS = "Tensor x, Tensor[] right, Tensor[] left, Tensor[] bias"
SCHEMAS = {
    "linear": "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
    "low_rank_linear": "(Tensor x, Tensor right, Tensor left, Tensor? bias=None, Tensor? pivot_rows=None) -> Tensor",
    "low_rank_linear_group": f"({_LOW_RANK_LISTS}, Tensor[] pivot_rows) -> Tensor",
    "silu_gated_linear": "(Tensor x, Tensor gate, Tensor up, Tensor? gate_bias=None, Tensor? up_bias=None) -> Tensor",
    "low_rank_silu_gated_linear": f"({_LOW_RANK_LISTS}) -> Tensor",
    "channel_sq_norm": "(Tensor x, Tensor? mask=None) -> (Tensor, Tensor)",
    "second_moment": "(Tensor x, Tensor? mask=None) -> (Tensor, Tensor)",
}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) and weight (N, K) to (..., N), as ``F.linear``; on a CPU faster for few tokens."""
    return _call("linear", x, weight, bias)


def low_rank_linear(
    x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None = None, pivot_rows: Tensor | None = None
) -> Tensor:
    """x (..., K) through right (R, K) and left (N, R), plus bias (N,): (..., N), in the dtype of x.

    ``pivot_rows`` (R,), ascending int64: pivoted storage; left is then (N - R, R), see :mod:`lorap.kernels.reference`.

    Raises:
        ShapeError: the tensors do not fit together.
    """
    return _call("low_rank_linear", x, right, left, bias, pivot_rows)


def low_rank_linear_group(
    x: Tensor,
    right: Sequence[Tensor],
    left: Sequence[Tensor],
    bias: Sequence[Tensor] = (),
    pivot_rows: Sequence[Tensor] = (),
) -> Tensor:
    """Low-rank layers that read the same x, e.g. q, k and v; their outputs side by side.

    ``bias`` and ``pivot_rows`` are empty, or one tensor per layer, without elements where a layer has none.

    Raises:
        ShapeError: the tensors do not fit together.
    """
    return _call("low_rank_linear_group", x, list(right), list(left), list(bias), list(pivot_rows))


def silu_gated_linear(
    x: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor | None = None, up_bias: Tensor | None = None
) -> Tensor:
    """silu(x gate^T + gate_bias) * (x up^T + up_bias): x (..., K), gate and up (N, K), to (..., N)."""
    return _call("silu_gated_linear", x, gate, up, gate_bias, up_bias)


def low_rank_silu_gated_linear(
    x: Tensor, right: Sequence[Tensor], left: Sequence[Tensor], bias: Sequence[Tensor] = ()
) -> Tensor:
    """:func:`silu_gated_linear` with low-rank gate (first of each list) and up (second)."""
    return _call("low_rank_silu_gated_linear", x, list(right), list(left), list(bias))


def channel_sq_norm(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sum over tokens of x_j^2, token count) of x (..., K): (K,) float64 and () int64; mask (...) marks what counts."""
    return _call("channel_sq_norm", x, mask)


def second_moment(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sum over tokens of x x^T, token count) of x (..., K): (K, K) float64 and () int64; mask (...) marks what counts."""
    return _call("second_moment", x, mask)


def serves(op: str, x: Tensor) -> bool:
    """True where ``op`` on this input has a kernel of ours; False where torch does the work.

    A compiled graph is made for many sizes, so there the op itself decides when it runs.
    """
    return torch.compiler.is_compiling() or dispatch.choose(op, x, _tokens(x)) != "reference"


def _call(op: str, x: Tensor, *rest: Any) -> Any:
    if type(x) is not Tensor or torch.compiler.is_compiling():
        return getattr(torch.ops.lorap, op)(x, *rest)
    if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and _needs_grad(x, rest)):
        # Training: torch's own matmuls keep the intermediate for the backward pass and have derivatives of every kind.
        shape_checks.CHECKS[op](x, *rest)
        return getattr(reference, op)(x, *rest)
    return _run(op, x, *rest)


def _needs_grad(x: Tensor, rest: tuple[Any, ...]) -> bool:
    return x.requires_grad or any(isinstance(t, Tensor) and t.requires_grad for t in tree_flatten(rest)[0])


def _run(op: str, x: Tensor, *rest: Any) -> Any:
    backend = dispatch.choose(op, x, _tokens(x))
    if backend == "triton" and x.is_cuda:
        sizes = tuple(t.shape for t in tree_flatten(rest)[0] if isinstance(t, Tensor))
        backend = "reference" if dispatch.better_in_graph(op, x, sizes) else backend
    if backend == "reference":
        shape_checks.CHECKS[op](x, *rest)  # plain torch lets some misfits pass
        return _IMPLEMENTATIONS["reference"][op](x, *rest)
    try:
        return _IMPLEMENTATIONS[backend][op](x, *rest)
    except RuntimeError:
        shape_checks.CHECKS[op](x, *rest)  # names what does not fit; checking first would cost each call a microsecond
        raise


def _tokens(x: Tensor) -> int:
    """Rows of x (..., K); 0, and so the reference, where x is empty or a scalar."""
    return x.numel() // x.shape[-1] if x.dim() and x.shape[-1] else 0


def _cpu(op: str) -> Callable[..., Any]:
    return getattr(torch.ops.lorap_cpu, op).default if native.HAS_CPU else getattr(reference, op)


def _cuda_low_rank(x: Tensor, right: Tensor, left: Tensor, bias: Any = None, pivot_rows: Any = None) -> Any:
    # What the kernel is written for; a forced backend must not stop the prefill of a model.
    fits = pivot_rows is None and _tokens(x) <= 8 and x.shape[-1] % 8 == 0 and right.shape[0] % 8 == 0
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

    if pivot_rows is None and one_launch_wins(_tokens(x), x.shape[-1], right.shape[0], left.shape[0]):
        return low_rank_fused(x, right, left, bias)
    some = [] if bias is None else [bias]
    return low_rank_linear_group(x, [right], [left], some, [] if pivot_rows is None else [pivot_rows])


def _second_moment(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """On a GPU, products of two bfloat16 or float16 are exact in float32, so tensor cores may do the work."""
    on_tensor_cores = x.is_cuda and x.dtype in dispatch.HALVES
    total = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64, device=x.device)
    for chunk in reference.masked_chunks(x, mask, x.dtype if on_tensor_cores else torch.float64):
        if on_tensor_cores:
            total += torch.mm(chunk.T, chunk, out_dtype=torch.float32)
        else:
            add_outer_products(total, chunk)
    return total, reference.token_count(x, mask)


_IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "reference": {op: getattr(reference, op) for op in SCHEMAS} | {"second_moment": _second_moment},
    "cpu": {op: _cpu(op) for op in dispatch.LINEAR_OPS},
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
    return _IMPLEMENTATIONS[backend][op]


def example(op: str, device: torch.device, dtype: torch.dtype, tokens: int = 3, k: int = 176) -> tuple[Any, ...]:
    """Small arguments of ``op`` with sizes that are no powers of two; the same on every device."""
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


_library = torch.library.Library("lorap", "DEF")


def _register(op: str) -> None:
    _library.define(op + SCHEMAS[op])
    _library.impl(op, lambda x, *rest: _run(op, x, *rest), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lorap::{op}", lambda x, *rest: _fake(op, x, *rest), lib=_library)
    if op not in ("channel_sq_norm", "second_moment"):
        torch.library.register_autograd(f"lorap::{op}", _Backward(op), setup_context=_save_inputs, lib=_library)


def _fake(op: str, x: Tensor, *rest: Any) -> Any:
    size = shape_checks.CHECKS[op](x, *rest)
    devices = {tensor.device.type for tensor in tree_flatten([x, rest])[0] if isinstance(tensor, Tensor)}
    if len(devices) > 1:  # one meta tensor sends a call here, and x.new_empty would be a real one that nobody fills
        raise ShapeError(f"the tensors are on different devices: {', '.join(sorted(devices))}")
    if op in ("channel_sq_norm", "second_moment"):
        shape = (size,) if op == "channel_sq_norm" else (size, size)
        return x.new_empty(shape, dtype=torch.float64), x.new_empty((), dtype=torch.int64)
    return x.new_empty((*x.shape[:-1], size))


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    leaves, ctx.structure = tree_flatten(list(inputs))
    ctx.save_for_backward(*leaves)


class _Backward:
    """Gradients of an op, by running the reference again with autograd on: the kernels keep nothing for a backward pass."""

    def __init__(self, op: str) -> None:
        self.op = op

    def __call__(self, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        again = torch.is_grad_enabled()  # create_graph: the result is differentiated once more
        leaves = list(ctx.saved_tensors)
        wanted = [i for i, needed in enumerate(tree_flatten(list(ctx.needs_input_grad))[0]) if needed]
        with torch.enable_grad():
            for i in wanted:
                if not (again and leaves[i].requires_grad):
                    leaves[i] = leaves[i].detach().requires_grad_()
            y = getattr(reference, self.op)(*tree_unflatten(leaves, ctx.structure))
        found = torch.autograd.grad(y, [leaves[i] for i in wanted], grad, create_graph=again, allow_unused=True)
        results: list[Any] = [None] * len(leaves)
        for i, gradient in zip(wanted, found, strict=True):
            results[i] = gradient
        return tuple(tree_unflatten(results, ctx.structure))


for _op in SCHEMAS:
    _register(_op)
