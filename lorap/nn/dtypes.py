"""What transformers holds in float32 in a model of 16 bits, such as routers and the biases by which they choose experts."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def float32_names(model: PreTrainedModel, dtype: torch.dtype) -> frozenset[str]:
    """Tensors that ``from_pretrained(dtype=...)`` holds in float32, as the classes of ``model`` ask for.

    Args:
        model: of transformers, with or without weights.
        dtype: of all others.

    Returns:
        Their names in the state dict.
    """
    asked: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        asked |= {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    if dtype == torch.float16:
        asked |= {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    if not asked:
        return frozenset()
    pattern = re.compile("|".join(one.replace("*", ".*") for one in sorted(asked)))  # as transformers reads them
    return frozenset(name for name in model.state_dict() if pattern.search(name))
