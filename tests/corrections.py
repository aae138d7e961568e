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
    student, streams, targets, rates = step_streams(model, dense, ids, folds, steps, mask=mask)
    distill(student, streams, targets, rates or (RATE,), more.pop("roles", PROJECTIONS), **more)
    return model


def step_streams(
    model: Any, dense: Any, ids: Tensor, folds: Tensor, steps: int, *, mask: Tensor | None = None
) -> tuple[DecoderContext, list[CalibrationStream], list[CalibrationStream], tuple[float, ...]]:
    """What so many steps want: ``model``, the windows of each before its first layer and behind the last of ``dense``, rates."""
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
    return student, streams(student), targets, plan.rates
