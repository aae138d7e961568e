"""``LowRankLinear``: what a compressed ``nn.Linear`` becomes.

Checkpoint keys of a projection ``q_proj``::

    q_proj.right.weight   (rank, in_features)      shrink: x to rank
    q_proj.left.weight    (out_features, rank)     expand: rank to out
    q_proj.left.bias      (out_features,)          where the dense layer had one
    q_proj.weight         (1,)                     guard, see below

The two factors are ordinary ``nn.Linear`` children, so that adapters and quantizers find them by name and type.

The guard makes a host that does not know lorap fail: it looks for a ``q_proj.weight`` of shape (out, in), finds one of shape
(1,), and stops. Without it, transformers would start with random projections and only print a warning.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorap.factorization import factorize

# Value of the guard; the format's version is in config.json.
GUARD_VALUE = 1.0


class LowRankLinear(nn.Module):
    """y = x @ right.T @ left.T + bias, the drop-in for ``nn.Linear(in_features, out_features)``.

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the output.
        rank: inner size; the layer holds rank * (in_features + out_features) weights.
        bias: whether the layer adds a bias.
        device: where the parameters are created.
        dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.right = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.left = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", torch.full((1,), GUARD_VALUE, device=device, dtype=dtype))

    @property
    def bias(self) -> Tensor | None:
        """(out_features,) or None."""
        return self.left.bias

    @classmethod
    def from_factors(cls, left: Tensor, right: Tensor, bias: Tensor | None = None) -> LowRankLinear:
        """Wrap left (out_features, rank) and right (rank, in_features); the tensors are used, not copied."""
        (out_features, rank), in_features = left.shape, right.shape[1]
        module = cls(in_features, out_features, rank, bias=bias is not None, device="meta", dtype=left.dtype)
        module.left.weight = nn.Parameter(left)
        module.right.weight = nn.Parameter(right)
        if bias is not None:
            module.left.bias = nn.Parameter(bias)
        module.weight = torch.full((1,), GUARD_VALUE, device=left.device, dtype=left.dtype)
        return module

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int, metric: Tensor | None = None) -> LowRankLinear:
        """Factorize a dense layer; ``metric`` as in :func:`lorap.factorize`."""
        factors = factorize(linear.weight.data, rank, metric)
        return cls.from_factors(factors.left, factors.right, None if linear.bias is None else linear.bias.data)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        y: Tensor = self.left(self.right(x))
        return y

    def reconstruct(self) -> Tensor:
        """The dense weight (out_features, in_features) that this layer stands for."""
        return self.left.weight @ self.right.weight

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, bias={self.bias is not None}"
