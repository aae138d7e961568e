"""Dense linear algebra that torch has no name for: symmetric products at half the cost, orthonormal bases, full precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Rows of a block. torch has no symmetric rank-k update, so only the blocks on and below the diagonal are multiplied: with 8
# blocks 56 % of the work.
BLOCKS = 8
SMALLEST_BLOCK = 128
# Off-diagonal entries after the first pass of Cholesky QR from which the second still reaches full accuracy.
LARGEST_FIRST_ERROR = 1e-2


def lower_product(left: Tensor, right: Tensor) -> Tensor:
    """(..., n, n): left right^T where that is known to be symmetric; both triangles are filled.

    Args:
        left: (..., n, k).
        right: (..., n, k).
    """
    size = left.shape[-2]
    block = max(SMALLEST_BLOCK, -(-size // BLOCKS))
    if size <= block:
        product = left @ right.mT
        return (product + product.mT) / 2
    product = left.new_empty(*left.shape[:-1], size)
    for start in range(0, size, block):
        rows = slice(start, min(start + block, size))
        product[..., rows, : rows.stop] = left[..., rows, :] @ right[..., : rows.stop, :].mT
        diagonal = product[..., rows, rows]
        product[..., rows, rows] = (diagonal + diagonal.mT) / 2
        product[..., : rows.start, rows] = product[..., rows, : rows.start].mT
    return product


def orthonormal(x: Tensor) -> Tensor:
    """(..., n, k): an orthonormal basis of the columns of x, and of anything where they are dependent.

    Cholesky QR, all matrix products. Two passes reach the rounding error of the dtype as long as the condition of x, its columns
    scaled to length 1, is below the root of its reciprocal (Yamamoto et al., 2015). The second pass sees whether it was;
    Householder's way is taken where not.
    """
    basis = x / x.norm(dim=-2, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    for again in (False, True):
        gram = lower_product(basis.mT, basis.mT)
        root, failed = torch.linalg.cholesky_ex(gram)
        off = gram - torch.eye(gram.shape[-1], dtype=x.dtype, device=x.device) if again else gram.new_zeros(1)
        # NaN is not below.
        if bool((failed != 0).any()) or not float(off.abs().max()) < LARGEST_FIRST_ERROR:
            return torch.linalg.qr(x).Q
        basis = torch.linalg.solve_triangular(root.mT, basis, upper=True, left=False)
    return basis


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products with all their digits, whatever the program around has allowed (TF32, bfloat16)."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)
