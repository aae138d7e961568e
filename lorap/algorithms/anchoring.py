"""A matrix for other inputs than those that it was made for: what it must be to give what it gave.

With x the inputs of W in the dense model and x' those behind compressed layers, rank-r factors that minimise
``E ||W x - L R x'||^2`` are the best ones for ``W T`` in the metric of ``C' = E[x' x'^T]``. ``T = E[x x'^T] C'^-1`` predicts x
from x' by least squares; what is left of x is uncorrelated with x', so no choice of factors changes its share (the objective of
AA-SVD, arXiv 2604.02119; Izenman, Reduced-rank regression, 1975).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Relative to the energy of each channel: where x' says nothing, as with fewer tokens than channels or behind a low-rank matrix,
# T is the identity. Sums of float32 products may be less than positive definite; then a larger one is needed.
RIDGES = (1e-6, 1e-4, 1e-2, 1.0)


def carried_over(cross: Tensor, second_moment: Tensor) -> Tensor:
    """T (K, K) float64 such that T x' is nearest to x.

    Args:
        cross: E[x x'^T] (K, K).
        second_moment: C' (K, K), of the same tokens.
    """
    moment, cross = second_moment.double(), cross.double()
    energy = torch.where(moment.diagonal() > 0, moment.diagonal(), 1.0)
    for ridge in RIDGES:
        factor, failed = torch.linalg.cholesky_ex(moment + ridge * energy.diag())
        if not failed:
            break
    return torch.cholesky_solve((cross + ridge * energy.diag()).T, factor).T
