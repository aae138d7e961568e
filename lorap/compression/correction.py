"""The stage after all layers are compressed: correction steps towards the dense model, kept only if unseen windows agree."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from lorap.algorithms.step_schedule import Schedule, schedule
from lorap.calibration.backward import BATCH_TOKENS as BACKWARD_BATCH
from lorap.calibration.context import DecoderContext
from lorap.calibration.stream import CalibrationStream
from lorap.calibration.windows import TokenWindows, fold_of
from lorap.compression.distillation import agree, distill, divergences
from lorap.compression.store import RunStore
from lorap.config import CompressionConfig
from lorap.evaluation.perplexity import BATCH_TOKENS as EVALUATION_BATCH
from lorap.reports.run import CorrectionReport
from lorap.requirements import compressed_roles


@dataclass
class Correction:
    """The calibration windows once more, divided among the steps; some are kept from all of them, to judge by.

    :attr:`targets` go through the dense layers while these are compressed one by one, and so does the first of :attr:`judges`;
    the second goes behind the compressed ones.

    Args:
        context: the model.
        config: what to do.
        windows: all that were calibrated on.
    """

    context: DecoderContext
    config: CompressionConfig
    windows: TokenWindows

    @cached_property
    def plan(self) -> Schedule:
        """How many steps there are, how large, and how the windows are divided."""
        count, seq_len = self.windows.input_ids.shape
        return schedule(count, seq_len, self.config.correction_steps)

    @cached_property
    def targets(self) -> list[CalibrationStream]:
        """The windows of each step."""
        return list(self._step_streams())

    @cached_property
    def judges(self) -> list[CalibrationStream]:
        """Windows that no step has, behind the dense layers and behind the compressed ones; none where there is no step."""
        return [self._held_out_stream(), self._held_out_stream()] if self.plan.steps else []

    def run(self, store: RunStore) -> CorrectionReport:
        """Take the steps, and undo them where the windows that none of them has seen disagree.

        An interrupted pass begins again, with the layers as they were before it.

        Raises:
            CalibrationError: a gradient is not finite.
        """
        plan = self.plan
        report = CorrectionReport(plan.asked, plan.steps, windows=len(self.windows.input_ids), enough=plan.enough)
        return self._take_steps(report, store) if plan.steps else report

    def _take_steps(self, report: CorrectionReport, store: RunStore) -> CorrectionReport:
        context, plan = self.context, self.plan
        dense, compressed = self.judges
        before = divergences(context, compressed, dense)
        store.snapshot(context.layers)

        def keep(step: int, index: int, layer: nn.Module) -> None:
            store.save_corrected(index, layer, is_last_step=step == plan.steps - 1)

        distill(context, self._step_streams(), self.targets, plan.rates, compressed_roles(self.config), keep=keep)
        corrected = self._held_out_stream()
        for index in context.bar(range(len(context.layers)), desc="Judging the correction"):
            with context.on_device(index):
                corrected.advance(index, context.layers[index])
        after = divergences(context, corrected, dense)
        taken = plan.steps if agree(before, after) else 0
        if taken:
            store.drop_snapshot()
        else:
            store.restore(context.layers)
        finite = after if all(map(math.isfinite, after)) else ()
        tokens = int(held_out_windows(self.windows, fold_of(self.windows), plan)[0].tokens)
        return replace(report, taken=taken, unseen_tokens=tokens, before=before, after=finite)

    def _step_streams(self) -> Iterator[CalibrationStream]:
        for part, halves in step_windows(self.windows, fold_of(self.windows), self.plan):
            yield CalibrationStream.from_windows(self.context, part, fold_of=halves, batch_tokens=BACKWARD_BATCH)

    def _held_out_stream(self) -> CalibrationStream:
        part, halves = held_out_windows(self.windows, fold_of(self.windows), self.plan)
        return CalibrationStream.from_windows(self.context, part, fold_of=halves, batch_tokens=EVALUATION_BATCH)


def step_windows(windows: TokenWindows, folds: Tensor, plan: Schedule) -> Iterator[tuple[TokenWindows, Tensor | None]]:
    """Windows of each step, none of them twice, and which of them form a second fold, if any do.

    Args:
        windows: those that are not needed are left out.
        folds: (windows,) bool, see :func:`lorap.calibration.windows.fold_of`.
        plan: for as many windows.

    Returns:
        For each step its windows, and (windows,) bool which of them form a second fold; None where all are of one.
    """
    for step in range(plan.steps):
        yield _part(windows, folds, step * plan.parts // plan.steps, plan.parts)


def held_out_windows(windows: TokenWindows, folds: Tensor, plan: Schedule) -> tuple[TokenWindows, Tensor | None]:
    """The part that no step has.

    Args:
        windows: as for :func:`step_windows`.
        folds: (windows,) bool, likewise.
        plan: for as many windows.

    Returns:
        Its windows, and (windows,) bool which of them form a second fold; None where all are of one.
    """
    return _part(windows, folds, plan.parts - 1, plan.parts)


def _part(windows: TokenWindows, folds: Tensor, first: int, parts: int) -> tuple[TokenWindows, Tensor | None]:
    # Every so many-th window: each part has some of all sources, and of both folds where it can.
    rows = torch.argsort(folds.int(), stable=True)[first::parts]
    return windows.rows(rows), folds[rows] if len(folds[rows].unique()) == 2 else None
