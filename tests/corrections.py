"""A model after correction steps, as the pipeline takes them."""

from typing import Any

import torch
from torch import Tensor

from lorap.algorithms.step_schedule import RATE, schedule
from lorap.architectures import ARCHITECTURES, PROJECTIONS
from lorap.calibration import TokenWindows
from lorap.calibration.backward import BATCH_TOKENS
from lorap.calibration.context import DecoderContext
from lorap.calibration.stream import CalibrationStream
from lorap.compression.correction import step_windows
from lorap.compression.distillation import distill

CPU = torch.device("cpu")


def corrected(
    model: Any, dense: Any, ids: Tensor, folds: Tensor, steps: int = 0, *, mask: Tensor | None = None, **more: Any
) -> Any:
    """``model`` after so many steps towards ``dense``, each on its part of the windows; or one full step on all of them."""
    architecture = ARCHITECTURES[model.config.model_type]
    student, teacher = (
        DecoderContext(each, architecture, tuple(architecture.decoder_layers(each)), CPU) for each in (model, dense)
    )
    windows, plan = TokenWindows(ids, "tokens", "", mask), schedule(*ids.shape, steps)
    parts = list(step_windows(windows, folds, plan)) or [(windows, folds if len(folds.unique()) == 2 else None)]

    def streams(context: DecoderContext) -> list[CalibrationStream]:
        return [
            CalibrationStream.from_windows(context, part, fold_of=halves, batch_tokens=BATCH_TOKENS)
            for part, halves in parts
        ]

    targets = streams(teacher)
    for index, layer in enumerate(teacher.layers):
        for target in targets:
            target.advance(index, layer)
    roles = more.pop("roles", PROJECTIONS)
    distill(student, streams(student), targets, plan.rates or (RATE,), roles, **more)
    return model
