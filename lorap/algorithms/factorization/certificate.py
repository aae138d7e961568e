"""How far a subspace can be from the best one, proved from its residuals.

Let ``V`` (n, k) be orthonormal Ritz vectors of a positive semi-definite ``G``, with values ``theta``, descending, and residuals
``R = G V - V diag(theta)``; the first r of them are the answer. In the basis of V and its complement, G is
``[[diag(theta), E^T], [E, H]]`` and E has the columns of R. For any positive ``d``, Young's inequality gives

    G <= [[diag(theta + d), 0], [0, H + E diag(1/d) E^T]],

so if ``H <= b``, no r eigenvalues of G can add up to more than the r largest of ``theta + d``, with
``b + ||E diag(d)^(-1/2)||^2`` filling the rest. With d proportional to the norms of the residuals that is second order in them
wherever ``theta_r > b``: a basis with a few more vectors than r closes the question although eigenvalues r and r + 1 may be as
good as equal. Where even those further vectors are as good as equal, b just above them is enough.

That ``H <= b`` holds is proved by a Cholesky factorization: ``b - (G - V diag(theta) V^T)`` is positive definite.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lorap.algorithms.factorization.dense import is_positive_definite
from lorap.algorithms.symmetric import lower_product

EPS = torch.finfo(torch.float64).eps
# Parts of the way from theta_r down to theta_k at which the complement is tried to end: near the top is proved more
# easily, far from it is worth more.
CUTS = (0.6, 0.3)
# Relative difference of eigenvalues that counts as none.
FLAT = 1e-8
# Weights of the residuals relative to the ones that fill the whole gap.
WEIGHTS = (0.5, 0.8, 1.0, 1.5)


def rounding(gram: Tensor, rank: int) -> float:
    """What float64 leaves open in a sum of ``rank`` eigenvalues of ``gram`` (n, n): the backward error of products and sums."""
    size = len(gram)
    return 2 * rank * math.sqrt(size) * EPS * float(gram.diagonal().max()) + math.sqrt(size) * EPS * float(gram.trace())


def gain_left(gram: Tensor, vectors: Tensor, values: Tensor, residuals: Tensor, rank: int) -> float:
    """At most how much more the best ``rank`` directions hold than the first ``rank`` of ``vectors``; infinite if unproved.

    Args:
        gram: G (n, n) float64, positive semi-definite.
        vectors: V (n, k) float64, orthonormal, k >= rank.
        values: theta (k,), descending.
        residuals: R (n, k).
        rank: r.
    """
    size, count = vectors.shape
    if count == size:
        return 0.0
    if count == rank:
        return math.inf
    last, end = float(values[rank - 1]), float(values[-1])
    bounds = [last - (last - end) * cut for cut in CUTS] if last - end > FLAT * last else [last * (1 + FLAT)]
    for bound in bounds:
        if bound > 0 and _ends_below(gram, vectors, values, bound):
            return _sum_bound(values, residuals, rank, bound, size) - float(values[:rank].sum())
    return math.inf


def _ends_below(gram: Tensor, vectors: Tensor, values: Tensor, bound: float) -> bool:
    """Whether G has no direction outside of the vectors with more than ``bound``."""
    rest = lower_product(vectors * values, vectors, mirrored=False)
    rest -= gram
    rest.diagonal().add_(bound)
    return is_positive_definite(rest)


def _sum_bound(values: Tensor, residuals: Tensor, rank: int, bound: float, size: int) -> float:
    norms = residuals.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny ** 0.5)
    scaled = (residuals / norms.sqrt()).float()
    # Float32 is off by much less than this margin.
    spread = 1.001 * float(torch.linalg.eigvalsh(scaled.T @ scaled)[-1])
    last = float(values[rank - 1])
    gap = max(last - bound, FLAT * last)
    best = math.inf
    for weight in WEIGHTS:
        strength = spread / (weight * gap)
        candidates = values + strength * norms
        outside = values.new_full((size - len(values),), bound + weight * gap)
        best = min(best, float(torch.cat((candidates, outside)).topk(rank).values.sum()))
    return best
