"""Correction steps towards the dense model, of weights and later of scales, kept only if unseen windows agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorap.algorithms.step_schedule import SCALE_RATE, Schedule, schedule
from lorap.calibration.backward import BATCH_TOKENS as BACKWARD_BATCH
from lorap.calibration.context import DecoderContext
from lorap.calibration.stream import CalibrationStream
from lorap.calibration.windows import TokenWindows, fold_of
from lorap.compression.distillation import (
    WORTHWHILE,
    agree,
    corrected_linears,
    distill,
    divergences,
    rescale,
    rounded_linears,
)
from lorap.compression.store import CORRECTED, RESCALED, RunStore
from lorap.config import CompressionConfig
from lorap.evaluation.perplexity import BATCH_TOKENS as EVALUATION_BATCH
from lorap.evaluation.perplexity import evaluate_stream
from lorap.nn.low_rank_tensors import WEIGHT_SCALE
from lorap.reports.run import CorrectionReport
from lorap.requirements import compressed_roles

# How far along the way of the steps they may stay. SmolLM2-135M at sparsity 0.2, 1,536 tokens of each of four texts that were not
# calibrated on: half of the way is closest to the dense model (by 0.007 to 0.025 nats closer than its beginning, 0.007 to 0.017
# than its end), the loss falls to the end, and their sum is least at three quarters, on all four.
FRACTIONS = (0.25, 0.5, 0.75, 1.0)


@dataclass
class Correction:
    """The calibration windows once more, divided among the steps, and others, which nothing has seen, to judge by.

    Windows that the layers were compressed on cannot judge, for the fit to them is closer than to others: SmolLM2-135M at
    sparsity 0.2 diverged by 0.226 and 0.249 nats on such ones, by 0.255 and 0.270 on others.

    :attr:`targets` go through the dense layers while these are compressed one by one, and so does the first of :attr:`judges`;
    the second goes behind the compressed ones.

    Args:
        context: the model.
        config: what to do.
        windows: all that were calibrated on.
        held_out: others, to judge by; without any there are no steps.
    """

    # What finished steps are called, and what takes their time.
    stage: ClassVar[str] = CORRECTED
    timed_as: ClassVar[str] = "correct"
    # How far the first step moves; None as the schedule has it.
    rate: ClassVar[float | None] = None

    context: DecoderContext
    config: CompressionConfig
    windows: TokenWindows
    held_out: TokenWindows | None

    @property
    def asked(self) -> int:
        """Steps that are wanted."""
        return self.config.correction_steps

    @cached_property
    def plan(self) -> Schedule:
        """How many steps there are, how large, and how the windows are divided."""
        count, seq_len = self.windows.input_ids.shape
        return schedule(count, seq_len, self.asked if self.held_out else 0, rate=self.rate)

    @cached_property
    def targets(self) -> list[CalibrationStream]:
        """The windows of each step."""
        return list(self._step_streams())

    @cached_property
    def judges(self) -> list[CalibrationStream]:
        """The windows to judge by, behind the dense layers and behind the compressed ones; none where there is no step."""
        return [self._held_out_stream(), self._held_out_stream()] if self.plan.steps else []

    def run(self, store: RunStore) -> CorrectionReport:
        """Take the steps, and go back from where they end, as far as windows that nothing has seen say.

        An interrupted pass begins again, with the layers as they were before it.

        Raises:
            CalibrationError: a gradient is not finite.
        """
        plan = self.plan
        report = CorrectionReport(self.asked, plan.steps, windows=len(self.windows.input_ids), enough=plan.enough)
        return self._take_steps(report, store) if plan.steps else report

    def _take_steps(self, report: CorrectionReport, store: RunStore) -> CorrectionReport:
        context, plan = self.context, self.plan
        (dense, compressed), held_out = self.judges, self.held_out
        assert held_out is not None
        before = divergences(context, compressed, dense)
        store.snapshot(context.layers)

        def keep(step: int, index: int, layer: nn.Module) -> None:
            store.save_corrected(index, layer, stage=self.stage, is_last_step=step == plan.steps - 1)

        self._steps(keep)
        on_the_way = self._on_the_way(store)
        after = {fraction: divergences(context, stream, dense) for fraction, stream in on_the_way.items()}
        fraction = best_fraction(before, after, lambda at: evaluate_stream(context, on_the_way[at], held_out).nats)
        if not fraction:
            store.restore(context.layers)
        elif fraction < 1:
            self._go_back(fraction, store)
        store.drop_snapshot()
        chosen = after[fraction or 1.0]
        return replace(
            report,
            taken=plan.steps if fraction else 0,
            fraction=fraction,
            unseen_tokens=held_out.tokens,
            before=before,
            after=chosen if all(map(math.isfinite, chosen)) else (),
        )

    def _on_the_way(self, store: RunStore) -> dict[float, CalibrationStream]:
        """The windows to judge by, behind layers with weights at each of ``FRACTIONS`` of the way that the steps went.

        The last is the end of the way, so that the weights are left as they were.
        """
        context = self.context
        streams = [self._held_out_stream() for _ in FRACTIONS]
        for index in context.bar(range(len(context.layers)), desc="Judging the correction"):
            with context.on_device(index):
                start, end = self._ends(index, store)
                for fraction, stream in zip(FRACTIONS, streams, strict=True):
                    self._place(index, start, end, fraction)
                    stream.advance(index, context.layers[index])
        return dict(zip(FRACTIONS, streams, strict=True))

    def _go_back(self, fraction: float, store: RunStore) -> None:
        """All weights at a fraction of the way from where the steps began to where they ended."""
        for index, layer in enumerate(self.context.layers):
            with self.context.on_device(index):
                self._place(index, *self._ends(index, store), fraction)
                store.save_corrected(index, layer, stage=self.stage, is_last_step=True)

    def _ends(self, index: int, store: RunStore) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What moves in a layer, before the steps and behind them."""
        end = {name: weight.clone() for name, weight in self._moved(index).items()}
        stored = store.original(index)
        return {name: stored[name].to(weight) for name, weight in end.items()}, end

    def _place(self, index: int, start: dict[str, Tensor], end: dict[str, Tensor], fraction: float) -> None:
        for name, weight in self._moved(index).items():
            exact = torch.promote_types(weight.dtype, torch.float32)
            weight.copy_(torch.lerp(start[name].to(exact), end[name].to(exact), fraction))

    def _steps(self, keep: Callable[[int, int, nn.Module], None]) -> None:
        roles = compressed_roles(self.config)
        distill(self.context, self._step_streams(), self.targets, self.plan.rates, roles, keep=keep)

    def _moved(self, index: int) -> dict[str, Tensor]:
        """What the steps move in a layer, by its name there."""
        layer, roles = self.context.layers[index], compressed_roles(self.config)
        linears = corrected_linears(layer, self.context.architecture, roles)
        return {f"{name}.weight": linear.weight.data for name, linear in linears.items()}

    def _step_streams(self) -> Iterator[CalibrationStream]:
        for part, halves in step_windows(self.windows, fold_of(self.windows), self.plan):
            yield CalibrationStream.from_windows(self.context, part, fold_of=halves, batch_tokens=BACKWARD_BATCH)

    def _held_out_stream(self) -> CalibrationStream:
        assert self.held_out is not None
        halves = _if_two(fold_of(self.held_out))
        return CalibrationStream.from_windows(
            self.context, self.held_out, fold_of=halves, batch_tokens=EVALUATION_BATCH
        )


class Rescaling(Correction):
    """The same once the weights are rounded, of their scales alone.

    The second of :attr:`judges` goes behind the rounded layers.
    """

    stage = RESCALED
    timed_as = "rescale"
    rate = SCALE_RATE

    @property
    def asked(self) -> int:
        """Steps that are wanted."""
        return self.config.scale_steps

    def _steps(self, keep: Callable[[int, int, nn.Module], None]) -> None:
        rescale(self.context, self._step_streams(), self.targets, self.plan.rates, keep=keep)

    def _moved(self, index: int) -> dict[str, Tensor]:
        linears = rounded_linears(self.context.layers[index])
        return {f"{name}.{WEIGHT_SCALE}": linear.weight_scale for name, linear in linears.items()}


def best_fraction(
    before: Sequence[float], after: Mapping[float, Sequence[float]], loss: Callable[[float], float]
) -> float:
    """How far of the way of the steps: where divergence and loss together are least, of where each fold is closer than before.

    Nowhere, unless each fold gains ``WORTHWHILE`` somewhere on the way.

    Args:
        before: divergence from the dense model before the steps, in nats per token, for each fold of unseen windows.
        after: the same at each fraction of the way.
        loss: of the next tokens of these windows at a fraction of the way, in nats per token.

    Returns:
        A fraction; 0 where no fraction has both folds' agreement.
    """
    if not any(agree(before, found, WORTHWHILE) for found in after.values()):
        return 0.0
    agreed = {
        fraction: sum(found) / len(found) + loss(fraction) for fraction, found in after.items() if agree(before, found)
    }
    return min(agreed, key=lambda fraction: (agreed[fraction], -fraction), default=0.0)


def step_windows(windows: TokenWindows, folds: Tensor, plan: Schedule) -> Iterator[tuple[TokenWindows, Tensor | None]]:
    """Windows of each step, none of them twice, and which of them form a second fold, if any do.

    Args:
        windows: those that are not needed are left out.
        folds: (windows,) bool, see :func:`lorap.calibration.windows.fold_of`.
        plan: for as many windows.

    Returns:
        For each step its windows, and (windows,) bool which of them form a second fold; None where all are of one.
    """
    order = torch.argsort(folds.int(), stable=True)
    for step in range(plan.steps):
        # Every so many-th window: each part has some of all sources, and of both folds where it can.
        rows = order[step * plan.parts // plan.steps :: plan.parts]
        yield windows.rows(rows), _if_two(folds[rows])


def _if_two(folds: Tensor) -> Tensor | None:
    """The fold of each window; None where all are of one."""
    return folds if len(folds.unique()) == 2 else None
