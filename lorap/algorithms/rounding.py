"""Weights as whole numbers of a few bits times scales, rounded such that the outputs of the layer change least.

A weight (N, K) becomes q * s: q in [-2^(bits-1), 2^(bits-1)), one s for each ``group`` columns of a row. With the second moment
C = X X^T of the inputs, the error of a row e = w - q s in the outputs is e C e^T. Writing C = R R^T with R upper triangular and U
its columns divided by the diagonal d, this is the sum over columns of d_k^2 (e_k + e_{<k} U_{<k,k})^2. So column k is best
rounded not from w_k but from w_k + e_{<k} U_{<k,k}, which takes back what the columns before it did wrong. That is GPTQ (arXiv
2210.17323) in the form of LDLQ (arXiv 2307.13304), which needs no inverse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

# Share of the mean energy that every input gets on top: C of few tokens is singular.
DAMPING = 0.01
# Columns that are finished one by one, before the others hear of them in one product.
BLOCK = 128
# Steps of the search for scales, as multiples of the one at which the largest weight just fits: more clip it.
CLIPPING = tuple(1 + 0.06 * step for step in range(9))
# Of the logarithm of each singular value of a pair, what is left's. 0, 0.1, 0.3 and 0.5 leave more error (docs/recipes.md).
LEFT_SHARE = 0.2


class HasWeight(Protocol):
    """A rounded weight of any kind."""

    def weight(self, dtype: torch.dtype) -> Tensor:
        """(N, K): what it stands for."""


AWeight = TypeVar("AWeight", bound=HasWeight)


@dataclass(frozen=True)
class Rounded:
    """A rounded weight.

    Args:
        numbers: (N, K) int8, within the range of the bits.
        scales: (N, ceil(K / group)), in the dtype in which they are stored.
        group: columns that share a scale; the last group may have fewer.
    """

    numbers: Tensor
    scales: Tensor
    group: int

    def weight(self, dtype: torch.dtype) -> Tensor:
        """(N, K): what they stand for."""
        return self.numbers.to(dtype) * by_column(self.scales, self.group, self.numbers.shape[1]).to(dtype)


def round_weight(weight: Tensor, moment: Tensor | None, *, bits: int, group: int, scale_dtype: torch.dtype) -> Rounded:
    """The weight on the best grid that the search finds, with the least error in the outputs of two ways of rounding, row by row.

    Args:
        weight: (N, K), float32 or float64: everything is computed in its dtype, but for the Cholesky factor.
        moment: (K, K) second moment of the inputs; None rounds each number to the nearest.
        bits: of a number, from 2 to 8.
        group: columns that share a scale.
        scale_dtype: in which scales are stored; the numbers belong to the scales as they are stored.
    """
    columns = weight.shape[1]
    importance = None if moment is None else moment.diagonal().to(weight.dtype)
    scales = search_scales(weight, importance, bits=bits, group=group, dtype=scale_dtype)
    each = by_column(scales, group, columns).to(weight.dtype)
    nearest = _numbers(weight, each, bits)
    if moment is None:
        return Rounded(nearest.to(torch.int8), scales, group)
    # Columns of much energy first, while all others can still make up for their errors.
    order = moment.diagonal().argsort(descending=True, stable=True)
    factor = upper_factor(moment[order[:, None], order]).to(weight.dtype)
    compensated = torch.empty_like(nearest)
    compensated[:, order] = compensate(
        weight[:, order], each[:, order], factor, lambda target, scale: _numbers(target, scale, bits)
    )
    ways = [(weight - numbers * each)[:, order] for numbers in (compensated, nearest)]
    better = row_errors(ways[0], factor) < row_errors(ways[1], factor)
    return Rounded(compensated.where(better[:, None], nearest).to(torch.int8), scales, group)


def round_factors(
    left: Tensor, right: Tensor, moment: Tensor | None, round_one: Callable[[Tensor, Tensor | None], AWeight]
) -> tuple[AWeight, AWeight]:
    """Both factors of left @ right, which may change to any other pair with that product before.

    Right comes first, in the metric of what no left can take back, so that what it loses is mostly what left then makes up for.
    Left is fitted to the rounded right and rounded. What right has to be for the rounded left is then near to what it is already,
    so that whole numbers, rounded once more, lose little of it again; of the two rights the one stays that leaves less error.

    Args:
        left: (N, R).
        right: (R, K).
        moment: (K, K) second moment of the inputs; None where all are alike.
        round_one: of a weight and the second moment of its inputs, the rounded weight.

    Returns:
        Left and right.
    """
    metric = torch.eye(right.shape[1], device=right.device) if moment is None else moment
    metric, wanted = metric.double(), left.double() @ right.double()
    basis, factor = _rotated(left.double(), right.double(), metric)
    first = round_one(factor.to(right.dtype), _not_taken_back(factor, metric))
    fitted, inner = _refitted(basis, wanted, first.weight(torch.float64), metric)
    rounded_left = round_one(fitted.to(left.dtype), inner)
    stored = rounded_left.weight(torch.float64)
    fitted, _ = _refitted(first.weight(torch.float64).T, wanted.T, stored.T, None)
    second = round_one(fitted.T.to(right.dtype), metric)

    def lost(found: HasWeight) -> float:
        errors = wanted - stored @ found.weight(torch.float64)
        return float(((errors @ metric) * errors).sum())

    return rounded_left, min(first, second, key=lost)


def _rotated(left: Tensor, right: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """The same product in a basis of the rank in which both lose little.

    Left has ``LEFT_SHARE`` of each singular value of the outputs, right the rest, which makes the product of their errors small.
    Then the basis is rotated at random, the same way every time: no direction of the rank has a scale of its own.
    """
    basis, triangle = torch.linalg.qr(left)
    right = triangle @ right
    energies, directions = torch.linalg.eigh(damped(right @ metric @ right.T))
    rotation = _rotation(len(right), left)
    to_left, to_right = (directions * energies ** (sign * LEFT_SHARE / 2) @ directions.T @ rotation for sign in (1, -1))
    return basis @ to_left, to_right.T @ right


def _not_taken_back(right: Tensor, metric: Tensor) -> Tensor:
    """(K, K): what errors of right cost once left is fitted to it: those within its rows cost next to nothing."""
    seen = right @ metric
    half = torch.linalg.solve_triangular(torch.linalg.cholesky(damped(seen @ right.T)), seen, upper=False)
    return metric - half.T @ half


def _refitted(left: Tensor, wanted: Tensor, right: Tensor, metric: Tensor | None) -> tuple[Tensor, Tensor]:
    """The (N, R) near ``left`` by which right (R, K) comes nearest to ``wanted`` (N, K), and the second moment of its inputs."""
    seen = right if metric is None else right @ metric
    inner = seen @ right.T
    lost = (wanted - left @ right) @ seen.T
    return left + torch.cholesky_solve(lost.T, torch.linalg.cholesky(damped(inner))).T, inner


def expected_errors(weight: Tensor, *, bits: int, group: int) -> Tensor:
    """(N, K): mean squared error of each number of ``weight`` on a grid that just holds the largest of its group: s^2 / 12."""
    rows, columns = weight.shape
    group = min(group, columns)
    padded = torch.nn.functional.pad(weight.abs(), (0, -columns % group)).reshape(rows, -1, group)
    scales = padded.amax(-1) / (2.0 ** (bits - 1) - 0.5)
    return by_column(scales.square() / 12, group, columns)


def column_energies(moment: Tensor) -> Tensor:
    """(K,) float64: what an error in each column costs in the outputs once later columns have made up for it, as GPTQ does.

    That is d_k^2, the energy of column k that those rounded after it do not explain.
    """
    order = moment.diagonal().argsort(descending=True, stable=True)
    energies = torch.empty(len(moment), dtype=torch.float64, device=moment.device)
    energies[order] = upper_factor(moment[order[:, None], order]).diagonal().square()
    return energies


def search_scales(weight: Tensor, importance: Tensor | None, *, bits: int, group: int, dtype: torch.dtype) -> Tensor:
    """(N, ceil(K / group)) scales in ``dtype``, with the least squared error of those tried, weighted by (K,) ``importance``.

    The number of largest size falls on the end of the range that reaches further, so scales have either sign.
    """
    rows, columns = weight.shape
    groups = -(-columns // group)
    padding = (0, groups * group - columns)
    grouped = torch.nn.functional.pad(weight, padding).reshape(rows, groups, group)
    counts = torch.ones(columns, dtype=weight.dtype, device=weight.device) if importance is None else importance
    counts = torch.nn.functional.pad(counts, padding).reshape(1, groups, group)
    extreme = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
    half = 2.0 ** (bits - 1)
    best = grouped.new_full((rows, groups, 1), torch.inf)
    scales = stored_scales(torch.zeros_like(extreme), dtype)
    for reach in (half - 1, *(half * clipped for clipped in CLIPPING)):
        for scale in _candidates(grouped, counts, stored_scales(-extreme / reach, dtype), bits, dtype):
            error = (counts * (grouped - _numbers(grouped, scale, bits) * scale).square()).sum(-1, keepdim=True)
            scales = scale.where(error < best, scales)
            best = error.minimum(best)
    return scales.squeeze(-1).to(dtype)


def _candidates(grouped: Tensor, counts: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A scale, and the one that fits best to the numbers which it makes."""
    numbers = _numbers(grouped, scale, bits)
    energy = (counts * numbers.square()).sum(-1, keepdim=True)
    fitted = (counts * grouped * numbers).sum(-1, keepdim=True) / energy
    return scale, stored_scales(fitted.where(energy > 0, scale), dtype)


def stored_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``scales`` as they are after storage in ``dtype``, and none so small that it is zero: a group of zeros has one, too."""
    info = torch.finfo(dtype)
    tiny = max(info.tiny * info.eps, torch.finfo(torch.float32).tiny)
    kept = scales.to(dtype).to(scales.dtype)
    return kept.where(kept.abs() >= tiny, tiny)


def _numbers(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The nearest numbers, in the dtype of ``weight``."""
    half = 2 ** (bits - 1)
    return (weight / scales).round_().clamp_(-half, half - 1)


def compensate(weight: Tensor, scales: Tensor, factor: Tensor, nearest: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """AWeights (N, K), column after column, each behind the errors of those before it.

    Args:
        weight: (N, K).
        scales: (N, K).
        factor: (K, K), upper triangular, of the second moment.
        nearest: of what is wanted of a column (N,) and its scales (N,), the numbers to take.
    """
    columns = weight.shape[1]
    unit = factor / factor.diagonal()
    numbers, errors = torch.empty_like(weight), torch.zeros_like(weight)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        wanted = weight[:, start:end] + errors[:, :start] @ unit[:start, start:end]
        within = unit[start:end, start:end]
        made = errors[:, start:end]
        for k in range(end - start):
            scale = scales[:, start + k]
            target = wanted[:, k] + made[:, :k] @ within[:k, k]
            number = nearest(target, scale)
            numbers[:, start + k] = number
            made[:, k] = weight[:, start + k] - number * scale
    return numbers


def upper_factor(moment: Tensor) -> Tensor:
    """R, upper triangular, with R R^T the damped moment, in float64."""
    return torch.linalg.cholesky(damped(moment.double()).flip(0, 1)).flip(0, 1)


def damped(moment: Tensor) -> Tensor:
    """The second moment (K, K) with some energy for every input."""
    added = DAMPING * float(moment.diagonal().mean()) or 1.0
    return moment + added * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def row_errors(errors: Tensor, factor: Tensor) -> Tensor:
    """(N,): what errors (N, K) do to the outputs, with the factor of the second moment."""
    return (errors @ factor).square().sum(1)


def _rotation(size: int, like: Tensor) -> Tensor:
    """An orthogonal matrix, drawn evenly from all, the same for every layer of the size."""
    generator = torch.Generator().manual_seed(size)
    drawn = torch.randn(size, size, dtype=torch.float64, generator=generator)
    basis, triangle = torch.linalg.qr(drawn)
    return (basis * triangle.diagonal().sign()).to(like)


def by_column(scales: Tensor, group: int, columns: int) -> Tensor:
    """(N, columns): of each number the scale of its group."""
    return scales.repeat_interleave(min(group, columns), dim=1)[:, :columns]
