"""Pivoted storage: a rank-r matrix as r of its own rows, and the coefficients that make the other rows from them.

W' = left @ right of shape (m, n) and rank r is fixed by r rows that span the rest: with right' = W'[pivot_rows] (r, n) the other
rows are left' @ right', left' (m - r, r). That is r (m + n - r) numbers instead of r (m + n), with nothing lost (PIFA,
arXiv 2501.19090).

Which rows decides the size of left', and so what rounding to 16 bits costs. Rows of locally largest volume have no coefficient
above 1 in magnitude; here rows are exchanged until none exceeds 2, as in strong rank-revealing QR (Gu and Eisenstat, 1996) and
maxvol (Goreinov and others, 2010). Only the column space of ``left`` matters to that choice, so it is made on an orthonormal
basis of it, which also keeps a rank-deficient or badly scaled ``left`` harmless.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorap.errors import FactorizationError

# Exchanging on a coefficient c multiplies the volume of the pivot rows by |c|, so with any bound above 1 the search ends.
COEFFICIENT_BOUND = 2.0


@dataclass(frozen=True)
class PivotedFactors:
    """W' with ``W'[pivot_rows] = right`` and ``W'[other rows] = left @ right``.

    Args:
        left: (m - r, r) float64, one row of coefficients for each row that is no pivot, in their order.
        right: (r, n) float64, rows of W'.
        pivot_rows: (r,) int64, ascending.
        largest_coefficient: largest magnitude in ``left``; 0 where it has no rows.
    """

    left: Tensor
    right: Tensor
    pivot_rows: Tensor
    largest_coefficient: float


@torch.no_grad()
def pivot(left: Tensor, right: Tensor, *, name: str = "weight") -> PivotedFactors:
    """The matrix ``left @ right`` in pivoted storage, equal to it up to float64 rounding.

    Coefficients stay within 2 also where ``left`` has fewer than r independent rows; the missing pivots are then rows that
    nothing depends on. With r = m every row is a pivot and ``left`` of the result is empty: such a matrix saves nothing over a
    dense one, and is better kept dense. Takes 3 s for m = 4096, r = 1500 on one core.

    Args:
        left: (m, r) floating point, best float64; m >= r >= 1.
        right: (r, n) floating point.
        name: what to call the weight in messages.

    Raises:
        FactorizationError: the shapes do not fit, or an entry is NaN or infinite.
    """
    _check(left, right, name)
    left, right = left.double(), right.double()
    rank = left.shape[1]
    basis = torch.linalg.qr(left).Q
    rows, coefficients = _rows_by_elimination(basis)
    rows = _strengthen(rows, coefficients)
    pivots, others = rows[:rank].sort().values, rows[rank:].sort().values
    coefficients = _coefficients(basis, pivots, others)  # anew, free of the rounding of the updates
    return PivotedFactors(
        left=coefficients,
        right=left[pivots] @ right,
        pivot_rows=pivots,
        largest_coefficient=float(coefficients.abs().max()) if len(others) else 0.0,
    )


def _rows_by_elimination(basis: Tensor) -> tuple[Tensor, Tensor]:
    """All rows (m,), the r that partial pivoting takes first, and the coefficients (m - r, r) of the others.

    Most matrices need at most a few exchanges after that, so elimination serves in place of a column-pivoted QR, in one call.
    """
    rank = basis.shape[1]
    packed, exchanges, _ = torch.linalg.lu_factor_ex(basis)
    rows = list(range(len(basis)))
    for step, partner in enumerate(exchanges.tolist()):  # counted from 1, as LAPACK does
        rows[step], rows[partner - 1] = rows[partner - 1], rows[step]
    lower = packed.tril(-1)
    # The unit diagonal is implied, so this is stable even where the pivot rows themselves are nearly dependent.
    coefficients = torch.linalg.solve_triangular(
        lower[:rank], lower[rank:], upper=False, left=False, unitriangular=True
    )
    return torch.tensor(rows, device=basis.device), coefficients


def _strengthen(rows: Tensor, coefficients: Tensor) -> Tensor:
    """``rows`` (m,), pivots first, after exchanging pivots until no coefficient exceeds the bound."""
    rank = coefficients.shape[1]
    rows = rows.clone()
    for _ in range(_most_exchanges(rank) if len(coefficients) else 0):
        other, column = divmod(int(coefficients.abs().argmax()), rank)
        largest = float(coefficients[other, column])
        if abs(largest) <= COEFFICIENT_BOUND:
            break
        rows[[column, rank + other]] = rows[[rank + other, column]]
        along, across = coefficients[:, column].clone(), coefficients[other].clone()
        along[other] += 1
        across[column] -= 1
        coefficients = coefficients.addr(along, across, alpha=-1 / largest)
    return rows


def _most_exchanges(rank: int) -> int:
    """A cap against days of work on a hostile matrix; random and trained weights need 0 to a few."""
    return 100 + 4 * rank


def _coefficients(basis: Tensor, pivots: Tensor, others: Tensor) -> Tensor:
    """(m - r, r): X with basis[others] = X @ basis[pivots]."""
    return torch.linalg.solve(basis[pivots], basis[others], left=False)


def _check(left: Tensor, right: Tensor, name: str) -> None:
    shapes = f"left {tuple(left.shape)} and right {tuple(right.shape)}"
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0] or left.shape[1] < 1:
        raise FactorizationError(f"{shapes} are no factors of {name}; (m, r) and (r, n) fit")
    if left.shape[1] > left.shape[0]:
        raise FactorizationError(
            f"{shapes} of {name}: {left.shape[0]} rows cannot hold {left.shape[1]} pivots; lower the rank"
        )
    if not (left.is_floating_point() and right.is_floating_point()):
        raise FactorizationError(f"the factors of {name} are {left.dtype} and {right.dtype}, not floating point")
    if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise FactorizationError(f"the factors of {name} contain NaN or infinity")


# ----------------------------------------------------------------------------------------------------------------------
# What it costs


def pivoted_parameters(shape: tuple[int, int], rank: int) -> int:
    """Numbers that a matrix of ``shape`` (out_features, in_features) holds in pivoted storage, the row index not counted."""
    out_features, in_features = shape
    return rank * (out_features + in_features - rank)


def pivoted_rank(shape: tuple[int, int], kept: float) -> int:
    """The largest rank whose pivoted storage is at most ``kept`` times the dense matrix; 0 where not even rank 1 is.

    Args:
        shape: (out_features, in_features).
        kept: share of the dense parameters, between 0 and 1. At 1 the result is min(shape), which is as large as dense.
    """
    out_features, in_features = shape
    budget = kept * (out_features * in_features)
    total = out_features + in_features
    rank = int((total - math.sqrt(max(total * total - 4 * budget, 0))) / 2)
    rank = max(0, min(rank, *shape))
    while rank > 0 and pivoted_parameters(shape, rank) > budget:
        rank -= 1
    while rank < min(shape) and pivoted_parameters(shape, rank + 1) <= budget:
        rank += 1
    return rank


@torch.no_grad()
def storage_error(reference: Tensor, stored: Tensor, metric: Tensor | None = None) -> float:
    """||(W' - stored) C^(1/2)||_F / ||W' C^(1/2)||_F: what rounding the factors of W' to a storage dtype adds.

    Args:
        reference: W' (out_features, in_features), best float64.
        stored: what the rounded factors multiply to, computed in float64: ``module.reconstruct(dtype=torch.float64)``.
        metric: C, as in :func:`lorap.factorize`.

    Returns:
        The relative error; 0 where W' is 0 on the metric and is stored so, infinity where it is not.

    Raises:
        FactorizationError: the shapes differ.
    """
    if reference.shape != stored.shape:
        raise FactorizationError(
            f"stored has shape {tuple(stored.shape)}, the reference {tuple(reference.shape)}; they must agree"
        )
    reference = reference.double()
    error, size = (_weighted_norm(w, metric) for w in (reference - stored.to(reference), reference))
    if size == 0:
        return 0.0 if error == 0 else math.inf
    return error / size


def _weighted_norm(w: Tensor, metric: Tensor | None) -> float:
    if metric is None:
        return float(w.norm())
    c = metric.to(w)
    if c.ndim == 1:
        return float((w * c.sqrt()).norm())
    return float(((w @ c) * w).sum().clamp(min=0).sqrt())
