"""Weighted low-rank factorization: the best rank-r stand-in for a weight, judged on the activations it will see.

For a positive semi-definite metric C of the inputs (in, in), the matrix W' of rank r that minimises ||(W - W') C^(1/2)||_F is
``W' = P P^T W``, where P (out, r) holds the top r eigenvectors of ``G = W C W^T``: no inverse, and no division by a channel that
never fires. C = I is the plain truncated SVD; C = diag(sum of x_j^2) is the paper's activation-weighted SVD (section 3.2),
whose ``D^-1`` cancels in this form; a full second moment gives whitening; a covariance gives the principal components of the
outputs (AFM).

A metric A of the outputs (out, out) can be given as well: then ||A^(1/2) (W - W') C^(1/2)||_F is least. With A = L L^T this is
the problem above for L^T W, and ``W' = L^-T P P^T L^T W``.

Both the Gram matrix and its eigenvectors are computed in float64: in float32 the eigensolver alone loses up to 2.4 % of
weighted error once outlier channels spread the spectrum over four decades.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorap.errors import FactorizationError

# A metric is known to some 12 digits after all sums, so its root, which has the square root of its condition, to half as many.
SINGULAR = 1e-6


@dataclass(frozen=True)
class Factorization:
    """W ~ left @ right.

    Args:
        left: (out_features, rank), in the dtype of the weight.
        right: (rank, in_features), in the dtype of the weight.
        error: ||A^(1/2) (W - left @ right) C^(1/2)||_F / ||A^(1/2) W C^(1/2)||_F before rounding to that dtype; 0 is exact.
        singular_values: (min(out, in),) float64, of A^(1/2) W C^(1/2), descending.
    """

    left: Tensor
    right: Tensor
    error: float
    singular_values: Tensor


@torch.no_grad()
def factorize(
    weight: Tensor,
    rank: int,
    metric: Tensor | None = None,
    *,
    output_metric: Tensor | None = None,
    name: str = "weight",
) -> Factorization:
    """Best rank-``rank`` factor pair of ``weight`` in the norm that ``metric`` and ``output_metric`` define.

    Each component carries the same norm in both factors, so that neither overflows nor underflows in 16 bits.

    Args:
        weight: (out_features, in_features), floating point.
        rank: between 1 and min(out_features, in_features).
        metric: None for the plain SVD; a vector (in_features,) C_jj >= 0 (pass ``channel_sq_norm``); or a positive
            semi-definite matrix (in_features, in_features).
        output_metric: None, or a positive semi-definite matrix (out_features, out_features); the product is 0 in directions
            that a singular one does not see.
        name: what to call the weight in messages.

    Raises:
        FactorizationError: shapes do not fit, the rank is impossible, or an entry is NaN or infinite.
    """
    _check(weight, rank, metric, name)
    _check_output_metric(weight, output_metric, name)
    w = weight.double()
    c = None if metric is None else metric.to(device=w.device, dtype=torch.float64)
    root = None if output_metric is None else root_of(output_metric.to(device=w.device, dtype=torch.float64))
    seen = w if root is None else root.T @ w
    basis, sq_singular_values = _dominant_outputs(seen, rank, c)
    right = basis.T @ seen
    if root is not None:
        basis = _solve(root.T, basis)
    norms = right.norm(dim=1)
    if root is not None:  # the columns of left are no longer unit vectors
        norms = norms / basis.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
    scale = torch.where(norms > 0, norms, 1.0).sqrt()
    total = sq_singular_values.sum()
    lost = sq_singular_values[rank:].sum()
    return Factorization(
        # eigh returns column-major vectors; a loaded checkpoint is row-major, and in float16 the layouts round differently.
        left=(basis * scale).to(weight.dtype).contiguous(),
        right=(right / scale[:, None]).to(weight.dtype).contiguous(),
        error=float((lost / total).sqrt()) if total > 0 else 0.0,
        singular_values=sq_singular_values.sqrt(),
    )


def _dominant_outputs(w: Tensor, rank: int, c: Tensor | None) -> tuple[Tensor, Tensor]:
    """Orthonormal P (out, rank) and the squared singular values of W C^(1/2), descending; works on the smaller side of W."""
    out_features, in_features = w.shape
    if out_features <= in_features:
        eigenvalues, vectors = torch.linalg.eigh(_gram(w, c))
        return vectors.flip(1)[:, :rank], eigenvalues.flip(0).clamp(min=0)
    weighted = w if c is None else w * c.sqrt() if c.ndim == 1 else w @ _sqrt_psd(c)
    eigenvalues, vectors = torch.linalg.eigh(weighted.T @ weighted)
    if rank == in_features:
        # All of W fits, also the part that the metric does not see.
        return torch.linalg.qr(w).Q, eigenvalues.flip(0).clamp(min=0)
    # Columns of W C^(1/2) V are orthogonal; QR normalises them and completes the basis where a singular value is 0.
    return torch.linalg.qr(weighted @ vectors.flip(1)[:, :rank]).Q, eigenvalues.flip(0).clamp(min=0)


def _gram(w: Tensor, c: Tensor | None) -> Tensor:
    if c is None:
        return w @ w.T
    if c.ndim == 1:
        # One scaled copy on both sides keeps the product exactly symmetric.
        scaled = w * c.sqrt()
        return scaled @ scaled.T
    gram = w @ c @ w.T
    return (gram + gram.T) / 2


def spectrum(weight: Tensor, metric: Tensor | None = None, output_metric: Tensor | None = None) -> Tensor:
    """(min(out, in),) float64: squared singular values of A^(1/2) W C^(1/2), descending, without a factorization.

    What a rank leaves out is the sum of the ones after it.
    """
    w = weight.double()
    c = None if metric is None else metric.to(device=w.device, dtype=torch.float64)
    if output_metric is not None:
        w = root_of(output_metric.to(device=w.device, dtype=torch.float64)).T @ w
    out_features, in_features = w.shape
    if out_features > in_features:
        w = w if c is None else w * c.sqrt() if c.ndim == 1 else w @ root_of(c)
        w, c = w.T, None
    return torch.linalg.eigvalsh(_gram(w, c)).flip(0).clamp(min=0)


def suffix_sums(values: Tensor) -> Tensor:
    """(n + 1,): what remains when the first k of n values are taken, for k = 0 .. n."""
    return torch.cat((values.flip(0).cumsum(0).flip(0), values.new_zeros(1)))


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """matrix^-1 right; where the matrix is singular up to rounding, the smallest solution."""
    inverse, failed = torch.linalg.inv_ex(matrix)
    usable = not bool(failed) and float(inverse.norm() * matrix.norm()) < 1 / SINGULAR  # NaN is not
    return (inverse if usable else torch.linalg.pinv(matrix, rtol=SINGULAR)) @ right


def root_of(metric: Tensor) -> Tensor:
    """L with L L^T = ``metric``: the Cholesky factor, or the symmetric root where a singular metric has none."""
    symmetric = (metric + metric.T) / 2
    root, failed = torch.linalg.cholesky_ex(symmetric)
    return _sqrt_psd(symmetric) if bool(failed) or not bool(torch.isfinite(root).all()) else root


def _sqrt_psd(c: Tensor) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh((c + c.T) / 2)
    return (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T


def _check(weight: Tensor, rank: int, metric: Tensor | None, name: str) -> None:
    if weight.ndim != 2 or not weight.is_floating_point():
        raise FactorizationError(
            f"{name} is {weight.dtype} of shape {tuple(weight.shape)}; a floating-point matrix is needed"
        )
    out_features, in_features = weight.shape
    if not 1 <= rank <= min(out_features, in_features):
        raise FactorizationError(
            f"rank {rank} is impossible for {name} of shape {tuple(weight.shape)}; it must lie in [1, {min(weight.shape)}]"
        )
    if not torch.isfinite(weight).all():
        raise FactorizationError(f"{name} contains NaN or infinity")
    if metric is None:
        return
    if metric.shape not in ((in_features,), (in_features, in_features)):
        raise FactorizationError(
            f"the metric of {name} has shape {tuple(metric.shape)}; ({in_features},) or ({in_features}, {in_features}) fits"
        )
    if not torch.isfinite(metric).all():
        raise FactorizationError(f"the metric of {name} contains NaN or infinity")
    if metric.ndim == 1 and bool((metric < 0).any()):
        raise FactorizationError(
            f"the metric of {name} has a negative entry ({float(metric.min())}); pass squared norms"
        )


def _check_output_metric(weight: Tensor, output_metric: Tensor | None, name: str) -> None:
    if output_metric is None:
        return
    out_features = weight.shape[0]
    if output_metric.shape != (out_features, out_features):
        raise FactorizationError(
            f"the output metric of {name} has shape {tuple(output_metric.shape)}; ({out_features}, {out_features}) fits"
        )
    if not torch.isfinite(output_metric).all():
        raise FactorizationError(f"the output metric of {name} contains NaN or infinity")
