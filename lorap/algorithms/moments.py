"""A second moment that is shrunk and cut on the fly: that of a wide FFN takes a gigabyte, so no copy is made that need not be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorap.errors import FactorizationError

# Columns that a Cholesky factor advances by, where it is made in place.
CHOLESKY_BLOCK = 1024
# Larger matrices are factored in place: LAPACK would work on a copy.
IN_PLACE_FROM = 4096


@dataclass(frozen=True)
class Moment:
    """(1 - shrinkage) C + shrinkage diag(C), with C = sums / weight.

    Args:
        sums: (K, K), sum of x x^T over tokens.
        weight: of all tokens.
        shrinkage: share of the diagonal, in [0, 1].
    """

    sums: Tensor
    weight: float = 1.0
    shrinkage: float = 0.0

    @classmethod
    def of(cls, given: Moment | Tensor) -> Moment:
        """A matrix (K, K) as a moment; nothing is copied."""
        return given if isinstance(given, Moment) else cls(given)

    def shrunk(self, shrinkage: float) -> Moment:
        """The same sums with another ``shrinkage``; nothing is copied."""
        return replace(self, shrinkage=shrinkage)

    @property
    def diagonal(self) -> Tensor:
        """(K,) float64; shrinking does not change it."""
        return self.sums.diagonal().double() / self.weight

    def after(self, w: Tensor) -> Tensor:
        """w C for w (..., K), in the precision of the sums."""
        w = w.to(self.sums.dtype)
        product = (w @ self.sums).mul_(1 - self.shrinkage)
        return product.addcmul_(w, self.sums.diagonal(), value=self.shrinkage).div_(self.weight)

    def block(self, rows: Tensor) -> Tensor:
        """C[rows][:, rows], a new matrix; ``rows`` int64 may stand in any order."""
        block = self.sums[rows[:, None], rows]
        block.mul_((1 - self.shrinkage) / self.weight)
        block.diagonal().copy_(self.diagonal[rows])
        return block

    def energy(self, w: Tensor) -> float:
        """tr(w C w^T), at least 0."""
        return max(float(self.after(w).mul_(w).sum(dtype=torch.float64)), 0.0)


def ridged_cholesky(make: Callable[[], Tensor], pull: float) -> tuple[Tensor, float]:
    """Lower Cholesky factor of ``make() + pull I``, and the pull: ten times larger each time that rounding makes it indefinite.

    Args:
        make: returns the matrix (n, n); it is used up, and asked for again where a larger pull is needed.
        pull: above 0.

    Returns:
        The factor (n, n), lower triangular, and the pull that was enough.

    Raises:
        FactorizationError: the matrix contains NaN or infinity.
    """
    while True:
        matrix = make()
        if not bool(torch.isfinite(matrix.diagonal()).all()) or not bool(torch.isfinite(matrix.sum())):
            raise FactorizationError("the second moment of the FFN's inner activations contains NaN or infinity")
        matrix.diagonal().add_(pull)
        root = cholesky_in_place(matrix) if len(matrix) >= IN_PLACE_FROM else _cholesky(matrix)
        if root is not None:
            return root, pull
        pull *= 10


def cholesky_in_place(matrix: Tensor, *, block: int = CHOLESKY_BLOCK) -> Tensor | None:
    """The lower Cholesky factor of (n, n), written over ``matrix``; None, and nothing useful there, if it is indefinite.

    Only the lower triangle is read. Columns left of a block are final when the block is reached (left-looking), so that nothing
    larger than (n, block) is held besides.
    """
    for start in range(0, len(matrix), block):
        end = min(start + block, len(matrix))
        if start:
            matrix[start:, start:end] -= matrix[start:, :start] @ matrix[start:end, :start].T
        corner = _cholesky(matrix[start:end, start:end])
        if corner is None:
            return None
        matrix[start:end, start:end] = corner
        below = matrix[end:, start:end]
        if len(below):
            below.copy_(torch.linalg.solve_triangular(corner, below.T, upper=False).T)
    return matrix.tril_()


def _cholesky(matrix: Tensor) -> Tensor | None:
    root, failed = torch.linalg.cholesky_ex(matrix)
    return None if bool(failed) or not bool(torch.isfinite(root.diagonal()).all()) else root
