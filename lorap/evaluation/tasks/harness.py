"""lm-evaluation-harness, with a model in memory: its tasks, prompts and metrics, and our way of reading shared contexts once.

The harness is an extra (``pip install "lorap[eval]"``) and takes seconds to import, so it is imported where it is used.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorap.errors import TaskError
from lorap.evaluation.tasks.requests import TASKS
from lorap.evaluation.tasks.results import METRICS, TaskResult
from lorap.evaluation.tasks.scoring import encode_pair, fit, score
from lorap.evaluation.tasks.trees import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks of the harness whose data is there.

    Args:
        names: of the tasks.
        manager: the harness's ``TaskManager`` that knows them.
        metrics: the customary metric of each.
    """

    names: tuple[str, ...]
    manager: Any
    metrics: dict[str, str]


def load(names: Sequence[str], *, manager: Any = None, metrics: dict[str, str] | None = None) -> LoadedTasks:
    """Load tasks and their data.

    Args:
        names: tasks that the harness knows.
        manager: a ``TaskManager`` that knows more than the harness's own tasks.
        metrics: the customary metric of tasks that are not in ``lorap.evaluation.tasks.TASKS``.

    Raises:
        TaskError: the harness is not installed, or data cannot be had.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise TaskError('lm-evaluation-harness is not installed; `pip install "lorap[eval]"`')
    from lm_eval.tasks import TaskManager

    manager = manager or TaskManager()
    read = getattr(manager, "load", None) or manager.load_task_or_group
    for name in names:
        try:
            read([name])  # whatever fails in there: the network, the hub, a format that has changed
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "")
            raise TaskError(f"lm-evaluation-harness cannot load {name}: {type(error).__name__}: {reason}") from error
    known = {name: TASKS[name].metric for name in names if name in TASKS}
    return LoadedTasks(tuple(names), manager, known | (metrics or {}))


def run(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: LoadedTasks,
    *,
    limit: int | None = None,
    progress: bool = False,
    share: bool = True,
) -> dict[str, TaskResult]:
    """Answers of a model to tasks of the harness, without examples in the prompt.

    Args:
        model: in memory.
        tokenizer: of the model.
        tasks: from :func:`load`.
        limit: the first so many questions of each task.
        progress: show a bar.
        share: False leaves scoring to the harness, one choice at a time.

    Raises:
        TaskError: a question cannot be scored.
    """
    from lm_eval import simple_evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    host = _shared_context_model(progress) if share else _plain_model()
    found = simple_evaluate(
        model=host(pretrained=model, tokenizer=tokenizer, batch_size=1),
        tasks=list(tasks.names),
        num_fewshot=0,
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        task_manager=tasks.manager,
    )
    return {name: _result(name, found, tasks.metrics[name], limit) for name in tasks.names}


def _plain_model() -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM


def _shared_context_model(progress: bool) -> Any:
    """The harness's host of transformers models, but for how continuations are scored."""
    from lm_eval.models.huggingface import HFLM

    class SharedContextModel(HFLM):  # type: ignore[misc]
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            """(log-probability in nats, whether each token was the likeliest) of each request, in their order."""
            groups: dict[tuple[Any, Any], list[int]] = {}
            for index, request in enumerate(requests):
                groups.setdefault((request.task_name, request.doc_id), []).append(index)
            questions = [self._encode([requests[index].args for index in group]) for group in groups.values()]
            scores = score(self.model, questions, greedy=True, progress=progress and not disable_tqdm)
            found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
            for group, choices in zip(groups.values(), scores, strict=True):
                for index, choice in zip(group, choices, strict=True):
                    found[index] = (choice.log_probability, bool(choice.greedy))
            return found

        def _encode(self, pairs: Sequence[tuple[str, str]]) -> Encoded:
            both = [encode_pair(context, continuation, self.tokenizer) for context, continuation in pairs]
            encoded = Encoded(tuple(whole for _, whole in both), tuple(len(before) for before, _ in both))
            return fit(encoded, self.max_length)

    return SharedContextModel


def _result(name: str, found: dict[str, Any], metric: str, limit: int | None) -> TaskResult:
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    config = found["configs"][name]
    split = config.get("test_split") or config.get("validation_split") or "split not known"
    version = importlib.metadata.version("lm_eval")
    asked = f"{len(samples)} questions, {'all' if limit is None else 'the first'}"
    hashes = " ".join(sample["prompt_hash"] + sample["target_hash"] for sample in samples)
    return TaskResult(
        task=name,
        metric=metric,
        correct={one: tuple(sample[one] == 1 for sample in samples) for one in METRICS if one in samples[0]},
        prompts=f"lm-evaluation-harness {version}, version {found['versions'][name]}, no examples, {split} split, {asked}",
        identity=hashlib.sha256(hashes.encode()).hexdigest()[:16],
    )
