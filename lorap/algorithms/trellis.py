"""Weights as paths on a trellis (:mod:`lorap.kernels.trellis`), such that the outputs of the layer change least.

As in :mod:`lorap.algorithms.rounding`, column after column takes back what those before it did wrong (GPTQ as LDLQ), but a column
is not rounded number by number: the path that is nearest to all its rows is searched for, each row with the square of its
scale as its weight (QTIP, arXiv 2406.11235). At last the scales of a row are fitted anew to the numbers that there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorap.algorithms.rounding import by_column, compensate, damped, row_errors, stored_scales, upper_factor

# Mean squared error of a number of each bits, of Gaussian ones with variance 1, that a path leaves.
DISTORTION = {2: 0.0745, 3: 0.0193, 4: 0.0051, 5: 0.00133, 6: 0.00035}
# The scale at which Gaussian weights lose least, by their root mean square: flat, 0.90 and 1.04 are up to 2 % worse.
SPREAD = 0.97
# Numbers up to here are met as well as smaller ones; of what is larger, the rest is lost.
REACH = 3.4
# Scales that are tried where a few weights reach further, up to six times the usual one.
STEPS = tuple(1.07**step for step in range(28))


@dataclass(frozen=True)
class Trellis:
    """Which codes there are.

    Args:
        search: of wanted numbers (N, C), their importance (N, C) and bits the windows (N or more rows, C) of the nearest paths.
        numbers: what each window stands for, spread like a Gaussian with a standard deviation of about 1.
    """

    search: Callable[[Tensor, Tensor, int], Tensor]
    numbers: Tensor


@dataclass(frozen=True)
class Codes:
    """A weight on the trellis.

    Args:
        windows: (N or more rows, K), as the search has them.
        numbers: (N, K): what they stand for.
        scales: (N, ceil(K / group)), in the dtype in which they are stored.
        group: columns that share a scale; the last group may have fewer.
    """

    windows: Tensor
    numbers: Tensor
    scales: Tensor
    group: int

    def weight(self, dtype: torch.dtype) -> Tensor:
        """(N, K): what it stands for."""
        return self.numbers.to(dtype) * by_column(self.scales, self.group, self.numbers.shape[1]).to(dtype)


def round_weight(
    weight: Tensor, moment: Tensor | None, *, trellis: Trellis, bits: int, group: int, scale_dtype: torch.dtype
) -> Codes:
    """The path with nearly the least error in the outputs.

    Args:
        weight: (N, K), float32 or float64.
        moment: (K, K) second moment of the inputs; None for the path nearest to the weight.
        trellis: which codes there are.
        bits: of a number.
        group: columns that share a scale.
        scale_dtype: in which scales are stored; the path belongs to the scales as they are stored.
    """
    columns = weight.shape[1]
    numbers = trellis.numbers.to(weight)
    if moment is None:
        scales = spread_scales(weight, weight.new_ones(columns), bits=bits, group=group, dtype=scale_dtype)
        each = by_column(scales, group, columns).to(weight)
        windows = trellis.search((weight / each).float(), each.square().float(), bits)
        return Codes(windows, numbers[windows[: len(weight)].long()], scales, group)
    # Columns of much energy first, while all others can still make up for their errors.
    order = moment.diagonal().argsort(descending=True, stable=True)
    factor = upper_factor(moment[order[:, None], order]).to(weight.dtype)
    energies = torch.empty_like(factor.diagonal())
    energies[order] = factor.diagonal().square()
    scales = spread_scales(weight, energies, bits=bits, group=group, dtype=scale_dtype)
    found: list[Tensor] = []

    def nearest(target: Tensor, scale: Tensor) -> Tensor:
        found.append(trellis.search((target / scale).float()[:, None], scale.square().float()[:, None], bits))
        return numbers[found[-1][: len(weight), 0].long()]

    made = compensate(weight[:, order], by_column(scales, group, columns)[:, order].to(weight), factor, nearest)
    back = order.argsort()
    codes = Codes(torch.cat(found, dim=1)[:, back], made[:, back], scales, group)
    fitted = Codes(codes.windows, codes.numbers, fitted_scales(weight, codes, moment), group)
    before, after = (row_errors((weight - each.weight(weight.dtype))[:, order], factor) for each in (codes, fitted))
    return Codes(codes.windows, codes.numbers, fitted.scales.where((after < before)[:, None], scales), group)


def spread_scales(weight: Tensor, energies: Tensor, *, bits: int, group: int, dtype: torch.dtype) -> Tensor:
    """(N, ceil(K / group)) scales in ``dtype``: those of Gaussian weights, larger where single ones would be lost.

    A path leaves about the same error for all numbers that it reaches, so a scale costs its square; what lies beyond is lost.
    One weight can be most of a layer: clipped like any other, it left 24 % of the output's energy as error where 0.01 % will do.

    Args:
        weight: (N, K).
        energies: (K,), what an error in each column costs.
        bits: of a number.
        group: columns that share a scale.
        dtype: in which scales are stored.
    """
    rows, columns = weight.shape
    padding = (0, -columns % group)
    grouped = torch.nn.functional.pad(weight.abs(), padding).reshape(rows, -1, group)
    costs = torch.nn.functional.pad(energies.to(weight), padding).reshape(1, -1, group)
    counts = torch.nn.functional.pad(weight.new_ones(columns), padding).reshape(1, -1, group).sum(-1)
    usual = SPREAD * (grouped.square().sum(-1) / counts).sqrt()
    best, scales = torch.full_like(usual, torch.inf), usual
    for step in STEPS:
        scale = stored_scales(usual * step, dtype)
        lost = (costs * (grouped - REACH * scale[..., None]).clamp_min(0).square()).sum(-1)
        error = DISTORTION[bits] * scale.square() * costs.sum(-1) + lost
        scales = scale.where(error < best, scales)
        best = error.minimum(best)
    return scales.to(dtype)


def expected_errors(weight: Tensor, *, bits: int, group: int) -> Tensor:
    """(N, K): mean squared error of each number of ``weight`` on a path: a share of the mean square of its group."""
    rows, columns = weight.shape
    group = min(group, columns)
    padding = (0, -columns % group)
    energies = torch.nn.functional.pad(weight.square(), padding).reshape(rows, -1, group).sum(-1)
    counts = torch.nn.functional.pad(weight.new_ones(columns), padding).reshape(-1, group).sum(-1)
    return by_column(DISTORTION[bits] * energies / counts, group, columns)


def fitted_scales(weight: Tensor, codes: Codes, moment: Tensor) -> Tensor:
    """The scales (N, ceil(K / group)), in their dtype, with the least error in the outputs for the numbers of ``codes``.

    Args:
        weight: (N, K).
        codes: of it.
        moment: (K, K) second moment of the inputs.
    """
    rows, columns = weight.shape
    metric = damped(moment.double())
    numbers = codes.numbers.double()
    groups = codes.scales.shape[1]

    def by_group(products: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(products, (0, -columns % codes.group))
        return padded.reshape(rows, groups, codes.group).sum(-1)

    wanted = by_group(numbers * (weight.double() @ metric))
    inner = numbers.new_empty(rows, groups, groups)
    for group, first in enumerate(range(0, columns, codes.group)):
        within = slice(first, first + codes.group)
        inner[:, group] = by_group(numbers * (numbers[:, within] @ metric[within]))
    # A group of zeros has no best scale.
    added = 1e-9 * inner.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    inner += added[:, None, None] * torch.eye(groups, dtype=inner.dtype, device=inner.device)
    found = torch.linalg.solve(inner, wanted)
    return stored_scales(found, codes.scales.dtype).to(codes.scales.dtype)
