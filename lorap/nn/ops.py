"""torch.ops.lorap: the operators that compressed models are made of.

================================  ==================================================  ==========================
op                                computes                                            output
================================  ==================================================  ==========================
``linear``                        x weight^T + bias                                   (..., N)
``low_rank_linear``               x right^T left^T + bias                             (..., N)
``low_rank_linear_group``         several of them on one x, side by side              (..., N_1 + N_2 + ...)
``silu_gated_linear``             silu(x gate^T) * (x up^T)                           (..., N)
``low_rank_silu_gated_linear``    the same with low-rank gate and up                  (..., N)
``quantized_linear``              x weight^T + bias, weight in 4 or 8 bits             (..., N)
``quantized_low_rank_linear``     x right^T left^T + bias, both in 4 or 8 bits        (..., N)
``quantized_silu_gated_linear``   silu(x gate^T) * (x up^T), both in 4 or 8 bits      (..., N)
``trellis_linear``                x weight^T + bias, weight in 2 to 6 bits on a trellis (..., N)
``trellis_search``                the windows of a trellis nearest to given numbers   (N in whole tiles, C)
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
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

from lorap.errors import ShapeError
from lorap.kernels import reference, trellis
from lorap.nn import dispatch, graphs, implementations, shape_checks
from lorap.nn.implementations import tokens_of


def _quantized(name: str) -> str:
    return f"Tensor {name}packed, Tensor {name}scales"


# Lists have no defaults: torch 2.13 refuses gradients of a list op that was called without one of its arguments.
_LOW_RANK_LISTS = "Tensor x, Tensor[] right, Tensor[] left, Tensor[] bias"
SCHEMAS = {
    "linear": "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
    "low_rank_linear": "(Tensor x, Tensor right, Tensor left, Tensor? bias=None, Tensor? pivot_rows=None) -> Tensor",
    "low_rank_linear_group": f"({_LOW_RANK_LISTS}, Tensor[] pivot_rows) -> Tensor",
    "silu_gated_linear": "(Tensor x, Tensor gate, Tensor up, Tensor? gate_bias=None, Tensor? up_bias=None) -> Tensor",
    "low_rank_silu_gated_linear": f"({_LOW_RANK_LISTS}) -> Tensor",
    "quantized_linear": f"(Tensor x, {_quantized('')}, Tensor? bias, int bits, int group) -> Tensor",
    "quantized_low_rank_linear": (
        f"(Tensor x, {_quantized('left_')}, {_quantized('right_')}, Tensor? bias, int bits, int group, "
        "Tensor? pivot_rows=None) -> Tensor"
    ),
    "quantized_silu_gated_linear": (
        f"(Tensor x, {_quantized('gate_')}, {_quantized('up_')}, int bits, int group) -> Tensor"
    ),
    "trellis_linear": "(Tensor x, Tensor packed, Tensor scales, Tensor? bias, int bits, int group) -> Tensor",
    "trellis_search": "(Tensor wanted, Tensor importance, int bits) -> Tensor",
    "channel_sq_norm": "(Tensor x, Tensor? mask=None) -> (Tensor, Tensor)",
    "second_moment": "(Tensor x, Tensor? mask=None) -> (Tensor, Tensor)",
}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, as ``F.linear``; on a CPU faster for few tokens.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,) or None.

    Returns:
        (..., N), in the dtype of x.

    Raises:
        ShapeError: the tensors do not fit together.
    """
    return _call("linear", x, weight, bias)


def low_rank_linear(
    x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None = None, pivot_rows: Tensor | None = None
) -> Tensor:
    """x right^T left^T + bias.

    Args:
        x: (..., K).
        right: (R, K).
        left: (N, R); with ``pivot_rows`` (N - R, R).
        bias: (N,) or None.
        pivot_rows: (R,), ascending int64, for pivoted storage, see :mod:`lorap.kernels.reference`.

    Returns:
        (..., N), in the dtype of x.

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
    """Low-rank layers that read the same x, e.g. q, k and v.

    Args:
        x: (..., K).
        right: (R_i, K) of each layer.
        left: (N_i, R_i) of each, or (N_i - R_i, R_i) where it is pivoted.
        bias: empty, or (N_i,) of each, without elements where a layer has none.
        pivot_rows: empty, or (R_i,) int64 of each, without elements where a layer has none.

    Returns:
        (..., N_1 + N_2 + ...): their outputs side by side, in the dtype of x.

    Raises:
        ShapeError: the tensors do not fit together.
    """
    return _call("low_rank_linear_group", x, list(right), list(left), list(bias), list(pivot_rows))


def silu_gated_linear(
    x: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor | None = None, up_bias: Tensor | None = None
) -> Tensor:
    """silu(x gate^T + gate_bias) * (x up^T + up_bias).

    Args:
        x: (..., K).
        gate: (N, K).
        up: (N, K).
        gate_bias: (N,) or None.
        up_bias: (N,) or None.

    Returns:
        (..., N), in the dtype of x.

    Raises:
        ShapeError: the tensors do not fit together.
    """
    return _call("silu_gated_linear", x, gate, up, gate_bias, up_bias)


def low_rank_silu_gated_linear(
    x: Tensor, right: Sequence[Tensor], left: Sequence[Tensor], bias: Sequence[Tensor] = ()
) -> Tensor:
    """:func:`silu_gated_linear` with low-rank gate (first of each list) and up (second).

    Args:
        x: (..., K).
        right: (R_i, K) of gate and of up.
        left: (N, R_i) of both.
        bias: empty, or (N,) of both, without elements where one has none.

    Returns:
        (..., N), in the dtype of x.

    Raises:
        ShapeError: the tensors do not fit together.
    """
    return _call("low_rank_silu_gated_linear", x, list(right), list(left), list(bias))


def quantized_linear(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, bits: int, group: int) -> Tensor:
    """x weight^T + bias, with a weight of whole numbers in 4 or 8 bits and scales, see :mod:`lorap.kernels.packing`.

    Args:
        x: (..., K).
        packed: (N, ceil(K * bits / 32)) int32.
        scales: (N, ceil(K / group)), floating point.
        bias: (N,) or None.
        bits: 4 or 8.
        group: how many numbers of a row share a scale, a multiple of 32; the last group may have fewer.

    Returns:
        (..., N), in the dtype of x.

    Raises:
        ShapeError: the tensors do not fit together.
    """
    return _call("quantized_linear", x, packed, scales, bias, bits, group)


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
    """:func:`low_rank_linear` with both factors as in :func:`quantized_linear`.

    Args:
        x: (..., K).
        left_packed: (N, ceil(R * bits / 32)) int32; with ``pivot_rows`` N - R rows.
        left_scales: (N, ceil(R / group)); with ``pivot_rows`` N - R rows.
        right_packed: (R, ceil(K * bits / 32)) int32.
        right_scales: (R, ceil(K / group)).
        bias: (N,) or None.
        bits: of both factors.
        group: of both factors.
        pivot_rows: (R,), ascending int64, as for :func:`low_rank_linear`.

    Returns:
        (..., N), in the dtype of x.

    Raises:
        ShapeError: the tensors do not fit together.
    """
    weights = (left_packed, left_scales, right_packed, right_scales)
    return _call("quantized_low_rank_linear", x, *weights, bias, bits, group, pivot_rows)


def quantized_silu_gated_linear(
    x: Tensor, gate_packed: Tensor, gate_scales: Tensor, up_packed: Tensor, up_scales: Tensor, bits: int, group: int
) -> Tensor:
    """silu(x gate^T) * (x up^T), gate and up as in :func:`quantized_linear`; x (..., K) to (..., N), in the dtype of x.

    Raises:
        ShapeError: the tensors do not fit together.
    """
    return _call("quantized_silu_gated_linear", x, gate_packed, gate_scales, up_packed, up_scales, bits, group)


def trellis_linear(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, bits: int, group: int) -> Tensor:
    """x weight^T + bias, with a weight of numbers on a trellis and scales, see :mod:`lorap.kernels.trellis`.

    Args:
        x: (..., K).
        packed: (ceil(N / 64), K * 2 * bits) int32.
        scales: (N, ceil(K / group)), floating point.
        bias: (N,) or None.
        bits: 2 to 6.
        group: how many weights of a row share a scale, a multiple of 32; the last group may have fewer.

    Returns:
        (..., N), in the dtype of x.

    Raises:
        ShapeError: the tensors do not fit together.
    """
    return _call("trellis_linear", x, packed, scales, bias, bits, group)


def trellis_search(wanted: Tensor, importance: Tensor, bits: int) -> Tensor:
    """The windows on a trellis with (nearly) the least sum of importance * (wanted - number)^2 in each column of a tile.

    Args:
        wanted: (N, C), floating point, in units of the numbers: already divided by the scales. Taken in float32.
        importance: (N, C), at least 0. A row of importance 0 costs nothing, whatever is wanted there.
        bits: 2 to 6.

    Returns:
        (ceil(N / 64) * 64, C) int32, which :func:`lorap.kernels.trellis.pack` takes; rows beyond N are importance 0.

    Raises:
        ShapeError: the tensors do not fit together.
    """
    return _call("trellis_search", wanted, importance, bits)


def channel_sq_norm(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sum over tokens of x_j^2, token count) of x (..., K): (K,) float64 and () int64; mask (...) marks what counts."""
    return _call("channel_sq_norm", x, mask)


def second_moment(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sum over tokens of x x^T, token count) of x (..., K): (K, K) float64 and () int64; mask (...) marks what counts."""
    return _call("second_moment", x, mask)


def served(op: str, x: Tensor) -> Callable[..., Any] | None:
    """What runs ``op`` on x where a kernel of ours does, to be called with x and all other arguments; None where torch would.

    For who has another way then, such as one projection after the other: the choice is made here, once. A compiled graph is made
    for many sizes, so there the op itself decides when it runs.
    """
    if torch.compiler.is_compiling():
        return partial(_call, op)
    backend = dispatch.choose(op, x, tokens_of(x))
    return None if backend == "reference" else partial(_call, op, backend=backend)


def _call(op: str, x: Tensor, *rest: Any, backend: str | None = None) -> Any:
    if type(x) is not Tensor or torch.compiler.is_compiling():
        return getattr(torch.ops.lorap, op)(x, *rest)
    if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and _needs_grad(x, rest)):
        # Training: torch's own matmuls keep the intermediate for the backward pass and have derivatives of every kind.
        shape_checks.CHECKS[op](x, *rest)
        return getattr(reference, op)(x, *rest)
    return _run(op, x, *rest, backend=backend)


def _needs_grad(x: Tensor, rest: tuple[Any, ...]) -> bool:
    return x.requires_grad or any(isinstance(t, Tensor) and t.requires_grad for t in tree_flatten(rest)[0])


def _run(op: str, x: Tensor, *rest: Any, backend: str | None = None) -> Any:
    backend = backend or dispatch.choose(op, x, tokens_of(x))
    few_bits = backend == "cuda" and op == "quantized_low_rank_linear"
    if few_bits and dispatch.current() == "auto" and not implementations.one_launch_wins(x, *rest):
        backend = dispatch.choose(op, x, tokens_of(x), without="cuda")
    if backend == "triton" and x.is_cuda and dispatch.current() == "auto" and graphs.left_to_torch(op, x, *rest):
        backend = "reference"
    if backend == "reference":
        shape_checks.CHECKS[op](x, *rest)  # plain torch lets some misfits pass
        return implementations.implementation(op, "reference")(x, *rest)
    try:
        return implementations.implementation(op, backend)(x, *rest)
    except (RuntimeError, ValueError):
        shape_checks.CHECKS[op](x, *rest)  # names what does not fit; checking first would cost each call a microsecond
        raise


WITHOUT_GRADIENTS = ("trellis_search", "channel_sq_norm", "second_moment")
_library = torch.library.Library("lorap", "DEF")


def _register(op: str) -> None:
    _library.define(op + SCHEMAS[op])
    _library.impl(op, lambda x, *rest: _run(op, x, *rest), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lorap::{op}", lambda x, *rest: _fake(op, x, *rest), lib=_library)
    if op not in WITHOUT_GRADIENTS:
        torch.library.register_autograd(f"lorap::{op}", _Backward(op), setup_context=_save_inputs, lib=_library)


def _fake(op: str, x: Tensor, *rest: Any) -> Any:
    size = shape_checks.CHECKS[op](x, *rest)
    devices = {tensor.device.type for tensor in tree_flatten([x, rest])[0] if isinstance(tensor, Tensor)}
    if len(devices) > 1:  # one meta tensor sends a call here, and x.new_empty would be a real one that nobody fills
        raise ShapeError(f"the tensors are on different devices: {', '.join(sorted(devices))}")
    if op in ("channel_sq_norm", "second_moment"):
        shape = (size,) if op == "channel_sq_norm" else (size, size)
        return x.new_empty(shape, dtype=torch.float64), x.new_empty((), dtype=torch.int64)
    if op == "trellis_search":
        return x.new_empty((trellis.tiles(x.shape[0]) * trellis.TILE, size), dtype=torch.int32)
    return x.new_empty((*x.shape[:-1], size))


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    leaves, ctx.structure = tree_flatten(list(inputs))
    ctx.numbers = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, int)}
    ctx.save_for_backward(*(None if i in ctx.numbers else leaf for i, leaf in enumerate(leaves)))


class _Backward:
    """Gradients of an op, by running the reference again with autograd on: the kernels keep nothing for a backward pass."""

    def __init__(self, op: str) -> None:
        self.op = op

    def __call__(self, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        again = torch.is_grad_enabled()  # create_graph: the result is differentiated once more
        leaves = [ctx.numbers.get(i, leaf) for i, leaf in enumerate(ctx.saved_tensors)]
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
