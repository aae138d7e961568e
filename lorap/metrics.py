"""From statistics to the norms that errors are measured in.

A second moment of a few thousand tokens fits the calibration text better than the next text. Shrinking it towards its diagonal
gives up what does not carry over: how much that is shows when two halves of the calibration text, from different sources,
are compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorap.calibration.statistics import ActivationStats, merged
from lorap.repair import removed_share, repair_down

# Shares of the diagonal and of the identity in the metric of the outputs, which comes from fewer tokens.
OUTPUT_DIAGONAL = 0.1
OUTPUT_IDENTITY = 0.1
# Without a second fold nothing can be judged; these are near the optimum of most layers (docs/results.md).
DEFAULT_SHRINKAGE = 0.25
DEFAULT_RIDGE = 0.3
# Tried on the folds, relative to the mean channel energy.
RIDGES = (0.05, 0.2, 0.8, 3.2)
JUDGED_OUTPUTS = 128


def shrunk(second_moment: Tensor, shrinkage: float) -> Tensor:
    """(1 - shrinkage) C + shrinkage diag(C), float64."""
    c = second_moment.double()
    return (1 - shrinkage) * c + shrinkage * torch.diag(c.diagonal())


def output_metric(moment: Tensor) -> Tensor:
    """A positive definite metric (out, out) float32 from the second moment of the gradients; the identity if they are all 0."""
    a = moment.double()
    mean = float(a.diagonal().mean())
    if mean <= 0:
        return torch.eye(len(a), device=a.device)
    a = shrunk(a, OUTPUT_DIAGONAL) * (1 - OUTPUT_IDENTITY)
    a.diagonal().add_(OUTPUT_IDENTITY * mean)
    return a.float()


def choose_shrinkage(folds: Sequence[ActivationStats]) -> float:
    """How far to shrink the second moment, from how far the correlations of two folds agree.

    With R the correlations off the diagonal, ``a = <R_1, R_2> / mean(||R_1||^2, ||R_2||^2)`` is the reliability of what one fold
    says about the other; both folds together are as reliable as ``2 a / (1 + a)`` (Spearman and Brown, 1910), and the rest is
    shrunk away. On four layers of a real model this was near the shrinkage whose factors had the least error on a third text.
    """
    if len(folds) < 2:
        return DEFAULT_SHRINKAGE
    scale = merged(folds).second_moment.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    first, second = (fold.second_moment / scale / scale[:, None] for fold in folds)
    for correlations in (first, second):
        correlations.fill_diagonal_(0)
    size = float(first.square().sum() + second.square().sum()) / 2
    agreement = float((first * second).sum()) / size if size > 0 else 0.0
    agreement = min(max(agreement, 0.0), 1.0)
    return (1 - agreement) / (1 + agreement)


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
    fitted = [shrunk(fold.second_moment, shrinkage) for fold in folds]
    held_out = [fold.second_moment for fold in reversed(folds)]

    def error(ridge: float) -> float:
        return sum(
            removed_share(down, other, kept, repair_down(down, moment, kept, ridge=ridge)) ** 2
            for moment, other in zip(fitted, held_out, strict=True)
        )

    return min(RIDGES, key=error)
