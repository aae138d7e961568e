"""Dense linear algebra that torch has no name for: orthonormal bases, definiteness, full precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lorap.algorithms.symmetric import lower_product

# Largest entry of a Gram matrix, off the identity, from which one pass of Cholesky QR reaches full accuracy.
NEARLY_ORTHOGONAL = 1e-2
CHOLESKY_BLOCK = 512


def eigh(x: Tensor) -> tuple[Tensor, Tensor]:
    """torch.linalg.eigh of symmetric matrices (..., n, n).

    LAPACK wants columns, and a symmetric matrix has them: read the other way round, nothing is transposed.

    Returns:
        Eigenvalues (..., n), ascending, and eigenvectors (..., n, n) as columns.
    """
    values, vectors = torch.linalg.eigh(x.mT)
    return values, vectors


def is_positive_definite(x: Tensor) -> bool:
    """Whether a symmetric matrix (n, n) has a Cholesky factorization; reads its lower triangle, and overwrites it.

    Block column by block column: torch clears the other triangle of its results in steps of a whole column, which takes 0.25 s of
    0.5 s at 4096.
    """
    for start in range(0, len(x), CHOLESKY_BLOCK):
        stop = start + CHOLESKY_BLOCK
        panel = x[start:, start:stop] - x[start:, :start] @ x[start:stop, :start].T
        root, failed = torch.linalg.cholesky_ex(panel[:CHOLESKY_BLOCK])
        if int(failed):
            return False
        x[start:stop, start:stop] = root
        x[stop:, start:stop] = torch.linalg.solve_triangular(root.T, panel[CHOLESKY_BLOCK:], upper=True, left=False)
    return True


def orthonormal(x: Tensor) -> Tensor:
    """(..., n, k): an orthonormal basis of the columns of x, and of anything where they are dependent.

    Cholesky QR, all matrix products. A second pass reaches the rounding error of the dtype as long as the condition of x, its
    columns scaled to length 1, is below the root of its reciprocal (Yamamoto et al., 2015), and is left out where the columns are
    nearly orthogonal to begin with. It sees whether the first was good enough; Householder's way is taken where not.
    """
    basis = x / x.norm(dim=-2, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    for _ in range(2):
        gram = lower_product(basis.mT, basis.mT)
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        diagonal -= 1  # exact, and undone: the entries are near 1
        low, high = gram.aminmax()
        near = max(-float(low), float(high)) < NEARLY_ORTHOGONAL  # NaN is not
        diagonal += 1
        root, failed = torch.linalg.cholesky_ex(gram)
        if bool((failed != 0).any()):
            break
        basis = torch.linalg.solve_triangular(root.mT, basis, upper=True, left=False)
        if near:
            return basis
    return torch.linalg.qr(x).Q


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products with all their digits, whatever the program around has allowed (TF32, bfloat16)."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)
