"""A model after correction steps, as the pipeline takes them."""

from typing import Any

import torch
from torch import Tensor

from lorap.algorithms.step_schedule import RATE, schedule
from lorap.architectures import ARCHITECTURES, PROJECTIONS
from lorap.calibration import TokenWindows
from lorap.calibration.backward import BATCH_TOKENS
from lorap.calibration.stream import CalibrationStream
from lorap.compression.distillation import correct, step_windows

CPU = torch.device("cpu")


def corrected(
    model: Any, dense: Any, ids: Tensor, folds: Tensor, steps: int = 0, *, mask: Tensor | None = None, **more: Any
) -> Any:
    """``model`` after so many steps towards ``dense``, each on its part of the windows; or one full step on all of them."""
    architecture = ARCHITECTURES[model.config.model_type]
    layers, teachers = (list(architecture.decoder_layers(each)) for each in (model, dense))
    windows, plan = TokenWindows(ids, "tokens", "", mask), schedule(*ids.shape, steps)
    parts = list(step_windows(windows, folds, plan)) or [(windows, folds if len(folds.unique()) == 2 else None)]

    def streams(model: Any, layers: Any) -> list[CalibrationStream]:
        options = {"device": CPU, "batch_tokens": BATCH_TOKENS}
        return [CalibrationStream.from_model(model, layers, part, fold_of=halves, **options) for part, halves in parts]

    targets = streams(dense, teachers)
    for index, layer in enumerate(teachers):
        for target in targets:
            target.advance(index, layer)
    roles = more.pop("roles", PROJECTIONS)
    rates = plan.rates or (RATE,)
    correct(model, layers, streams(model, layers), targets, rates, architecture, roles, device=CPU, **more)
    return model
