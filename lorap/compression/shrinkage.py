"""From statistics to the norms that errors are measured in.

A second moment of a few thousand tokens fits the calibration text better than the next text. Shrinking it towards its diagonal
gives up what does not carry over: how much that is shows when two halves of the calibration text, from different sources,
are compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorap.algorithms.moments import Moment
from lorap.algorithms.refit import removed_share, repair_down
from lorap.calibration.statistics import ActivationStats, merged

# Shares of the diagonal and of the identity in the metric of the outputs, which comes from fewer tokens.
OUTPUT_DIAGONAL = 0.1
OUTPUT_IDENTITY = 0.1
# Without a second fold nothing can be judged; these are near the optimum of most layers (docs/results.md).
DEFAULT_SHRINKAGE = 0.25
DEFAULT_RIDGE = 0.3
# Tried on the folds, relative to the mean channel energy.
RIDGES = (0.05, 0.2, 0.8, 3.2)
JUDGED_OUTPUTS = 64
# Rows of two correlation matrices that are compared at once.
CORRELATED_ROWS = 1024


def shrunk(second_moment: Tensor, shrinkage: float) -> Tensor:
    """(1 - shrinkage) C + shrinkage diag(C), float64."""
    c = second_moment.double()
    shrunk = (1 - shrinkage) * c
    shrunk.diagonal().add_(shrinkage * c.diagonal())
    return shrunk


def output_metric(moment: Tensor) -> Tensor:
    """A positive definite metric (out, out) float32 from the second moment of the gradients; the identity if they are all 0."""
    a = moment.double()
    mean = float(a.diagonal().mean())
    if mean <= 0:
        return torch.eye(len(a), device=a.device)
    a = shrunk(a, OUTPUT_DIAGONAL) * (1 - OUTPUT_IDENTITY)
    a.diagonal().add_(OUTPUT_IDENTITY * mean)
    return a.float()


def shrinkage_of(folds: Sequence[ActivationStats], asked: float | str) -> float:
    """The share of its diagonal that is ``asked`` for in the second moment; for ``auto``, what the folds say."""
    return choose_shrinkage(folds) if asked == "auto" else float(asked)


def choose_shrinkage(folds: Sequence[ActivationStats]) -> float:
    """How far to shrink the second moment, from how far the correlations of two folds agree.

    With R the correlations off the diagonal, ``a = <R_1, R_2> / mean(||R_1||^2, ||R_2||^2)`` is the reliability of what one fold
    says about the other; both folds together are as reliable as ``2 a / (1 + a)`` (Spearman and Brown, 1910), and the rest is
    shrunk away. On four layers of a real model this was near the shrinkage whose factors had the least error on a third text.
    """
    if len(folds) < 2:
        return DEFAULT_SHRINKAGE
    first, second = (fold.moment for fold in folds)
    scale = merged(folds, moments=False).channel_sq_norm.sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    agreeing = size = 0.0
    for start in range(0, len(scale), CORRELATED_ROWS):
        a, b = (_correlations(moment, scale, start) for moment in (first, second))
        agreeing += float((a * b).sum())
        size += float(a.square().sum() + b.square().sum()) / 2
    agreement = agreeing / size if size > 0 else 0.0
    agreement = min(max(agreement, 0.0), 1.0)
    return (1 - agreement) / (1 + agreement)


def _correlations(moment: Moment, scale: Tensor, start: int) -> Tensor:
    """Some rows of R, float64, up to one factor for all of R; 0 on the diagonal."""
    rows = moment.sums[start : start + CORRELATED_ROWS].to(torch.float64, copy=True)
    rows *= 1 / (moment.weight * scale[start : start + CORRELATED_ROWS, None])
    rows *= 1 / scale
    rows.diagonal(start).fill_(0)
    return rows


def choose_ridge(down: Tensor, folds: Sequence[ActivationStats], kept: Tensor, *, shrinkage: float) -> float:
    """The ridge whose repair, fitted on one fold, reproduces the FFN's output best on the other; both ways, mean square.

    Args:
        down: (hidden_size, intermediate_size).
        folds: statistics of the inner activations with moments.
        kept: (kept,) int64, the channels that will stay.
        shrinkage: of the second moment that is fitted.
    """
    if len(folds) < 2:
        return DEFAULT_RIDGE
    # Outputs are refitted independently of each other; some of them tell enough.
    down = down[:: max(1, len(down) // JUDGED_OUTPUTS)]
    moments = [fold.moment for fold in folds]
    fitted, held_out = [moment.shrunk(shrinkage) for moment in moments], list(reversed(moments))

    def error(ridge: float) -> float:
        return sum(
            removed_share(down, other, kept, repair_down(down, moment, kept, ridge=ridge)) ** 2
            for moment, other in zip(fitted, held_out, strict=True)
        )

    return min(RIDGES, key=error)
