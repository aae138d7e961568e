"""How much memory a factorization takes, from its shapes."""

from __future__ import annotations

from lorap.factorization.eigen import basis_size


def working_bytes(
    out_features: int,
    in_features: int,
    rank: int,
    *,
    method: str,
    matrix_metric: bool,
    output_metric: bool,
    converted: bool,
) -> int:
    """Predicted high-water mark in bytes, without weight, metrics and result. Checked by a test that watches the allocator.

    Args:
        out_features, in_features, rank: of the factorization.
        method: ``eigh``, ``mixed``, ``subspace`` or ``svd``.
        matrix_metric: whether the metric of the inputs is a matrix.
        output_metric: whether there is one of the outputs.
        converted: whether the weight is not float64 yet.
    """
    whole, n = out_features * in_features, min(out_features, in_features)
    tall = out_features > in_features
    held = (whole if converted or output_metric else 0) + (out_features**2 if output_metric else 0)
    reducing = held + whole + n * n + (2 * in_features**2 if matrix_metric else 0)
    held += (whole if tall else 0) + n * n
    solving = held + _solver_elements(n, rank, method)
    finishing = held + rank * (n + out_features + 2 * in_features)
    return 8 * max(reducing, solving, finishing)


def _solver_elements(n: int, rank: int, method: str) -> int:
    """In units of float64, at the fullest moment of a solver."""
    k = basis_size(n, rank)
    if method in ("eigh", "svd"):
        return 4 * n * n  # a copy that becomes the vectors, two matrices of workspace, the vectors in order
    proving = n * n + n * n + 4 * n * k  # the complement and its Cholesky factor beside bases and images
    if method == "mixed":
        return max(n * n * 5 // 2, proving)
    return max(n * n + 2 * n * k, proving)
