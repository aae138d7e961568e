"""Zero-shot multiple-choice tasks: questions from lm-evaluation-harness or from request files, one way to score them."""

from lorap.evaluation.tasks.requests import TASKS, check_tasks
from lorap.evaluation.tasks.results import Difference, Estimate, TaskResult, difference
from lorap.evaluation.tasks.sources import HarnessSource, RequestSource, open_source

__all__ = [
    "TASKS",
    "Difference",
    "Estimate",
    "HarnessSource",
    "RequestSource",
    "TaskResult",
    "check_tasks",
    "difference",
    "open_source",
]
