"""FFN channels: which stay, and what down_proj must be once the others are gone.

The inner activations of a gated FFN are correlated, so the channels that stay can take over part of what the others did: with
C the second moment of the inner activations, S the kept channels and a ridge r that pulls towards the old weights,
``W_S' = (W C[:, S] + r W[:, S]) (C[S, S] + r I)^-1`` is the down projection that reproduces the old output best.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorap.algorithms.factorization import suffix_sums
from lorap.algorithms.moments import Moment, ridged_cholesky
from lorap.algorithms.pruning import CHANNELS

# Relative to the mean channel energy: keeps the normal equations solvable where channels are collinear or never fire.
SMALLEST_RIDGE = 1e-8


def output_scores(down: Tensor, inner_sq_norm: Tensor, output_metric: Tensor | None = None) -> Tensor:
    """(intermediate_size,) float64: ||A^(1/2) down_:c|| times the norm of channel c, what the channel adds to the FFN's output.

    Args:
        down: (hidden_size, intermediate_size).
        inner_sq_norm: (intermediate_size,), squared norms of the inner activations.
        output_metric: A (hidden_size, hidden_size); the identity where None.
    """
    metric = None if output_metric is None else output_metric.double()

    def sizes(w: Tensor) -> Tensor:
        return (w * (w if metric is None else metric @ w)).sum(0).clamp(min=0)

    sq_norms = torch.cat([sizes(part.double()) for part in down.split(CHANNELS, dim=1)])
    return (sq_norms * inner_sq_norm.double()).sqrt()


def fluctuation_scores(down: Tensor, variance: Tensor) -> Tensor:
    """(intermediate_size,) float64: variance of channel c times ||down_:c||^2 (FLAP, arXiv 2312.11983, metric WIFV)."""
    return variance.double() * down.double().square().sum(0)


def keep_best(scores: Tensor, width: int, *, least_important_kept: float = 0.0) -> Tensor:
    """The channels of highest score, but for the lowest share, which stays.

    Args:
        scores: (intermediate_size,).
        width: how many channels stay.
        least_important_kept: share of all channels, of the lowest score, that stays (paper, section 3.4); within ``width``.

    Returns:
        (width,) int64, ascending.
    """
    order = torch.argsort(scores, stable=True)
    lowest = min(int(least_important_kept * len(order)), width)
    kept = torch.cat((order[:lowest], order[len(order) - (width - lowest) :]))
    return kept.sort().values


def repair_down(down: Tensor, second_moment: Moment | Tensor, kept: Tensor, *, ridge: float) -> Tensor:
    """Least-squares stand-in for ``down`` that reads the kept channels only.

    Args:
        down: (hidden_size, intermediate_size).
        second_moment: C (intermediate_size, intermediate_size) of the inner activations.
        kept: (kept,) int64, the channels that stay.
        ridge: relative to the mean diagonal of C.

    Returns:
        (hidden_size, kept) in the precision of C.
    """
    c = Moment.of(second_moment)
    w = down.to(c.sums.dtype)
    pull = max(ridge, SMALLEST_RIDGE) * float(c.diagonal.mean())
    if pull <= 0:  # no channel ever fired: nothing to take over
        return w[:, kept]
    wanted = c.after(w)[:, kept]
    root, pull = ridged_cholesky(lambda: c.block(kept), pull)
    wanted.add_(w[:, kept], alpha=pull)
    # cholesky_solve would copy the factor first: half a gigabyte for LLaMA-7B.
    half = torch.linalg.solve_triangular(root.T, wanted, upper=True, left=False)
    return torch.linalg.solve_triangular(root, half, upper=False, left=False).contiguous()


def removed_share(down: Tensor, second_moment: Moment | Tensor, kept: Tensor, weight: Tensor) -> float:
    """Root mean square change of the FFN's output when ``weight`` on the kept channels stands in for ``down``, relative to it.

    Args:
        down: (hidden_size, intermediate_size).
        second_moment: (intermediate_size, intermediate_size) of the inner activations.
        kept: (kept,) int64, the channels that stay.
        weight: (hidden_size, kept), what reads them instead of ``down``.

    Returns:
        At least 0; 0 where the output is always 0.
    """
    c = Moment.of(second_moment)
    change = down.to(c.sums.dtype, copy=True)
    before = c.energy(change)
    change[:, kept] -= weight.to(change)
    return (c.energy(change) / before) ** 0.5 if before > 0 else 0.0


def repaired_tail(
    down: Tensor, second_moment: Moment | Tensor, order: Tensor, *, ridge: float, output_metric: Tensor | None = None
) -> Tensor:
    """||A^(1/2) (W x - W' x_S)||^2 after the repair, for every width: S are the first ``width`` channels of ``order``.

    The mean is over C + r I, so the ridge counts as noise on every channel. With C + r I = L L^T in that order, what the
    first channels cannot explain of the others is the trailing block of L, whose columns do not depend on where it begins:
    one Cholesky factor serves all widths.

    Args:
        down: W (hidden_size, intermediate_size).
        second_moment: C (intermediate_size, intermediate_size) of the inner activations.
        order: (intermediate_size,) int64, the channels, those that stay longest first.
        ridge: relative to the mean diagonal of C.
        output_metric: A (hidden_size, hidden_size); the identity where None.

    Returns:
        (intermediate_size + 1,) float64, by width from 0 on.
    """
    c = Moment.of(second_moment)
    mean = float(c.diagonal.mean())
    if mean <= 0:
        return torch.zeros(len(order) + 1, dtype=torch.float64, device=down.device)
    root, _ = ridged_cholesky(lambda: c.block(order), max(ridge, SMALLEST_RIDGE) * mean)
    unexplained = down.to(root.dtype)[:, order] @ root
    seen = unexplained if output_metric is None else output_metric.to(unexplained) @ unexplained
    energy = (unexplained * seen).sum(0, dtype=torch.float64).clamp(min=0)
    return suffix_sums(energy)
