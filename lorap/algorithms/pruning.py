"""FFN channel pruning without gradients (paper, section 3.4).

Channel c of a gated FFN is row c of gate and up and column c of down. Its importance adds the activation-weighted norms of
the three, and it goes as a whole, so the pruned FFN is an ordinary dense FFN that happens to be narrower.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Channels that are looked at at once in float64: a whole matrix of LLaMA-7B's FFN takes 0.4 GB there.
CHANNELS = 1024


def channel_importance(gate: Tensor, up: Tensor, down: Tensor, input_sq_norm: Tensor, inner_sq_norm: Tensor) -> Tensor:
    """||gate_c * s|| + ||up_c * s|| + ||down_:c|| t_c, where s and t are the norms of the FFN's input and inner channels.

    Args:
        gate: (intermediate_size, hidden_size).
        up: (intermediate_size, hidden_size).
        down: (hidden_size, intermediate_size).
        input_sq_norm: (hidden_size,), sum over tokens of the squared inputs of gate and up.
        inner_sq_norm: (intermediate_size,), the same for the inputs of down.

    Returns:
        (intermediate_size,) float64.
    """
    return sum(_weighted_norms(gate, up, down, input_sq_norm, inner_sq_norm).values())  # type: ignore[return-value]


def removed_shares(
    gate: Tensor, up: Tensor, down: Tensor, input_sq_norm: Tensor, inner_sq_norm: Tensor, kept: Tensor
) -> dict[str, float]:
    """Activation-weighted norm of what leaves each of the three matrices, relative to the whole.

    Args:
        gate: (intermediate_size, hidden_size).
        up: (intermediate_size, hidden_size).
        down: (hidden_size, intermediate_size).
        input_sq_norm: (hidden_size,), as for :func:`channel_importance`.
        inner_sq_norm: (intermediate_size,), likewise.
        kept: (kept,) int64, the channels that stay.

    Returns:
        A share in [0, 1] by role; 0 where the whole is 0.
    """
    keep = torch.zeros(gate.shape[0], dtype=torch.bool, device=gate.device)
    keep[kept] = True
    norms = _weighted_norms(gate, up, down, input_sq_norm, inner_sq_norm)
    return {role: _removed_share(norm, keep) for role, norm in norms.items()}


def _removed_share(norms: Tensor, keep: Tensor) -> float:
    total = norms.square().sum()
    return float((norms[~keep].square().sum() / total).sqrt()) if total > 0 else 0.0


def _weighted_norms(
    gate: Tensor, up: Tensor, down: Tensor, input_sq_norm: Tensor, inner_sq_norm: Tensor
) -> dict[str, Tensor]:
    """(intermediate_size,) float64 for each of the three matrices."""
    input_sq_norm, inner_sq_norm = input_sq_norm.double(), inner_sq_norm.double()

    def by_rows(weight: Tensor) -> Tensor:
        return torch.cat([part.double().square() @ input_sq_norm for part in weight.split(CHANNELS)]).sqrt()

    columns = torch.cat([part.double().norm(dim=0) for part in down.split(CHANNELS, dim=1)])
    return {"gate_proj": by_rows(gate), "up_proj": by_rows(up), "down_proj": columns * inner_sq_norm.sqrt()}
