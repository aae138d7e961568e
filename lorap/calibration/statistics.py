"""Sums over calibration tokens, per input of a linear layer.

Everything is a sum plus a token count, in float64, never a running mean: batches, processes and resumed runs add up to the
same numbers. What the recipes want (norms, second moment, covariance) is derived at the end. Outer products are float32
before they are added, unless the activations are float64 or a mean will be subtracted: that takes half the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorap.algorithms.moments import Moment
from lorap.algorithms.symmetric import add_outer_products
from lorap.architectures import SHARED_INPUTS
from lorap.distributed import Processes
from lorap.errors import CalibrationError
from lorap.kernels import reference
from lorap.nn import ops
from lorap.nn.implementations import HALVES

# From so many channels on, sums of outer products are kept in float32: those of LLaMA-7B's FFN take 1 GB in float64, two
# folds and the working copies of the refit several times that. They feed refits with a ridge of some percent of the mean channel
# energy, next to which the rounding is nothing (tests/test_moments.py).
WIDE = 8192
# Keeps a division by no tokens at all from becoming NaN.
TINY = 1e-300


class ActivationStats:
    """What is known about the inputs x of one linear layer.

    Args:
        features: number of input channels K.
        mean: also gather sum(x).
        moments: also gather sum(x x^T), which costs a (K, K) float64 matrix and a matmul per batch.
        device: where the sums live.
        wide: above so many channels sums of outer products are float32; None for ``WIDE``.

    Attributes:
        tokens: how many tokens were counted; padding never is.
        weight: sum of the tokens' weights; equal to ``tokens`` where they have none.
        sq_sum: (K,) float64, sum over tokens of x_j^2.
        largest: () float32, the largest magnitude of any counted x_j, whatever its token's weight.
        total: (K,) float64, sum over tokens of x_j; only with ``mean``.
        outer: (K, K) float64, sum over tokens of x x^T; only with ``moments``. float32 above ``wide`` channels.
    """

    def __init__(
        self,
        features: int,
        *,
        mean: bool = False,
        moments: bool = False,
        device: torch.device | str = "cpu",
        wide: int | None = None,
    ) -> None:
        self.tokens = 0
        self.weight = 0.0
        self.largest = torch.zeros((), dtype=torch.float32, device=device)
        self.sq_sum = torch.zeros(features, dtype=torch.float64, device=device)
        self.total = torch.zeros(features, dtype=torch.float64, device=device) if mean else None
        precision = torch.float32 if features > (WIDE if wide is None else wide) else torch.float64
        self.outer = torch.zeros(features, features, dtype=precision, device=device) if moments else None

    @torch.no_grad()
    def update(self, x: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add activations.

        Args:
            x: (..., K).
            mask: (...), False on tokens that do not count; None where all do.
            weights: (...) >= 0: each token counts as that many in all sums; None for 1.
        """
        x = x.detach()
        self.largest = torch.maximum(self.largest, _largest(x, mask).to(self.largest))
        if self.total is not None:
            counted = x if weights is None else x.double() * weights.double().unsqueeze(-1)
            for chunk in reference.masked_chunks(counted, mask, torch.float64):
                self.total += chunk.sum(0)
        if weights is not None:
            precision = torch.promote_types(x.dtype, torch.float32)
            x = x.to(precision) * weights.to(precision).sqrt().unsqueeze(-1)
        sq_norm, counted_tokens = ops.channel_sq_norm(x, mask)
        self.sq_sum += sq_norm
        # Without a mask the count is known, and a GPU need not be waited for.
        tokens = x.numel() // x.shape[-1] if mask is None else int(counted_tokens)
        self.tokens += tokens
        if weights is not None:
            self.weight += float((weights if mask is None else weights[mask.bool()]).double().sum())
        else:
            self.weight += tokens
        if self.outer is None:
            return
        exact = self.total is not None or x.dtype == torch.float64 or (x.is_cuda and x.dtype in HALVES)
        if exact and self.outer.dtype == torch.float64:
            # A covariance subtracts numbers that may agree in all digits of a float32; halves have tensor cores.
            self.outer += ops.second_moment(x, mask)[0]
        else:
            for chunk in reference.masked_chunks(x, mask, torch.float32):
                add_outer_products(self.outer, chunk)  # in place: the product alone would be as large

    def merge(self, other: ActivationStats) -> None:
        """Add the sums of another process or batch."""
        self.tokens += other.tokens
        self.weight += other.weight
        self.largest = torch.maximum(self.largest, other.largest)
        self.sq_sum += other.sq_sum
        for name in ("total", "outer"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is None:
                continue
            if theirs is None:
                raise ValueError("cannot merge statistics without moments into statistics with moments")
            mine += theirs

    def add_up(self, processes: Processes) -> None:
        """Replace all sums by those over all processes."""
        if processes.count == 1:
            return
        counts = torch.tensor([self.tokens, self.weight], dtype=torch.float64, device=self.sq_sum.device)
        processes.all_reduce(counts, self.sq_sum, *(part for part in (self.total, self.outer) if part is not None))
        self.largest = torch.stack(processes.all_gather(self.largest.cpu())).max().to(self.largest)
        self.tokens, self.weight = int(counts[0]), float(counts[1])

    @property
    def is_finite(self) -> bool:
        """False as soon as one counted activation was NaN or infinite, or its square overflowed float32."""
        return bool(torch.isfinite(self.sq_sum).all())

    @property
    def channel_sq_norm(self) -> Tensor:
        """(K,) float64, the squared norm of each channel over all tokens."""
        return self.sq_sum

    @property
    def second_moment(self) -> Tensor:
        """(K, K), sum(x x^T) over the weight of all tokens, in the precision of the sums."""
        assert self.outer is not None, "gather with moments=True"
        return self.outer / max(self.weight, TINY)

    @property
    def moment(self) -> Moment:
        """:attr:`second_moment`, without a copy."""
        assert self.outer is not None, "gather with moments=True"
        return Moment(self.outer, max(self.weight, TINY))

    @property
    def mean(self) -> Tensor:
        """(K,) float64."""
        assert self.total is not None, "gather with mean=True"
        return self.total / max(self.weight, TINY)

    @property
    def variance(self) -> Tensor:
        """(K,) float64, mean square deviation of each channel."""
        return (self.sq_sum / max(self.weight, TINY) - self.mean.square()).clamp(min=0)

    @property
    def covariance(self) -> Tensor:
        """(K, K) float64, the second moment around the mean."""
        mean = self.mean
        return self.second_moment - torch.outer(mean, mean)


def _largest(x: Tensor, mask: Tensor | None) -> Tensor:
    """() the largest magnitude among the tokens that count, 0 where none does."""
    counted = x if mask is None else x[mask.bool()]
    return torch.linalg.vector_norm(counted, torch.inf) if counted.numel() else x.new_zeros(())


# One for each fold of the calibration text.
Folds = tuple[ActivationStats, ...]


def merged(folds: Sequence[ActivationStats], *, moments: bool = True) -> ActivationStats:
    """The sums of all folds together, those of outer products only with ``moments``; the folds themselves are left alone."""
    if len(folds) == 1:
        return folds[0]
    first = folds[0]
    both = ActivationStats(
        len(first.sq_sum),
        mean=first.total is not None,
        moments=moments and first.outer is not None,
        device=first.sq_sum.device,
    )
    for fold in folds:
        both.merge(fold)
    return both


def check_activations(
    found: Mapping[str, Sequence[ActivationStats]], index: int, *, way_out: str = "check the model"
) -> None:
    """Refuse statistics of activations that are NaN or infinite.

    Args:
        found: of each fold, by the name of the input.
        index: of the decoder layer, for the message.
        way_out: what to try besides float32.

    Raises:
        CalibrationError: naming the layer and the projections that read them.
    """
    for name, folds in found.items():
        if not all(stats.is_finite for stats in folds):
            raise CalibrationError(
                f"the activations in layer {index} are not finite (input of {', '.join(SHARED_INPUTS[name])}): the calibration "
                f"text or the weights overflow this dtype; try --dtype float32, or {way_out}"
            )
