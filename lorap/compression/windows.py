"""From texts to the windows of a run: those to calibrate on, and those to judge by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lorap.algorithms.step_schedule import windows_of_a_step
from lorap.calibration.context import DecoderContext
from lorap.calibration.mixtures import Sources
from lorap.calibration.self_text import sample_windows
from lorap.calibration.sources import Source
from lorap.calibration.windows import Sampler, TokenWindows, consecutive_windows, draw_with_spare, set_aside
from lorap.checkpoint.paging import in_memory_throughout
from lorap.config import CompressionConfig
from lorap.system import Stopwatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens of each evaluation text when compress() measures before and after; `lorap eval` has no such limit.
EVALUATION_TOKENS = 4096
# Where a source has no windows to spare, judges are taken from those to calibrate on, at most one of so many.
FEWEST_PARTS = 5


@dataclass(frozen=True)
class RunWindows:
    """All windows of a run.

    Args:
        calibration: what statistics and correction steps see.
        judges: what neither sees, and whether the steps are kept is judged by; None where none are wanted, or none are left.
        texts: of each text to judge the model by.
    """

    calibration: TokenWindows
    judges: TokenWindows | None
    texts: list[TokenWindows]


def read_windows(
    context: DecoderContext,
    tokenizer: PreTrainedTokenizerBase | None,
    config: CompressionConfig,
    calibration: Sources,
    evaluation: Sequence[Source],
    watch: Stopwatch,
    *,
    sampler: Sampler | None = None,
) -> RunWindows:
    """All windows of a run; all processes get those of the main one.

    Args:
        context: the dense model, which writes the samples of the source ``self``.
        tokenizer: for texts.
        config: how many windows, how long, and the seed.
        calibration: as for :func:`lorap.compress`.
        evaluation: as for :func:`lorap.compress`.
        watch: takes the time of ``tokenize`` and ``sample``.
        sampler: writes the source ``self``; None for the model.

    Raises:
        CalibrationError: a source cannot be used.
    """
    model, seq_len = context.model, config.calibration_seq_len
    vocab_size = context.vocab_size

    def written(count: int, seq_len: int, seed: int) -> Tensor:
        shows = context.progress and context.processes.is_main_process
        with watch("sample"), in_memory_throughout(model, context.layers):
            return sample_windows(model, tokenizer, count, seq_len, seed=seed, progress=shows)

    judging = windows_of_a_step(seq_len) if config.corrects or config.rescales else 0
    with watch("tokenize"):
        drawn, spare = draw_with_spare(
            calibration,
            tokenizer,
            num_samples=config.num_calibration_samples,
            num_spare=judging,
            seq_len=seq_len,
            seed=config.seed,
            vocab_size=vocab_size,
            sampler=sampler or written,
        )
        texts = [
            consecutive_windows(text, tokenizer, seq_len=seq_len, max_tokens=EVALUATION_TOKENS, vocab_size=vocab_size)
            for text in evaluation
        ]
    return context.processes.broadcast(RunWindows(*_with_judges(drawn, spare, judging), texts))


def _with_judges(
    drawn: TokenWindows, spare: TokenWindows | None, count: int
) -> tuple[TokenWindows, TokenWindows | None]:
    """Windows to calibrate on, and ``count`` others, or None where there are too few."""
    if count and (spare is None or 2 * len(spare.input_ids) < count):
        return set_aside(drawn, count) if len(drawn.input_ids) >= FEWEST_PARTS * count else (drawn, None)
    return drawn, spare
