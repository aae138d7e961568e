"""Zero-shot multiple-choice tasks: questions from lm-evaluation-harness or from request files, one way to score them."""

from lorap.tasks.requests import TASKS, check_tasks
from lorap.tasks.results import Difference, Estimate, TaskResult, difference
from lorap.tasks.sources import HarnessSource, RequestSource, open_source

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
