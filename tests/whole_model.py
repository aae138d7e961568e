"""What the layer-by-layer backward pass is compared with: losses of the whole model at once, for autograd."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def loss_of(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Summed over all tokens that have a real predecessor."""
    logits = model(ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    targets = ids[:, 1:]
    if mask is not None:
        targets = targets.masked_fill((mask[:, 1:] * mask[:, :-1]) == 0, -100)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def divergence_of(model: Any, dense: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Kullback-Leibler divergence of the predictions from those of ``dense``, summed over all real tokens."""
    found = model(ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    with torch.no_grad():
        wanted = dense(ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    each = F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
    return (each if mask is None else each * mask).sum()
