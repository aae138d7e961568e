"""Which calibration windows correct and which judge, and how large the correction steps are, from the tokens that there are.

Signs of gradients are noise too often where tokens are few. One full step on 16 windows undid more than all the rest of the
recipe had gained (docs/recipes.md), so steps are smaller where they are few or short, and some windows are kept from all of
them, to say whether they helped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lorap.calibration.windows import TokenWindows

# The first step moves an output by at most this share of what independent weights give; later ones by less, down to none. Gain of
# SmolLM2-135M on five other texts, in nats: 0.127, 0.136 and 0.136 at 0.024, 0.036 and 0.048 from sparsity 0.5, and 0.048, 0.049
# and 0.050 from 0.2. At 0.096 steps overshoot: 0.018 worse than none from 0.2.
RATE = 0.036
# Measured with so many steps; the small ones at the end repair what the large ones at the beginning overshoot, so that fewer of
# them begin where these would end.
FULL_STEPS = 8
# Of a step. With few, signs are noise too often, and time grows with them: 8 steps of 1,024 tokens gained 0.125 nats where 8 of
# 2,048 gained 0.148; so many are between. More and smaller steps are no way out (docs/recipes.md).
STEP_TOKENS = 1536


@dataclass(frozen=True)
class Schedule:
    """How windows are dealt out.

    Args:
        asked: steps that are wanted.
        parts: that the windows are dealt into, each with some of all sources, and of both folds where it can; one for each step,
            and the last to judge by.
        rates: how far each step moves; as many as there are windows for.
        enough: windows that would be enough for all steps.
    """

    asked: int
    parts: int
    rates: tuple[float, ...]
    enough: int

    @property
    def steps(self) -> int:
        """That there will be."""
        return len(self.rates)


def schedule(windows: int, seq_len: int, asked: int) -> Schedule:
    """The steps that so many windows are enough for: of ``STEP_TOKENS`` each, or half of what there is.

    A part has at least two windows where there are enough, so that there may be one of each fold. One window alone leaves nothing
    to judge by, so there is no step.
    """
    full = max(2, STEP_TOKENS // seq_len)
    parts = max(2, windows // full) if windows > 1 else 1
    steps = min(asked, parts - 1)
    first = RATE * min(1.0, steps / FULL_STEPS) * min(1.0, windows / parts / full) ** 0.5
    rates = tuple(first * (1 - step / steps) for step in range(steps))
    return Schedule(asked, parts, rates, (asked + 1) * full)


def shortage(windows: int, tried: int, asked: int, enough: int) -> list[str]:
    """One sentence where the windows are not enough for all steps, with the number that would be."""
    if tried == asked:
        return []
    does = "1 calibration window suffices" if windows == 1 else f"{windows} calibration windows suffice"
    return [f"few windows: {does} for {tried} of {asked} correction steps; {enough} would for all"]


def dealt(windows: TokenWindows, folds: Tensor, plan: Schedule) -> Iterator[tuple[TokenWindows, Tensor | None]]:
    """Windows of each step, none of them twice, and which of them form a second fold, if any do.

    Args:
        windows: those that are not needed are left out.
        folds: (windows,) bool, see :func:`lorap.calibration.windows.fold_of`.
        plan: for as many windows.
    """
    for step in range(plan.steps):
        yield _part(windows, folds, step * plan.parts // plan.steps, plan.parts)


def unseen(windows: TokenWindows, folds: Tensor, plan: Schedule) -> tuple[TokenWindows, Tensor | None]:
    """The part that no step has; arguments and result as of :func:`dealt`."""
    return _part(windows, folds, plan.parts - 1, plan.parts)


def _part(windows: TokenWindows, folds: Tensor, first: int, parts: int) -> tuple[TokenWindows, Tensor | None]:
    # Every so many-th window: each part has some of all sources, and of both folds where it can.
    rows = torch.argsort(folds.int(), stable=True)[first::parts]
    return windows.rows(rows), folds[rows] if len(folds[rows].unique()) == 2 else None
