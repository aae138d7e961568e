"""How many correction steps there are, and how large they are, from the tokens that there are.

Signs of gradients are noise too often where tokens are few. One full step on 16 windows undid more than all the rest of the
recipe had gained (docs/recipes.md), so steps are smaller where they are few or short, and windows that neither they nor the
statistics have seen say whether they helped.
"""

from __future__ import annotations

from dataclasses import dataclass

# The first step moves an output by at most this share of what independent weights give; later ones by less, down to none. Gain of
# SmolLM2-135M on five other texts, in nats: 0.127, 0.136 and 0.136 at 0.024, 0.036 and 0.048 from sparsity 0.5, and 0.048, 0.049
# and 0.050 from 0.2. At 0.096 steps overshoot: 0.018 worse than none from 0.2.
RATE = 0.036
# Of steps that move scales: the share of itself that the first one moves a scale by.
SCALE_RATE = 0.008
# Measured with so many steps; the small ones at the end repair what the large ones at the beginning overshoot, so that fewer of
# them begin where these would end.
FULL_STEPS = 8
# Of a step. With few, signs are noise too often, and time grows with them: 8 steps of 1,024 tokens gained 0.125 nats where 8 of
# 2,048 gained 0.148; so many are between. More and smaller steps are no way out (docs/recipes.md).
STEP_TOKENS = 1536


@dataclass(frozen=True)
class Schedule:
    """How windows are divided among the steps.

    Args:
        asked: steps that are wanted.
        parts: of the windows, each with some of all sources, and of both folds where it can; at least one for each step.
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


def schedule(windows: int, seq_len: int, asked: int, *, rate: float | None = None) -> Schedule:
    """The steps that so many windows are enough for: of ``STEP_TOKENS`` each, or of all that there is.

    Args:
        windows: of calibration.
        seq_len: tokens of each.
        asked: steps that are wanted.
        rate: how far the first of ``FULL_STEPS`` moves; None for ``RATE``.
    """
    full = windows_of_a_step(seq_len)
    parts = max(1, windows // full)
    steps = min(asked, parts)
    first = (RATE if rate is None else rate) * min(1.0, steps / FULL_STEPS) * min(1.0, windows / parts / full) ** 0.5
    rates = tuple(first * (1 - step / steps) for step in range(steps))
    return Schedule(asked, parts, rates, asked * full)


def windows_of_a_step(seq_len: int) -> int:
    """How many windows have ``STEP_TOKENS``: at least two, so that there may be one of each fold."""
    return max(2, STEP_TOKENS // seq_len)
