"""Sums over calibration tokens, per input of a linear layer.

Everything is a sum plus a token count, in float64, never a running mean: batches, processes and resumed runs add up to the
same numbers. What the recipes want (norms, second moment, covariance) is derived at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorap import ops
from lorap.kernels import reference


class ActivationStats:
    """What is known about the inputs x of one linear layer.

    Args:
        features: number of input channels K.
        moments: also gather sum(x) and sum(x x^T), which costs a (K, K) float64 matrix and a matmul per batch.
        device: where the sums live.

    Attributes:
        tokens: how many tokens were counted; padding never is.
        sq_sum: (K,) float64, sum over tokens of x_j^2.
        total: (K,) float64, sum over tokens of x_j; only with ``moments``.
        outer: (K, K) float64, sum over tokens of x x^T; only with ``moments``.
    """

    def __init__(self, features: int, *, moments: bool = False, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self.sq_sum = torch.zeros(features, dtype=torch.float64, device=device)
        self.total = torch.zeros(features, dtype=torch.float64, device=device) if moments else None
        self.outer = torch.zeros(features, features, dtype=torch.float64, device=device) if moments else None

    @torch.no_grad()
    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add activations x of shape (..., K); where ``mask`` of shape (...) is False the token does not count."""
        sq_norm, tokens = ops.channel_sq_norm(x.detach(), mask)
        self.sq_sum += sq_norm
        # Without a mask the count is known, and a GPU need not be waited for.
        self.tokens += x.numel() // x.shape[-1] if mask is None else int(tokens)
        if self.outer is not None and self.total is not None:
            for chunk in reference.masked_chunks(x.detach(), mask, torch.float64):
                self.total += chunk.sum(0)
            self.outer += ops.second_moment(x.detach(), mask)[0]

    def merge(self, other: ActivationStats) -> None:
        """Add the sums of another process or batch."""
        self.tokens += other.tokens
        self.sq_sum += other.sq_sum
        if self.outer is not None and self.total is not None:
            if other.outer is None or other.total is None:
                raise ValueError("cannot merge statistics without moments into statistics with moments")
            self.total += other.total
            self.outer += other.outer

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
        """(K, K) float64, sum(x x^T) / tokens."""
        assert self.outer is not None, "gather with moments=True"
        return self.outer / max(self.tokens, 1)

    @property
    def covariance(self) -> Tensor:
        """(K, K) float64, the second moment around the mean."""
        assert self.total is not None, "gather with moments=True"
        mean = self.total / max(self.tokens, 1)
        return self.second_moment - torch.outer(mean, mean)
