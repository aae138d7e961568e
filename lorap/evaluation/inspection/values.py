"""What a spectrum says in numbers, what a channel's importance does, and what a random matrix of the same shape would say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Shares of the energy, the sum of squared singular values, that a rank is asked to keep.
LEVELS = (0.90, 0.95, 0.99)
# The least important channels, which the paper does not prune.
LEAST = 0.01
# Points of a curve that are kept, and their significant digits.
POINTS = 256
DIGITS = 4
# Sums that are equal up to rounding are equal.
ROUNDING = 1e-12
# Steps of an integral over the density of a random matrix's spectrum.
STEPS = 20_000


@dataclass(frozen=True)
class SingularValues:
    """What the singular values of one matrix say.

    Args:
        shape: (out_features, in_features).
        largest: the first one; of weighted matrices with the root mean square of each input channel as its weight.
        effective_rank: exp of the entropy of the shares of the energy, see :func:`effective_rank`.
        ranks: the least rank that keeps each of ``LEVELS`` of the energy.
        values: singular values over the largest, at :func:`sample_points` of the full rank.
    """

    shape: tuple[int, int]
    largest: float
    effective_rank: float
    ranks: tuple[int, ...]
    values: tuple[float, ...]

    @classmethod
    def of(cls, squares: Tensor, shape: tuple[int, int]) -> SingularValues:
        """From all squared singular values of a matrix (out, in), descending, float64."""
        values = squares.cpu().sqrt()
        relative = values / values[0] if values[0] > 0 else values
        ranks = tuple(least_count(squares, level) for level in LEVELS)
        return cls(shape, float(values[0]), effective_rank(squares), ranks, _sampled(relative))

    @property
    def full_rank(self) -> int:
        """The smaller side."""
        return min(self.shape)

    @property
    def effective_share(self) -> float:
        """Effective rank over full rank."""
        return self.effective_rank / self.full_rank

    @property
    def rank_shares(self) -> tuple[float, ...]:
        """``ranks`` over the full rank."""
        return tuple(rank / self.full_rank for rank in self.ranks)

    @property
    def parameter_shares(self) -> tuple[float, ...]:
        """Parameters r (m + n) of a factor pair at ``ranks`` over the m n of the matrix; above 1 the pair is larger."""
        return tuple(rank * sum(self.shape) / math.prod(self.shape) for rank in self.ranks)

    def to_dict(self, *, curves: bool = True) -> dict[str, Any]:
        """Plain values for JSON."""
        numbers = {
            "largest": self.largest,
            "effective_rank": self.effective_rank,
            "ranks": self.ranks,
            "rank_shares": self.rank_shares,
            "parameter_shares": self.parameter_shares,
        }
        return numbers | ({"values": self.values} if curves else {})


@dataclass(frozen=True)
class Importance:
    """How the importance of an FFN's channels is spread (:func:`lorap.algorithms.pruning.channel_importance`).

    Args:
        channels: how many there are.
        least_share: share of the whole importance that the least important ``LEAST`` of the channels hold, at least one channel.
        counts: the fewest channels that hold each of ``LEVELS`` of it.
        values: importance over its mean, ascending, at :func:`sample_points` of ``channels``.
        cumulative: share of the whole that so many least important channels hold, at the same points.
    """

    channels: int
    least_share: float
    counts: tuple[int, ...]
    values: tuple[float, ...]
    cumulative: tuple[float, ...]

    @classmethod
    def of(cls, importance: Tensor) -> Importance:
        """From (channels,) numbers of which none is negative."""
        ordered = importance.double().cpu().sort().values
        total = float(ordered.sum()) or 1.0
        sums = ordered.cumsum(0) / total
        least = max(1, int(LEAST * len(ordered)))
        counts = tuple(least_count(ordered.flip(0), level) for level in LEVELS)
        values = ordered * (len(ordered) / total)
        return cls(len(ordered), float(sums[least - 1]), counts, _sampled(values), _sampled(sums))

    def to_dict(self, *, curves: bool = True) -> dict[str, Any]:
        """Plain values for JSON."""
        numbers = {"least_share": self.least_share, "counts": self.counts}
        return numbers | ({"values": self.values, "cumulative": self.cumulative} if curves else {})


def effective_rank(squares: Tensor) -> float:
    """exp(-sum p_i ln p_i) with p_i = s_i^2 / sum s_j^2, from squared singular values; r where r are equal and the rest 0.

    The measure is that of Roy and Vetterli (The effective rank: a measure of effective dimensionality, EUSIPCO 2007). They take
    p_i = s_i / sum s_j; squares make p_i a share of the energy, the same that ranks are judged by. 0 for a matrix of zeros.
    """
    total = squares.sum()
    return float(torch.special.entr(squares / total).sum().exp()) if total > 0 else 0.0


def least_count(parts: Tensor, level: float) -> int:
    """How many of the first of ``parts``, descending, make up ``level`` of their sum."""
    sums = parts.cumsum(0)
    return int((sums < (level - ROUNDING) * sums[-1]).sum()) + 1 if sums[-1] > 0 else 0


def sample_points(size: int) -> tuple[int, ...]:
    """Which of ``size`` ordered values a curve keeps, counted from 1: all, or at most ``POINTS``, densest at both ends."""
    if size <= POINTS:
        return tuple(range(1, size + 1))
    angles = (math.pi / 2 * point / (POINTS - 1) for point in range(POINTS))
    return tuple(sorted({1 + round((size - 1) * math.sin(angle) ** 2) for angle in angles}))


@cache
def random_matrix(shape: tuple[int, int]) -> SingularValues:
    """A large matrix (out, in) of independent Gaussian entries, without drawing one: quantiles of the Marchenko-Pastur law.

    Entries have variance 1. With ratio y <= 1 of the sides, eigenvalues of the smaller Gram matrix over the larger side are
    1 + y + 2 sqrt(y) cos(t), with density 2 sin(t)^2 / (pi (1 + y + 2 sqrt(y) cos(t))) for t in (0, pi).
    """
    small, large = sorted(shape)
    y = small / large
    t = (torch.arange(STEPS, dtype=torch.float64) + 0.5) * (math.pi / STEPS)
    eigenvalues = 1 + y + 2 * math.sqrt(y) * t.cos()
    below = (t.sin().square() / eigenvalues).cumsum(0)
    quantiles = (torch.arange(small, dtype=torch.float64) + 0.5) / small
    squares = eigenvalues[torch.searchsorted(below / below[-1], quantiles)] * large
    return SingularValues.of(squares, shape)


def _sampled(values: Tensor) -> tuple[float, ...]:
    picked = values[[point - 1 for point in sample_points(len(values))]].tolist()
    return tuple(float(f"{value:.{DIGITS}g}") for value in picked)
