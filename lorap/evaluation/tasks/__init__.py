"""Zero-shot multiple-choice tasks: questions from the hub or from request files, scored by lm-evaluation-harness."""

from lorap.evaluation.tasks.requests import TASKS, check_tasks
from lorap.evaluation.tasks.results import Difference, Estimate, TaskResult, difference
from lorap.evaluation.tasks.sources import TaskSource, open_source

__all__ = [
    "TASKS",
    "Difference",
    "Estimate",
    "TaskResult",
    "TaskSource",
    "check_tasks",
    "difference",
    "open_source",
]
