"""Who can run which op: functions by backend and op, without the choice between them (:mod:`lorap.nn.dispatch`)."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lorap.algorithms.symmetric import add_outer_products
from lorap.kernels import cost, packing, reference, trellis
from lorap.nn import cuda_limits, native, unpacked

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
LINEAR_OPS = ("linear", "low_rank_linear", "low_rank_linear_group", "silu_gated_linear", "low_rank_silu_gated_linear")
QUANTIZED_OPS = ("quantized_linear", "quantized_low_rank_linear", "quantized_silu_gated_linear")
TRELLIS_OPS = ("trellis_linear", "trellis_search")
FEW_BITS_OPS = (*QUANTIZED_OPS, "trellis_linear")  # those with weights that torch would write in 16 bits first
OPS = (*LINEAR_OPS, *QUANTIZED_OPS, *TRELLIS_OPS, "channel_sq_norm", "second_moment")
# Adding K^2 sums up in float64 takes a GPU longer than multiplying 1,024 tokens in 16 bits: modelled 78 us beside 45 at K = 4096.
TENSOR_CORE_TOKENS = 8192


def tokens_of(x: Tensor) -> int:
    """Rows of x (..., K); 0, and so the reference, where x is empty or a scalar."""
    return x.numel() // x.shape[-1] if x.dim() and x.shape[-1] else 0


def _cpu(op: str) -> Callable[..., Any]:
    return getattr(torch.ops.lorap_cpu, op).default if native.HAS_CPU else getattr(reference, op)


def _cpu_quantized_low_rank(x: Tensor, *rest: Any) -> Tensor:
    """The op of csrc/cpu has no pivots."""
    if len(rest) == 8 and rest[-1] is not None:
        return unpacked.two_products(_cpu("quantized_linear"), x, *rest)
    return _cpu("quantized_low_rank_linear")(x, *rest[:7])


# What the CUDA kernels are not written for goes to torch: a forced backend must not stop the prefill of a model.
def _cuda_low_rank(x: Tensor, right: Tensor, left: Tensor, bias: Any = None, pivot_rows: Any = None) -> Any:
    x, right, left = x.contiguous(), right.contiguous(), left.contiguous()
    if not cuda_limits.takes(tokens_of(x), x, [right], [left], [] if pivot_rows is None else [pivot_rows]):
        return _low_rank_linear(x, right, left, bias, pivot_rows)
    return torch.ops.lorap_cuda.low_rank_linear.default(x, right, left, bias, pivot_rows)


def _cuda_low_rank_group(x: Tensor, right: Any, left: Any, bias: Any = (), pivot_rows: Any = ()) -> Any:
    x, right, left = x.contiguous(), [one.contiguous() for one in right], [one.contiguous() for one in left]
    if not cuda_limits.takes(tokens_of(x), x, right, left, pivot_rows):
        return _low_rank_linear_group(x, right, left, bias, pivot_rows)
    return torch.ops.lorap_cuda.low_rank_linear_group.default(x, right, left, list(bias), list(pivot_rows))


def _cuda_quantized_low_rank(x: Tensor, *rest: Any) -> Tensor:
    x = x.contiguous()
    if not cuda_limits.takes_packed(tokens_of(x), x, [rest]):
        return _triton_quantized_low_rank(x, *rest)
    y: Tensor = torch.ops.lorap_cuda.quantized_low_rank_linear.default(x, *rest)
    return y


def one_launch_wins(x: Tensor, *rest: Any) -> bool:
    """Whether csrc/cuda takes a call of quantized_low_rank_linear, and is modelled faster than the Triton kernels."""
    tokens = tokens_of(x)
    return cuda_limits.takes_packed(tokens, x, [rest]) and cuda_limits.pays_packed(tokens, x, [rest])


def _triton(module: str, function: str, *, pdl: bool = False) -> Callable[..., Any]:
    """Imports triton only when one of its kernels is really used; ``pdl``: its second launch need not wait for the first."""

    def launch(*arguments: Any) -> Any:
        import importlib

        options = {"pdl": True} if pdl and arguments[0].is_cuda else {}
        return getattr(importlib.import_module(f"lorap.kernels.{module}"), function)(*arguments, **options)

    return launch


def _triton_low_rank(x: Tensor, right: Tensor, left: Tensor, bias: Any = None, pivot_rows: Any = None) -> Any:
    from lorap.kernels.low_rank_fused import low_rank_fused, one_launch_wins
    from lorap.kernels.low_rank_linear import low_rank_linear_group

    if pivot_rows is None and one_launch_wins(tokens_of(x), x.shape[-1], right.shape[0], left.shape[0]):
        return low_rank_fused(x, right, left, bias)
    some = [] if bias is None else [bias]
    return low_rank_linear_group(x, [right], [left], some, [] if pivot_rows is None else [pivot_rows], pdl=x.is_cuda)


def _triton_quantized_low_rank(x: Tensor, *rest: Any) -> Tensor:
    from lorap.kernels import quantized_linear, quantized_low_rank_linear

    if tokens_of(x) <= cost.FUSED_TOKENS:
        return quantized_low_rank_linear.quantized_low_rank_linear(x, *rest)
    left, left_scales, right, right_scales, bias, *how = rest
    columns, (bits, group, *pivot_rows) = (x.shape[-1], len(right)), how
    first = quantized_linear.checked(right, right_scales, bits, group, columns[0], x.dtype)
    second = quantized_linear.checked(left, left_scales, bits, group, columns[1], x.dtype)
    factors = [quantized_linear.dequantized(one, k) for one, k in zip((first, second), columns, strict=True)]
    return _low_rank_linear(x, factors[0], factors[1], bias, pivot_rows[0] if pivot_rows else None)


# Tensor of pivot rows -> its version and the order of the outputs. Finding it takes eight launches, more than the layer itself.
_orders: MutableMapping[Tensor, tuple[int | None, Tensor]] = WeakIdKeyDictionary()


def output_order(pivot_rows: Tensor, out_features: int) -> Tensor:
    """:func:`lorap.kernels.reference.output_order`, kept on a GPU for as long as ``pivot_rows`` lives and does not change."""
    if not pivot_rows.is_cuda:
        return reference.output_order(pivot_rows, out_features)
    version = None if pivot_rows.is_inference() else pivot_rows._version
    kept = _orders.get(pivot_rows)
    if kept is None or kept[0] != version or len(kept[1]) != out_features:
        kept = version, reference.output_order(pivot_rows, out_features)
        if not torch.cuda.is_current_stream_capturing():  # what a graph makes is its own
            _orders[pivot_rows] = kept
    return kept[1]


def _low_rank_linear(
    x: Tensor,
    right: Tensor,
    left: Tensor,
    bias: Tensor | None = None,
    pivot_rows: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The reference without gradients, in two launches on a GPU and a third for pivots: no copies but that into their order.

    Args:
        x: (..., K).
        right: (R, K).
        left: (N, R), or (N - R, R).
        bias: (N,) or None.
        pivot_rows: (R,) or None.
        out: (tokens, N) to write to, with the columns of a row side by side; None for a new one.
    """
    if out is None and (pivot_rows is None or not len(left) or not x.is_cuda):
        return reference.low_rank_linear(x, right, left, bias, pivot_rows)
    rank, n = right.shape[0], left.shape[0] + (0 if pivot_rows is None else right.shape[0])
    tokens = x.reshape(-1, x.shape[-1])
    y = tokens.new_empty(len(tokens), n) if out is None else out
    if pivot_rows is None:
        _product(tokens @ right.T, left, bias, y)
    elif not len(left):
        _product(tokens, right, bias, y)
    else:
        rows = tokens.new_empty(len(tokens), n)
        shrunk, others = rows.split((rank, n - rank), dim=1)
        _product(tokens, right, None, shrunk)
        _product(shrunk, left, None, others)
        torch.index_select(rows, 1, output_order(pivot_rows, n), out=y)
        if bias is not None:
            y += bias
    return y.view(*x.shape[:-1], n) if out is None else y


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """x weight^T + bias into ``out``, in one launch."""
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


def _low_rank_linear_group(
    x: Tensor,
    right: Sequence[Tensor],
    left: Sequence[Tensor],
    bias: Sequence[Tensor] = (),
    pivot_rows: Sequence[Tensor] = (),
) -> Tensor:
    """The reference without gradients; on a GPU each layer writes its own columns of the output."""
    if not x.is_cuda:
        return reference.low_rank_linear_group(x, right, left, bias, pivot_rows)
    tokens = x.reshape(-1, x.shape[-1])
    pivots = [rows if rows.numel() else None for rows in pivot_rows] or [None] * len(right)
    biases = [one if one.numel() else None for one in bias] or [None] * len(right)
    sizes = [len(second) + (0 if rows is None else len(rows)) for second, rows in zip(left, pivots, strict=True)]
    y = tokens.new_empty(len(tokens), sum(sizes))
    for i, part in enumerate(y.split(sizes, dim=1)):
        _low_rank_linear(tokens, right[i], left[i], biases[i], pivots[i], out=part)
    return y.view(*x.shape[:-1], sum(sizes))


def _second_moment(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """On a GPU, products of two bfloat16 or float16 are exact in float32, so tensor cores may do the work."""
    total = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64, device=x.device)
    if x.is_cuda and x.dtype in HALVES:
        for chunk in reference.masked_chunks(x, mask, x.dtype, tokens=TENSOR_CORE_TOKENS):
            total += torch.mm(chunk.T, chunk, out_dtype=torch.float32)
    else:
        for chunk in reference.masked_chunks(x, mask, torch.float64):
            add_outer_products(total, chunk)
    return total, reference.token_count(x, mask)


IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "reference": {op: getattr(reference, op) for op in OPS}
    | {"low_rank_linear": _low_rank_linear, "low_rank_linear_group": _low_rank_linear_group}
    | {"second_moment": _second_moment}
    | {op: getattr(unpacked, op) for op in FEW_BITS_OPS},
    "cpu": {op: _cpu(op) for op in (*LINEAR_OPS, *QUANTIZED_OPS, *TRELLIS_OPS)}
    | {"quantized_low_rank_linear": _cpu_quantized_low_rank},
    "triton": {
        "linear": _triton("linear", "linear"),
        "low_rank_linear": _triton_low_rank,
        "low_rank_linear_group": _triton("low_rank_linear", "low_rank_linear_group", pdl=True),
        "silu_gated_linear": _triton("silu_gated_linear", "silu_gated_linear"),
        "low_rank_silu_gated_linear": _triton("low_rank_linear", "low_rank_silu_gated_linear", pdl=True),
        "quantized_linear": _triton("quantized_linear", "quantized_linear"),
        "quantized_low_rank_linear": _triton_quantized_low_rank,
        "quantized_silu_gated_linear": _triton("quantized_silu_gated_linear", "quantized_silu_gated_linear"),
        "trellis_linear": _triton("trellis_linear", "trellis_linear"),
        "channel_sq_norm": _triton("channel_sq_norm", "channel_sq_norm"),
    },
    "cuda": {"low_rank_linear": _cuda_low_rank, "low_rank_linear_group": _cuda_low_rank_group}
    | {"quantized_low_rank_linear": _cuda_quantized_low_rank},
}


def implementation(op: str, backend: str) -> Callable[..., Any]:
    """The function that runs ``op`` on one backend, without dispatch; for tests, self-checks and benchmarks."""
    return IMPLEMENTATIONS[backend][op]


# (tokens, k, pivoted) of examples that together run each form of a kernel: the numbers of tokens that kernels are written for; a
# K that is split between programs, and one that is not; one launch, and two; pivots, and a dense layer in a group.
EXAMPLES = (
    *((3, 176, False), (1, 176, False), (1, 8208, False), (3, 4112, False), (20, 176, False), (20, 4112, False)),
    *((7, 176, False), (1, 176, True), (2, 176, True), (20, 176, True), (2, 4112, True), (20, 4112, True)),
    *((11, 176, False), (13, 176, True)),  # more than 8: in csrc/cuda those are for tensor cores
)
# Of weights in 4 bits and, where it says pivoted, in 8; more tokens than are multiplied as weights are read.
QUANTIZED_EXAMPLES = (
    *(
        (1, 192, False),
        (1, 176, True),
        (1, 176, False),
        (1, 8224, False),
        (1, 8224, True),
        (3, 4128, False),
        (7, 176, True),
    ),
    *((5, 176, False), (20, 192, False), (20, 4128, True), (40, 192, False), (40, 192, True)),
    *(
        (2, 192, False),
        (2, 4128, True),
        (4, 176, True),
        (8, 192, False),
        (8, 4128, True),
    ),  # for csrc/cuda, with some above
    *((cost.FUSED_TOKENS + 2, 192, False), (cost.FUSED_TOKENS + 2, 176, True)),
)
# Of weights on a trellis: with as many bits as K says, see `example`.
TRELLIS_EXAMPLES = tuple((tokens, k, False) for tokens in (1, 5, 20, 40) for k in (175, 176, 192, 193, 194))
# Of a product with them, too: groups of 256, more tokens than are multiplied as weights are read, and a K that no programs share.
TRELLIS_LINEAR_EXAMPLES = (
    *((tokens, k, False) for tokens in (1, 20, 40, cost.FUSED_TOKENS + 2) for k in (560, 576, 592, 578, 584)),
    *(
        (tokens, k, False)
        for tokens, k in ((1, 48), (20, 49), (40, 50), (1, 46), (20, 47), (cost.FUSED_TOKENS + 2, 193))
    ),
)
PIVOTED_OPS = ("low_rank_linear", "low_rank_linear_group")


def examples_of(op: str) -> tuple[tuple[int, int, bool], ...]:
    """(tokens, k, pivoted) for :func:`example` that together run each form of an op's kernels."""
    if op in QUANTIZED_OPS:
        return QUANTIZED_EXAMPLES
    if op in TRELLIS_OPS:
        return (
            (*TRELLIS_EXAMPLES, *TRELLIS_LINEAR_EXAMPLES)
            if op == "trellis_linear"
            else TRELLIS_EXAMPLES[: len(trellis.BITS)]
        )
    if op not in LINEAR_OPS:
        return EXAMPLES[:1]
    return tuple(one for one in EXAMPLES if op in PIVOTED_OPS or not one[-1])


def form_of(op: str, tokens: int) -> int:
    """Kernels for one token, for at most 16 and for more have nothing in common: the largest number that shares theirs."""
    if op not in (*LINEAR_OPS, *FEW_BITS_OPS):
        return 0
    if op in FEW_BITS_OPS and tokens > cost.FUSED_TOKENS:
        return cost.FUSED_TOKENS + 1
    return 1 if tokens == 1 else 16 if tokens <= 16 else 32


def example(
    op: str, device: torch.device, dtype: torch.dtype, tokens: int = 3, k: int = 176, pivoted: bool = False
) -> tuple[Any, ...]:
    """Small arguments of ``op`` with sizes that are no powers of two; the same on every device.

    Args:
        op: one of ``OPS``.
        device: for the tensors.
        dtype: of those that are floating point.
        tokens: rows of x; statistics have 100.
        k: size of the last axis of x.
        pivoted: with pivot rows, for an op of ``PIVOTED_OPS``; a group then has a pivoted layer, a dense one and a plain one.
            For an op of ``QUANTIZED_OPS``: in 8 bits, with pivot rows where it has them.

    Weights on a trellis have 2 to 6 bits, as K modulo 5 says, in groups of 32; those with more than 512 features in groups of
    256.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).mul(size[-1] ** -0.5).to(device, dtype)

    rank, n, wide = 48, 112, 8512 if k == 176 and tokens != 3 else 48  # so many rows that a GPU gets larger tiles

    bits, size = (8, 64) if pivoted else (4, 32 if k == 176 else 64)
    inner = 96 if k % 32 == 0 else rank  # of which csrc/cuda takes the first

    def quantized(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        numbers = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=generator)
        scales = torch.rand(rows, -(-columns // size), generator=generator).add(0.5).mul(0.2 * columns**-0.5)
        return packing.pack(numbers, bits).to(device), scales.mul(2.0 ** (4 - bits)).to(device, dtype)

    def on_trellis(rows: int, columns: int, bits: int) -> tuple[Tensor, Tensor]:
        shape = trellis.packed_shape(rows, columns, bits)
        words = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64)
        scales = torch.rand(rows, -(-columns // by), generator=generator).add(0.5).mul(columns**-0.5)
        return words.to(device, torch.int32), scales.to(device, dtype)

    x, few, by = random(tokens, k), trellis.BITS[k % len(trellis.BITS)], 256 if k > 512 else 32
    right, left = [random(rank, k), random(rank + 16, k)], [random(n, rank), random(n, rank + 16)]
    third, rows = (random(rank + 32, k), random(80, rank + 32)), torch.arange(rank, device=device) * 2 + 3
    if pivoted and op in PIVOTED_OPS:
        dense, all_rows = random(80, k), torch.arange(80, device=device)
        group = [right[0], dense, third[0]], [left[0], dense.new_empty(0, 80), third[1]]
        biases = [random(n + rank), random(80), random(80)]
        pivots = [rows, all_rows, all_rows.new_empty(0)]
        return (x, right[0], left[0], biases[0], rows) if op == "low_rank_linear" else (x, *group, biases, pivots)
    by_op: dict[str, tuple[Any, ...]] = {
        "linear": (x, right[0]),
        "low_rank_linear": (x, right[0], left[0], random(n)),
        "low_rank_linear_group": (x, [*right, third[0]], [*left, third[1]], [random(n), random(n), random(80)], []),
        "silu_gated_linear": (x, random(wide, k), random(wide, k)),
        "low_rank_silu_gated_linear": (x, right, left, []),
        "quantized_linear": (x, *quantized(n, k), random(n), bits, size),
        "quantized_low_rank_linear": (x, *quantized(n, inner), *quantized(inner, k))
        + (
            (random(n + inner), bits, size, torch.arange(inner, device=device) * 2 + 3)
            if pivoted
            else (random(n), bits, size)
        ),
        "quantized_silu_gated_linear": (x, *quantized(n, k), *quantized(n, k), bits, size),
        "trellis_linear": (x, *on_trellis(n, k, few), random(n), few, by),
        "trellis_search": (random(100, 3).mul(2), random(100, 3).abs(), few),
        "channel_sq_norm": (random(100, k), torch.arange(100, device=device) % 3 > 0),
        "second_moment": (random(100, k), torch.arange(100, device=device) % 3 > 0),
    }
    return by_op[op]
