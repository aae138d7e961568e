"""How many tokens a run reads, without reading one."""

from __future__ import annotations

from dataclasses import dataclass

from lorap.algorithms.step_schedule import schedule
from lorap.calibration.mixtures import Sources, split_by_weight, weighted_sources
from lorap.calibration.sources import OWN_SAMPLES
from lorap.compression.planning import SENSITIVITY_TOKENS
from lorap.compression.windows import EVALUATION_TOKENS
from lorap.config import CompressionConfig


@dataclass(frozen=True)
class Texts:
    """How much is read.

    Args:
        windows, seq_len: of calibration.
        own_windows: those of them that the model writes itself.
        evaluation_tokens: of all texts that the perplexity is measured on.
    """

    windows: int
    seq_len: int
    own_windows: int
    evaluation_tokens: int

    @classmethod
    def of(cls, config: CompressionConfig, calibration: Sources, *, evaluation_texts: int) -> Texts:
        """What a command line asks for.

        Args:
            config: how many windows, and how long.
            calibration: sources, with weights where they have any.
            evaluation_texts: how many texts there are to judge by.

        Raises:
            CalibrationError: the sources or their weights are no mixture.
        """
        windows, seq_len = config.num_calibration_samples, config.calibration_seq_len
        weighted = weighted_sources(calibration, own_samples=True)
        shares = split_by_weight(windows, [weight for _, weight in weighted])
        own = [isinstance(source, str) and source == OWN_SAMPLES for source, _ in weighted]
        return cls(
            windows=windows,
            seq_len=seq_len,
            own_windows=sum(share for share, is_own in zip(shares, own, strict=True) if is_own),
            evaluation_tokens=evaluation_texts * (EVALUATION_TOKENS // seq_len) * seq_len,
        )

    def step_tokens(self, steps: int) -> tuple[int, int]:
        """Correction steps that there will be, and the tokens of each; as many more judge them."""
        plan = schedule(self.windows, self.seq_len, steps)
        return plan.steps, -(-self.windows // plan.parts) * self.seq_len

    @property
    def tokens(self) -> int:
        """Of calibration."""
        return self.windows * self.seq_len

    @property
    def planning_tokens(self) -> int:
        """As :func:`lorap.compression.planning.spread_sample` takes them."""
        return min(self.windows, max(1, SENSITIVITY_TOKENS // self.seq_len)) * self.seq_len
