"""Random models that say something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.no_grad()
def random_model(make: Callable[[], Any]) -> Any:
    """What ``make`` gives, the same on every call. Fresh models have zero biases and weights of 0.02, under which every layer is
    close to the identity; these have not."""
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.15 if parameter.ndim == 2 else 0.3))
        if parameter.ndim == 1:
            parameter += 0.5
    return model
