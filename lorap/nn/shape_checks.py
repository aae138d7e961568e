"""Do the tensors given to an op fit together? One function per op, with the op's arguments.

Each returns the size of the output's last axis, and raises a ShapeError that names the tensor and the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lorap.errors import ShapeError
from lorap.kernels import packing, trellis

_ON_TRELLIS = f"{trellis.BITS[0]} to {trellis.BITS[-1]}"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ShapeError(message)


def _check_matrix(name: str, weight: Tensor, columns: int, source: str) -> None:
    _require(weight.dim() == 2, f"{name} has shape {tuple(weight.shape)}; it must have 2 dimensions")
    shape = tuple(weight.shape)
    _require(weight.shape[1] == columns, f"{name} {shape} has {weight.shape[1]} columns, but {source} is {columns}")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> int:
    """Arguments of :func:`lorap.nn.ops.linear`; returns N."""
    _require(x.dim() >= 1, "x is a scalar; its last axis must hold the features")
    _check_matrix("weight", weight, x.shape[-1], "the last axis of x")
    _check_bias(bias, weight.shape[0])
    return weight.shape[0]


def _check_bias(bias: Tensor | None, out_features: int) -> None:
    fits = bias is None or tuple(bias.shape) == (out_features,)
    _require(
        fits, f"bias has shape {None if bias is None else tuple(bias.shape)}, the output has {out_features} features"
    )


def low_rank_linear(
    x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None = None, pivot_rows: Tensor | None = None
) -> int:
    """Arguments of :func:`lorap.nn.ops.low_rank_linear`; returns N."""
    _require(x.dim() >= 1, "x is a scalar; its last axis must hold the features")
    _check_matrix("right", right, x.shape[-1], "the last axis of x")
    _check_matrix("left", left, right.shape[0], "the rank (rows of right)")
    out_features = left.shape[0] + _check_pivots(pivot_rows, right.shape[0])
    _check_bias(bias, out_features)
    return out_features


def _check_pivots(pivot_rows: Tensor | None, rank: int) -> int:
    """How many rows of the output are pivots."""
    if pivot_rows is None:
        return 0
    shape = tuple(pivot_rows.shape)
    _require(shape == (rank,), f"pivot_rows has shape {shape}; one row per rank is needed, ({rank},)")
    _require(pivot_rows.dtype == torch.int64, f"pivot_rows is {pivot_rows.dtype}, not int64")
    return rank


def low_rank_linear_group(
    x: Tensor,
    right: Sequence[Tensor],
    left: Sequence[Tensor],
    bias: Sequence[Tensor] | None = None,
    pivots: Sequence[Tensor] | None = None,
) -> int:
    """Arguments of :func:`lorap.nn.ops.low_rank_linear_group`; returns N_1 + N_2 + ..."""
    count, biases, pivot_lists = len(right), bias or (), pivots or ()
    sizes = f"{count} right, {len(left)} left, {len(biases)} bias, {len(pivot_lists)} pivot_rows"
    fits = count > 0 and len(left) == count and len(biases) in (0, count) and len(pivot_lists) in (0, count)
    _require(fits, f"a group needs as many of each, bias and pivot_rows may be empty: got {sizes}")

    def item(tensors: Sequence[Tensor], index: int) -> Tensor | None:
        return tensors[index] if tensors and tensors[index].numel() else None

    return sum(low_rank_linear(x, right[i], left[i], item(biases, i), item(pivot_lists, i)) for i in range(count))


def silu_gated_linear(
    x: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor | None = None, up_bias: Tensor | None = None
) -> int:
    """Arguments of :func:`lorap.nn.ops.silu_gated_linear`; returns N."""
    _require(gate.shape == up.shape, f"gate has shape {tuple(gate.shape)}, up has {tuple(up.shape)}")
    return max(linear(x, gate, gate_bias), linear(x, up, up_bias))


def low_rank_silu_gated_linear(
    x: Tensor, right: Sequence[Tensor], left: Sequence[Tensor], bias: Sequence[Tensor] | None = None
) -> int:
    """Arguments of :func:`lorap.nn.ops.low_rank_silu_gated_linear`; returns N."""
    _require(len(right) == 2, f"gate and up are two layers, got {len(right)}")
    low_rank_linear_group(x, right, left, bias)
    _require(left[0].shape[0] == left[1].shape[0], f"gate has width {left[0].shape[0]}, up {left[1].shape[0]}")
    return left[0].shape[0]


def quantized_linear(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, bits: int, group: int) -> int:
    """Arguments of :func:`lorap.nn.ops.quantized_linear`; returns N."""
    _check_input(x)
    return _check_quantized("packed", packed, scales, x.shape[-1], bias, bits, group)


def _check_input(x: Tensor) -> None:
    """What weights in few bits are multiplied with. They are decoded in its dtype, in whole numbers most would be 0."""
    _require(x.dim() >= 1, "x is a scalar; its last axis must hold the features")
    _require(x.is_floating_point(), f"x is {x.dtype}, not floating point")


def _check_quantized(
    name: str, packed: Tensor, scales: Tensor, columns: int, bias: Tensor | None, bits: int, group: int
) -> int:
    """One weight of ``columns`` columns; returns its rows."""
    _require(bits in packing.BITS, f"{name} has numbers of {bits} bits; it must be 4 or 8")
    rows = packed.shape[0] if packed.dim() else 0
    _check_stored(
        name,
        packed,
        scales,
        (rows, packing.words(columns, bits)),
        rows,
        columns,
        group,
        f"{columns} columns of {bits} bits",
    )
    _check_bias(bias, rows)
    return rows


def _check_stored(
    name: str, packed: Tensor, scales: Tensor, shape: tuple[int, int], rows: int, columns: int, group: int, what: str
) -> None:
    """The words of a weight, which have ``shape``, and its scales; both follow from ``what`` there is, and the groups."""
    _require(group > 0 and group % 32 == 0, f"{name} has groups of {group} numbers; it must be a multiple of 32")
    _require(packed.dtype == torch.int32, f"{name} is {packed.dtype}, not int32")
    _require(scales.is_floating_point(), f"the scales of {name} are {scales.dtype}, not floating point")
    wanted = (name, packed, shape), (f"the scales of {name}", scales, (rows, -(-columns // group)))
    for which, tensor, made in wanted:
        _require(
            tuple(tensor.shape) == made,
            f"{which}: shape {tuple(tensor.shape)}, but {what} in groups of {group} make {made}",
        )


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
) -> int:
    """Arguments of :func:`lorap.nn.ops.quantized_low_rank_linear`; returns N."""
    _check_input(x)
    rank = _check_quantized("right_packed", right_packed, right_scales, x.shape[-1], None, bits, group)
    rows = _check_quantized("left_packed", left_packed, left_scales, rank, None, bits, group)
    out_features = rows + _check_pivots(pivot_rows, rank)
    _check_bias(bias, out_features)
    return out_features


def quantized_silu_gated_linear(
    x: Tensor, gate_packed: Tensor, gate_scales: Tensor, up_packed: Tensor, up_scales: Tensor, bits: int, group: int
) -> int:
    """Arguments of :func:`lorap.nn.ops.quantized_silu_gated_linear`; returns N."""
    _require(
        gate_packed.shape == up_packed.shape,
        f"gate_packed has shape {tuple(gate_packed.shape)}, up_packed has {tuple(up_packed.shape)}",
    )
    width = quantized_linear(x, gate_packed, gate_scales, None, bits, group)
    return max(width, quantized_linear(x, up_packed, up_scales, None, bits, group))


def trellis_linear(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, bits: int, group: int) -> int:
    """Arguments of :func:`lorap.nn.ops.trellis_linear`; returns N."""
    _check_input(x)
    _require(bits in trellis.BITS, f"packed has weights of {bits} bits; it must be {_ON_TRELLIS}")
    rows, columns = scales.shape[0] if scales.dim() else 0, x.shape[-1]
    what = f"{rows} rows and {columns} columns of {bits} bits"
    _check_stored("packed", packed, scales, trellis.packed_shape(rows, columns, bits), rows, columns, group, what)
    _check_bias(bias, rows)
    return rows


def trellis_search(wanted: Tensor, importance: Tensor, bits: int) -> int:
    """Arguments of :func:`lorap.nn.ops.trellis_search`; returns the number of columns."""
    _require(wanted.dim() == 2, f"wanted has shape {tuple(wanted.shape)}; it must have 2 dimensions")
    shapes = f"wanted has shape {tuple(wanted.shape)}, importance {tuple(importance.shape)}"
    _require(wanted.shape == importance.shape, f"{shapes}; they must be the same")
    for name, tensor in (("wanted", wanted), ("importance", importance)):
        _require(tensor.is_floating_point(), f"{name} is {tensor.dtype}, not floating point")
    _require(bits in trellis.BITS, f"windows on a trellis of {bits} bits are asked for; it must be {_ON_TRELLIS}")
    return wanted.shape[1]


def statistics(x: Tensor, mask: Tensor | None = None) -> int:
    """Arguments of :func:`lorap.nn.ops.channel_sq_norm` and ``second_moment``; returns K."""
    _require(x.dim() >= 1, "x is a scalar; its last axis must hold the channels")
    if mask is not None:
        fits = mask.numel() == x.numel() // max(x.shape[-1], 1)
        _require(fits, f"mask {tuple(mask.shape)} does not have one element per token of x {tuple(x.shape)}")
    return x.shape[-1]


CHECKS: dict[str, Callable[..., int]] = {
    "linear": linear,
    "low_rank_linear": low_rank_linear,
    "low_rank_linear_group": low_rank_linear_group,
    "silu_gated_linear": silu_gated_linear,
    "low_rank_silu_gated_linear": low_rank_silu_gated_linear,
    "quantized_linear": quantized_linear,
    "quantized_low_rank_linear": quantized_low_rank_linear,
    "quantized_silu_gated_linear": quantized_silu_gated_linear,
    "trellis_linear": trellis_linear,
    "trellis_search": trellis_search,
    "channel_sq_norm": statistics,
    "second_moment": statistics,
}
