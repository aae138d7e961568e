"""What a comparison knows of one model."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorap.evaluation.tasks import Estimate, TaskResult, difference

if TYPE_CHECKING:
    from lorap.checkpoint.find import ModelSource

DECODE, PREFILL = "decode_tokens_per_second", "prefill_tokens_per_second"


@dataclass
class Contender:
    """One model, and what is known of it.

    Args:
        label: unique among the contenders.
        model: as on the command line.
        source: where it is.
        params: stored parameters; None where they could not be counted.
        bytes: of its weights on disk.
        texts: one entry per text, the fields of :class:`lorap.Evaluation`.
        tasks: answers by task.
        speeds: one entry per round, with both rates and peak memory; None for a round that failed.
        environment: versions, device, dtype and threads.
        errors: what went wrong, by part.
    """

    label: str
    model: str
    source: ModelSource
    params: int | None = None
    bytes: int | None = None
    texts: list[dict[str, Any]] = field(default_factory=list)
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    speeds: list[dict[str, Any] | None] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def nats(self) -> float | None:
        """Mean over texts."""
        return statistics.fmean(one["nats"] for one in self.texts) if self.texts else None

    def rate(self, name: str) -> float | None:
        """Median over rounds of ``DECODE`` or ``PREFILL``, in tokens per second."""
        found = [one[name] for one in self.speeds if one]
        return statistics.median(found) if found else None

    def rate_range(self, name: str) -> tuple[float, float] | None:
        """Least and most over rounds."""
        found = [one[name] for one in self.speeds if one]
        return (min(found), max(found)) if found else None

    def ratios(self, other: Contender, name: str) -> list[float]:
        """The rate over that of ``other``, of each round in which both have one."""
        pairs = zip(self.speeds, other.speeds, strict=True)
        return [ours[name] / theirs[name] for ours, theirs in pairs if ours and theirs]

    def rate_over(self, other: Contender, name: str) -> float | None:
        """Median of the ratios."""
        found = self.ratios(other, name)
        return statistics.median(found) if found else None

    def peak_bytes(self) -> int | None:
        """Most memory that opening and generating took: of the GPU where there is one, else of the process."""
        found = [one["peak_device_bytes"] or one["peak_bytes"] for one in self.speeds if one]
        return max(found) if found else None

    def task_differences(self, other: Contender) -> dict[str, Estimate]:
        """Accuracy minus that of ``other``, paired, for the tasks that both answered."""
        both = [task for task in self.tasks if task in other.tasks]
        return {task: difference(self.tasks[task], other.tasks[task]).estimate for task in both}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rates = {name: self.rate(name) for name in (DECODE, PREFILL)}
        plain = {name: getattr(self, name) for name in ("params", "bytes", "texts", "speeds", "environment", "errors")}
        tasks = {task: result.to_dict() for task, result in self.tasks.items()}
        return {
            "label": self.label,
            "model": self.source.name,
            **plain,
            "tasks": tasks,
            **rates,
            "peak_bytes": self.peak_bytes(),
        }
