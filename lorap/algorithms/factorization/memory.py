"""How much memory factorizations take, from their shapes. A test watches the allocator and compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorap.algorithms.factorization.eigen import basis_size

DOUBLE = 8  # bytes


@dataclass(frozen=True)
class Footprint:
    """One factorization; sizes in elements of float64.

    Args:
        out_features, in_features, rank: of the factorization.
        method: ``eigh``, ``mixed``, ``subspace`` or ``svd``.
        metric: axes of the metric of the inputs: 0 for none, 1 for a vector, 2 for a matrix.
        output_metric: whether there is one of the outputs.
        converted: whether weight and metrics have to be turned into float64 first.
    """

    out_features: int
    in_features: int
    rank: int
    method: str
    metric: int
    output_metric: bool
    converted: bool

    @property
    def size(self) -> int:
        """n, the smaller side."""
        return min(self.out_features, self.in_features)

    @property
    def _whole(self) -> int:
        return self.out_features * self.in_features

    @property
    def _tall(self) -> bool:
        return self.out_features > self.in_features

    @property
    def held(self) -> int:
        """From the reduction to the end: W between its metrics, and the Gram matrix."""
        seen = self._whole if self.converted or self.output_metric else 0
        root = self.out_features**2 if self.output_metric else 0
        return seen + root + (self._whole if self._tall and self.metric else 0) + self.size**2

    @property
    def reducing(self) -> int:
        """The fullest moment of the reduction, what is held of it included."""
        given = self.in_features**2 if self.converted and self.metric == 2 else 0
        a = self.out_features**2 if self.output_metric else 0
        given += a if self.converted else 0
        rooting = given + (3 * self.in_features**2 if self._tall and self.metric == 2 else 0)
        return max(given + 3 * a, self.held + rooting, self.held + given + (self._whole if self.metric else 0))

    @property
    def solving(self) -> int:
        """At the fullest moment of the solver, without what is held."""
        n, k = self.size, basis_size(self.size, self.rank)
        if self.method == "svd":
            # A root of the metric; or the weighted matrix, its copy and both sides of singular vectors.
            root = (4 if self.converted else 3) * self.in_features**2 if self.metric == 2 else 0
            return max(root, (self._whole if self.metric else 0) + 2 * self._whole + self.size**2)
        if self.method == "eigh":
            return 3 * n * n
        proving = 2 * n * n + 4 * n * k  # the complement, its Cholesky factor, bases and their images
        return max(3 * n * n, proving) if self.method == "mixed" else max(2 * n * n + 5 * n * k, proving)

    @property
    def finishing(self) -> int:
        """While the factors are made, without what is held; the Gram matrix is no longer."""
        vectors = self.size * self.rank
        outputs = self.out_features * self.rank
        inverse = self.out_features**2 if self.output_metric else 0
        factors = inverse + 2 * outputs + 2 * self.rank * self.in_features
        return vectors + max(4 * outputs if self._tall else 0, factors) - self.size**2


def working_bytes(group: Sequence[Footprint]) -> int:
    """Predicted high-water mark of a group that is solved together, without weights, metrics and results.

    The block iteration has all matrices of a group in the air at once, the others solve one after the other.
    """
    held = sum(one.held for one in group)
    together = group[0].method == "subspace" and len(group) > 1
    stacked = sum(one.size**2 for one in group) if together else 0
    solving = [one.solving for one in group]
    fullest = max(
        held + max(one.reducing - one.held for one in group),
        held + stacked + (sum(solving) if together else max(solving)),
        held + max(one.finishing for one in group) + sum(one.size * one.rank for one in group[1:]),
    )
    return DOUBLE * fullest
