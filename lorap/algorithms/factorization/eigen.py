"""The r largest eigenvalues of symmetric matrices with their vectors, by three methods, each with a proof of how good it is.

``eigh``      float64 eigensolver of the whole matrix: the reference.
``mixed``     float32 eigensolver of the whole matrix, then steps of the wanted subspace in float64.
``subspace``  nothing but matrix products and small eigenproblems: block iteration from a random start, accelerated by Chebyshev
              polynomials (Zhou and Saad, 2006), in float32 where that carries, then the same float64 steps. Batched.

The float64 steps (:func:`_polish`) do not care where a basis comes from: Rayleigh-Ritz, the certificate of
:mod:`lorap.algorithms.factorization.certificate`, and another polynomial where it is not good enough yet.

Directions that dwarf the others, as outlier channels make them, would drown the rest in float32's rounding error. They are found
first, in float64, and taken out of the matrix that is worked on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorap.algorithms.factorization import dense
from lorap.algorithms.factorization.certificate import FLAT, gain_left, rounding
from lorap.algorithms.factorization.dense import full_precision, orthonormal
from lorap.algorithms.symmetric import lower_product

# Vectors more than asked for: the iteration sees the gap from the last wanted one to the first outside. A fifth instead of an
# eighth costs 7 % a step and leaves a tenth of the error after 14 of them (Gaussian 1024 x 1024, rank 256).
OVERSAMPLING = 1 / 5
LEAST_OVERSAMPLING = 16
# Largest growth of any direction over the last wanted one in one polynomial. Columns are Ritz vectors, scaled afterwards, so it
# may reach the reciprocal of the rounding error: what leaks into a column lies in the span of the others.
LARGEST_GROWTH = {torch.float32: 1e11, torch.float64: 1e14}
# The first polynomial starts from values that are up to 40 % too small, and is short for that reason.
FIRST_DEGREE = 4
LARGEST_DEGREE = 16
# The unwanted part ends at most here, relative to the last wanted value: nothing would be told apart at the end itself.
SMALLEST_GAP = 0.99
# The error after the first polynomial (relative excess), and how far below the tolerance the bound wants it.
AFTER_FIRST = 3e-3
SAFETY = 300.0
# Float64 polynomials before giving up.
ROUNDS = 4
# Directions that can be taken out, and how large they must be beside the smallest of these.
OUTLIERS = 64
OUTLIER_RATIO = 30.0
OUTLIER_STEPS = 4
SEED = 0


@dataclass(frozen=True)
class Eigen:
    """The top of one spectrum.

    Args:
        vectors: (n, rank) float64, orthonormal.
        values: float64, descending; at least ``rank`` of them, all n except from the block iteration.
        lost: the part of the trace that the vectors do not hold: the squared error.
        gain_left: how much of that the best ``rank`` vectors would hold at most.
        unknown: how much of it float64 cannot tell.
    """

    vectors: Tensor
    values: Tensor
    lost: float
    gain_left: float
    unknown: float

    @property
    def excess(self) -> float:
        """At most this share of the error, the root of ``lost``, is above the least one; 0 where float64 cannot tell."""
        gain = self.gain_left + self.unknown
        return 1 - math.sqrt(1 - gain / self.lost) if 2 * gain < self.lost else 0.0


def eigh(gram: Tensor, rank: int) -> Eigen:
    """The float64 eigensolver. gram: (n, n) float64."""
    values, vectors = dense.eigh(gram)
    values = values.flip(0).clamp(min=0)
    lost = float(values[rank:].sum())
    return Eigen(vectors.flip(1)[:, :rank].contiguous(), values, lost, 0.0, rounding(gram, rank))


def mixed(gram: Tensor, rank: int, *, tolerance: float) -> Eigen | None:
    """The float32 eigensolver and float64 steps.

    Args:
        gram: (n, n) float64, with a trace near n: float32 has a smallest number.
        rank: how many eigenvectors are wanted.
        tolerance: relative distance of the error to the least one that is allowed.

    Returns:
        None where ``tolerance`` was not reached.
    """
    size, count = len(gram), basis_size(len(gram), rank)
    with full_precision():
        taken, rest = _without_outliers(gram[None], rank)
        held = taken.shape[-1]
        try:
            values, vectors = dense.eigh(rest[0].float())
            active = vectors[None, :, size - count + held :].flip(-1).double()
            del vectors
            (found,) = _polish(gram[None], rest, taken, active, [rank], tolerance)
        except torch.linalg.LinAlgError:
            return None
    if found is None:
        return None
    tail = values.flip(0)[count - held : size - held].to(found.values).clamp(min=0).minimum(found.values[-1])
    return replace(found, values=torch.cat((found.values, tail)))


def subspace(grams: Tensor, ranks: Sequence[int], *, tolerance: float) -> list[Eigen | None]:
    """Block iteration for a batch of matrices.

    Args:
        grams: (b, n, n) float64, with traces near n as in :func:`mixed`.
        ranks: how many eigenvectors are wanted of each matrix.
        tolerance: relative distance of each error to the least one that is allowed.

    Returns:
        One for each matrix; None for those that did not reach ``tolerance``.
    """
    count = basis_size(grams.shape[-1], max(ranks))
    with full_precision():
        taken, rest = _without_outliers(grams, max(ranks))
        held = taken.shape[-1]
        try:
            active = _from_random(rest, count - held, max(ranks) - held, tolerance)
            return _polish(grams, rest, taken, active.double(), ranks, tolerance)
        except torch.linalg.LinAlgError:  # an eigensolver does not converge now and then
            return [None] * len(grams)


def basis_size(size: int, rank: int) -> int:
    """Vectors that the iteration carries for ``rank`` wanted ones."""
    return min(size, rank + max(LEAST_OVERSAMPLING, int(rank * OVERSAMPLING)))


def _from_random(rest: Tensor, count: int, rank: int, tolerance: float) -> Tensor:
    """(b, n, count): a first basis, by two polynomials; in float32 unless the spectrum is too steep for it."""
    size = rest.shape[-1]
    generator = torch.Generator().manual_seed(SEED)
    start = torch.randn(size, count, generator=generator).to(rest.device)
    # What outliers leave can be small.
    typical = rest.diagonal(dim1=-2, dim2=-1).abs().mean(dim=1).clamp(min=torch.finfo(rest.dtype).tiny)[:, None, None]
    work = (rest / typical).float()
    basis = orthonormal(work @ start)
    if count == size:
        return basis
    values, basis = _ritz(work, basis)[:2]
    if _steepness(values, rank) * FIRST_DEGREE > math.log(LARGEST_GROWTH[torch.float32]):
        work, basis, values = rest / typical, basis.double(), values.double()
    basis = orthonormal(_filtered(work, basis, values, rank, FIRST_DEGREE))
    values, basis = _ritz(work, basis)[:2]
    return _filtered(work, basis, values, rank, _degree(values, rank, SAFETY * AFTER_FIRST / tolerance))


def _polish(
    grams: Tensor, rest: Tensor, taken: Tensor, active: Tensor, ranks: Sequence[int], tolerance: float
) -> list[Eigen | None]:
    """Rayleigh-Ritz in float64 and another polynomial, until the certificates of all matrices say that it is enough."""
    held, rank = taken.shape[-1], max(ranks)
    found: list[Eigen | None] = [None] * len(grams)
    for step in range(1 + ROUNDS):
        values, vectors, residuals = _ritz(grams, orthonormal(torch.cat((taken, active), dim=-1)))
        residuals -= vectors * values[:, None]
        excess = 0.0
        for index, wanted in enumerate(ranks):
            if found[index] is None:
                gram, theta, off = grams[index], values[index], residuals[index]
                estimate = _excess(gram, theta, off, wanted)
                found[index] = _verified(gram, vectors[index], theta, off, wanted, tolerance, estimate)
                excess = excess if found[index] else max(excess, estimate)
        if all(found) or step == ROUNDS or not math.isfinite(excess):
            break
        degree = _degree(values[:, held:], rank - held, max(SAFETY * excess / tolerance, SAFETY))
        if held:  # polynomials of the rest do not improve what was taken out of it; one step of G does
            taken, rest = grams @ vectors[..., :held], _deflated(grams, values[:, :held], vectors[..., :held])
        active = _filtered(rest, vectors[..., held:], values[:, held:], rank - held, degree)
    return found


def _verified(
    gram: Tensor, vectors: Tensor, values: Tensor, residuals: Tensor, rank: int, tolerance: float, estimate: float
) -> Eigen | None:
    """The answer, if it is certain to be within ``tolerance`` of the least error; ``estimate`` is its :func:`_excess`."""
    if not bool(torch.isfinite(values).all()):
        return None
    lost = max(0.0, float(gram.trace() - values[:rank].sum()))
    unknown = rounding(gram, rank)
    allowed = max(2 * tolerance * lost, unknown)
    # No direction can hold more than what is lost; and the proof is not worth its time where the estimate says no.
    gain = lost
    if lost > allowed and estimate < tolerance:
        gain = min(lost, gain_left(gram, vectors, values, residuals, rank))
    if gain > allowed:
        return None
    return Eigen(vectors[:, :rank].contiguous(), values.clamp(min=0), lost, gain, unknown)


def _excess(gram: Tensor, values: Tensor, residuals: Tensor, rank: int) -> float:
    """The relative error above the least one, as the residuals suggest it."""
    lost = max(float(gram.trace() - values[:rank].sum()), rounding(gram, rank))
    gaps = (values[:rank] - values[-1]).clamp(min=max(FLAT * float(values[rank - 1]), torch.finfo(torch.float64).tiny))
    return float((residuals[:, :rank].square().sum(0) / gaps).sum()) / (2 * lost)


def _ritz(grams: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ritz values (b, k), descending, Ritz vectors V and G V (b, n, k) within the span of an orthonormal basis."""
    images = grams @ basis
    values, turn = dense.eigh(lower_product(basis.mT, images.mT))
    turn = turn.flip(-1)
    return values.flip(-1), basis @ turn, images @ turn


def _filtered(grams: Tensor, basis: Tensor, values: Tensor, rank: int, degree: int) -> Tensor:
    """The Chebyshev polynomial of G that stays small on [0, end], applied to the basis; no higher than rounding allows.

    T_j(x) = 2 x T_(j-1) - T_(j-2) with x = 2 G / end - 1: one product a degree.
    """
    steepness = _steepness(values, rank)
    if steepness > 0:
        degree = max(1, min(degree, int(math.log(LARGEST_GROWTH[grams.dtype]) / steepness)))
    shifted = grams * (2 / _end(values, rank))[:, None, None]
    shifted.diagonal(dim1=-2, dim2=-1).sub_(1)
    before, now = basis, shifted @ basis
    for _ in range(degree - 1):
        before, now = now, torch.baddbmm(before, shifted, now, beta=-1, alpha=2)
    return now


def _end(values: Tensor, rank: int) -> Tensor:
    """(b,): where the unwanted part of the spectrum ends.

    Below the last wanted one even where values are equal, and not below what rounding leaves of a matrix of lower rank.
    """
    info = torch.finfo(values.dtype)
    end = values[:, -1].minimum(SMALLEST_GAP * values[:, rank - 1])
    # Rounding makes a value that is 0 negative; the typical one is 1.
    return end.maximum(10 * info.eps * values[:, 0]).maximum(-values[:, -1]).clamp(min=info.eps)


def _rates(values: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Logarithms (b,) of how much the first and the last wanted direction grow with a degree over the unwanted ones."""
    ends = _end(values, rank)
    first, last = (torch.acosh((2 * values[:, index] / ends - 1).clamp(min=1).double()) for index in (0, rank - 1))
    return first, last


def _steepness(values: Tensor, rank: int) -> float:
    """Logarithm of how much the largest direction outgrows the last wanted one with each degree, at the worst of a batch."""
    first, last = _rates(values, rank)
    return float((first - last).max())


def _degree(values: Tensor, rank: int, reduction: float) -> int:
    """The degree that makes the excess, which is a square, ``reduction`` times smaller."""
    slowest = float(_rates(values, rank)[1].min())
    wanted = math.log(reduction) / (2 * slowest) if slowest > 0 else math.inf
    return max(1, min(LARGEST_DEGREE, math.ceil(min(wanted, LARGEST_DEGREE))))


def _without_outliers(grams: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Vectors (b, n, m) of the directions that dwarf the others, fewer than ``rank``, and the matrices without them."""
    size = grams.shape[-1]
    count = min(OUTLIERS, size)
    generator = torch.Generator().manual_seed(SEED + 1)
    basis = torch.randn(size, count, generator=generator, dtype=torch.float64).to(grams).expand(len(grams), -1, -1)
    for _ in range(OUTLIER_STEPS - 1):
        basis = orthonormal(grams @ basis)
    values, vectors, _ = _ritz(grams, basis)
    large = min(rank - 1, int((values > OUTLIER_RATIO * values[:, -1:]).sum(dim=1).max()))
    vectors = vectors[..., :large].contiguous()
    return vectors, _deflated(grams, values[:, :large], vectors) if large else grams


def _deflated(grams: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    """The matrices without these directions."""
    return torch.baddbmm(grams, vectors * values[:, None], vectors.mT, alpha=-1)
