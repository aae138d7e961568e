"""The loss of a language model, token by token: what perplexity, sensitivities and tuning are made of."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

# What ``cross_entropy`` passes over.
IGNORED = -100


def next_tokens(ids: Tensor, mask: Tensor | None) -> Tensor:
    """(windows, seq_len - 1) int64, what each position but the last is to predict; :data:`IGNORED` next to padding.

    Args:
        ids: (windows, seq_len) int64.
        mask: (windows, seq_len), 0 or False on padding, which is neither predicted nor predicted from; None for none.
    """
    targets = ids[:, 1:]
    if mask is None:
        return targets
    mask = mask.to(ids.device).bool()
    return targets.masked_fill(~(mask[:, 1:] & mask[:, :-1]), IGNORED)


def next_token_loss(logits: Tensor, targets: Tensor, *, reduction: str) -> Tensor:
    """Negative log-likelihood of the targets in nats: their sum, (), or one each, (windows, seq_len - 1).

    Args:
        logits: (windows, seq_len, vocab_size); the last position predicts nothing.
        targets: (windows, seq_len - 1), see :func:`next_tokens`; 0 where one is :data:`IGNORED`.
        reduction: ``sum`` or ``none``.
    """
    logits = logits[:, :-1].flatten(0, 1).float()
    losses = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction=reduction)
    return losses.view(targets.shape) if reduction == "none" else losses
