"""A model after correction steps, as the pipeline takes them."""

from typing import Any

import torch
from torch import Tensor

from lorap.architectures import ARCHITECTURES, PROJECTIONS
from lorap.calibration import TokenWindows
from lorap.calibration.backward import BATCH_TOKENS
from lorap.calibration.stream import CalibrationStream
from lorap.correction import correct, dealt

CPU = torch.device("cpu")


def corrected(
    model: Any, dense: Any, ids: Tensor, folds: Tensor, steps: int = 1, *, mask: Tensor | None = None, **more: Any
) -> Any:
    """``model`` after so many steps towards ``dense``."""
    architecture = ARCHITECTURES[model.config.model_type]
    layers, teachers = (list(architecture.decoder_layers(each)) for each in (model, dense))
    parts = list(dealt(TokenWindows(ids, "tokens", "", mask), folds, steps))

    def streams(model: Any, layers: Any) -> list[CalibrationStream]:
        options = {"device": CPU, "batch_tokens": BATCH_TOKENS}
        return [CalibrationStream.from_model(model, layers, part, fold_of=halves, **options) for part, halves in parts]

    targets = streams(dense, teachers)
    for index, layer in enumerate(teachers):
        for target in targets:
            target.advance(index, layer)
    roles = more.pop("roles", PROJECTIONS)
    correct(model, layers, streams(model, layers), targets, architecture, roles, device=CPU, **more)
    return model
