"""From answers to accuracies, and from two models' answers to a difference with its interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lorap.errors import TaskError

METRICS = ("acc", "acc_norm")
CONFIDENCE = 0.95
# Standard errors on each side of the mean: 1.96.
REACH = statistics.NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


class Estimate(NamedTuple):
    """A mean over questions and its standard error, from the questions' own spread; NaN where there is but one."""

    mean: float
    error: float

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval, as the normal distribution has it."""
        return self.mean - REACH * self.error, self.mean + REACH * self.error

    def percent(self, form: str = ".1f") -> str:
        """Mean ± standard error, for people; one value alone has no error."""
        mean = f"{100 * self.mean:{form}}"
        return mean if math.isnan(self.error) else f"{mean} ± {100 * self.error:.1f}"


@dataclass(frozen=True)
class TaskResult:
    """One model's answers to one task.

    Args:
        task: its name.
        metric: the customary one of ``acc`` and ``acc_norm``.
        correct: by metric, whether each question was answered right.
        prompts: which prompts, split and questions, for people.
        identity: a hash of the questions; answers are compared only where it is the same.
        truncated: questions whose beginning was left out, because the model reads no more at once.
    """

    task: str
    metric: str
    correct: Mapping[str, tuple[bool, ...]]
    prompts: str
    identity: str
    truncated: int = 0

    @property
    def questions(self) -> int:
        """How many were asked."""
        return len(self.correct[self.metric])

    def accuracy(self, metric: str | None = None) -> Estimate:
        """Share of right answers; by the customary metric unless told otherwise."""
        return estimate(self.correct[metric or self.metric])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        found: dict[str, Any] = {"questions": self.questions, "metric": self.metric}
        for metric in self.correct:
            value = self.accuracy(metric)
            found |= {metric: value.mean, f"{metric}_stderr": number(value.error)}
        answers = "".join("01"[right] for right in self.correct[self.metric])
        about = {"prompts": self.prompts, "identity": self.identity, "truncated": self.truncated}
        return found | about | {"correct": answers}


@dataclass(frozen=True)
class Difference:
    """One model's accuracy minus another's, on the same questions.

    Args:
        estimate: mean and standard error of the differences question by question, each -1, 0 or 1.
        gained: questions that only the first model answers right.
        lost: questions that only the second does.
    """

    estimate: Estimate
    gained: int
    lost: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        low, high = map(number, self.estimate.interval)
        found = {"mean": self.estimate.mean, "stderr": number(self.estimate.error), "low": low, "high": high}
        return found | {"gained": self.gained, "lost": self.lost}


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, and its standard error as the sample's own spread has it."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(statistics.fmean(values), error)


def average(found: Sequence[Estimate]) -> Estimate:
    """Mean of independent estimates, each counting the same."""
    return Estimate(statistics.fmean(one.mean for one in found), math.hypot(*(one.error for one in found)) / len(found))


def difference(result: TaskResult, baseline: TaskResult) -> Difference:
    """Accuracy over the baseline's, by the customary metric.

    Raises:
        TaskError: the two were not asked the same.
    """
    same = (result.task, result.metric, result.identity, result.questions)
    if same != (baseline.task, baseline.metric, baseline.identity, baseline.questions):
        raise TaskError(
            f"answers to {result.task} ({result.questions} questions, {result.prompts}) cannot be compared with answers to "
            f"{baseline.task} ({baseline.questions} questions, {baseline.prompts}): they are not the same questions"
        )
    pairs = zip(result.correct[result.metric], baseline.correct[result.metric], strict=True)
    return paired([int(ours) - int(theirs) for ours, theirs in pairs])


def paired(differences: Sequence[int]) -> Difference:
    """From the difference at each question: 1 gained, -1 lost, 0 neither."""
    return Difference(estimate(differences), differences.count(1), differences.count(-1))


def number(value: float) -> float | None:
    """For JSON, which knows no NaN."""
    return value if math.isfinite(value) else None
