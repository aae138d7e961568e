"""How adapters are trained, as one frozen object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Optional, get_args

from annotated_types import Interval

from lorap.architectures import ATTENTION, MLP, PROJECTIONS
from lorap.jsonio import Count, Size, check_fields

# Where a run works, in the work folder of its output.
RECOVERY = "recovery"
# Which projections can be tuned, by the names of the choice.
MODULES = {"all": PROJECTIONS, "attention": ATTENTION, "ffn": MLP}
# A state is written so often; what a kill costs at most.
SAVE_SECONDS = 60.0
# The learning rate rises over so many steps, or a tenth of them where that is less, and then falls to 0 in a straight line.
WARM_UP_STEPS = 8
Precision = Literal["auto", "float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class TuningConfig:
    """How adapters are trained.

    Args:
        steps: most steps of the optimizer.
        minutes: most minutes of training, in all runs together; None for no limit. Results then depend on the machine's speed.
        batch_size: token windows in each step.
        seq_len: tokens in each window.
        learning_rate: the highest of AdamW.
        rank: of the adapters; what is merged has the shapes of the model, whatever the rank.
        seed: of the adapters' first values, and the order of the windows.
        precision: of the matmuls: float32, or bfloat16 under autocast; auto: bfloat16 where the processor multiplies it.

    Raises:
        ConfigError: a value is out of range, or of another type.
    """

    steps: Size = 90
    minutes: Optional[Annotated[float, Interval(gt=0)]] = None
    batch_size: Size = 4
    seq_len: Annotated[int, Interval(ge=2, lt=2**63)] = 128
    learning_rate: Annotated[float, Interval(gt=0, lt=1)] = 2e-3
    rank: Size = 32
    seed: Count = 0
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def tokens_per_step(self) -> int:
        """Padding included."""
        return self.batch_size * self.seq_len

    def used_up(self, steps: int, seconds: float) -> float:
        """Share of the steps or the minutes, whichever is more; at 1 the training ends."""
        by_time = 0.0 if self.minutes is None else seconds / (60 * self.minutes)
        return max(steps / self.steps, by_time)

    def share_of_rate(self, step: int, seconds: float) -> float:
        """Of the highest learning rate, in the step after ``step`` others that took ``seconds``."""
        warm_up = max(1, min(WARM_UP_STEPS, self.steps // 10))
        return min(1.0, (step + 1) / warm_up) * max(0.0, 1 - self.used_up(step, seconds))
