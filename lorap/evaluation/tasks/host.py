"""What lm-evaluation-harness is given: a model in memory, and tasks whose questions are rows. Every score is the harness's.

Importing this module imports the harness, which takes seconds: it is done where questions are asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

from lorap.errors import TaskError
from lorap.evaluation.tasks.results import METRICS

# Texts that are read together, where their logits are no more than that: the harness holds those of every token, two or three
# times. A CPU is hardly faster with more.
TEXTS = {"cpu": 8, "cuda": 64}
LOGITS = {"cpu": 2**27, "cuda": 2**28}


class RequestTask(ConfigurableTask):  # type: ignore[misc]
    """A multiple-choice task whose choices each have a context and a continuation of their own.

    Args:
        name: of the task.
        rows: of each question ``contexts`` and ``continuations``, one for each choice, ``choices``, whose characters count in
            acc_norm, and ``label``, the index of the right one.
    """

    def __init__(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        config = {
            "task": name,
            "custom_dataset": lambda **_: {"requests": Dataset.from_list([dict(row) for row in rows])},
            "test_split": "requests",
            "output_type": "multiple_choice",
            "doc_to_text": "",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS],
        }
        super().__init__(config=config)

    def construct_requests(self, doc: Mapping[str, Any], ctx: str, **about: Any) -> list[Instance]:
        """One for each choice, as the row has it."""
        pairs = zip(doc["contexts"], doc["continuations"], strict=True)
        metadata = about["metadata"]
        return [Instance("loglikelihood", doc, pair, index, metadata) for index, pair in enumerate(pairs)]


class Host(HFLM):  # type: ignore[misc]
    """The harness's host of transformers models, for one in memory.

    Args:
        model: any causal language model of transformers.
        tokenizer: of the model; may be given a padding token.

    Raises:
        TaskError: the harness cannot use the tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        # The harness ties embeddings and head anew, by the config alone: a model that has them apart would become another.
        model.tie_weights = lambda: None
        first = next((one for one in (tokenizer.bos_token_id, tokenizer.eos_token_id) if one is not None), 0)
        try:
            # The dtype of the softmax is else the model's: bfloat16 has three digits, and choices would tie.
            super().__init__(
                model, "causal", tokenizer=tokenizer, batch_size="auto", softmax_dtype="float32", prefix_token_id=first
            )
        except AssertionError as error:
            raise TaskError(
                f"lm-evaluation-harness takes tokenizers of transformers, and no {type(tokenizer).__name__}"
            ) from error
        finally:
            del model.tie_weights
        self._asked: list[Instance] = []
        self.truncated: set[tuple[str, int]] = set()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether each token was the likeliest) of each request, in their order.

        Raises:
            TaskError: one cannot be scored, or is not finite.
        """
        self._asked = requests
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        for request, (log_probability, _) in zip(requests, found, strict=True):
            if not math.isfinite(log_probability):
                raise TaskError(
                    f"{_name(request)}: the log-probability of {request.args[1]!r} is {log_probability}: the model's weights "
                    "or its dtype overflow"
                )
        return found

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        most = self.max_length
        for asked, (_, before, after) in zip(self._asked, requests, strict=True):
            if not before or not after:
                raise TaskError(f"{_name(asked)}: {asked.args[1]!r} adds no token to {asked.args[0][-40:]!r}")
            if len(after) > most:
                raise TaskError(f"{_name(asked)}: a choice has {len(after)} tokens; the model reads {most} at once")
            if len(before) + len(after) > most + 1:
                self.truncated.add((asked.task_name, asked.doc_id))
        # Choices with the same tokens before their last share one reading, which the harness gets wrong where the same tokens
        # are split at different places.
        splits: dict[tuple[int, ...], int] = {}
        self.logits_cache = all(
            splits.setdefault((*before, *after[:-1]), len(before)) == len(before) for _, before, after in requests
        )
        longest = max(len(before) + len(after) for _, before, after in requests)
        kind = "cpu" if self.device.type == "cpu" else "cuda"
        size = min(TEXTS[kind], max(1, LOGITS[kind] // (min(longest, most) * self.vocab_size)))
        found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, size)
        return found


def _name(request: Instance) -> str:
    """Of the question, as its file or its task numbers it."""
    return f"{request.task_name}, question {request.doc.get('doc_id', request.doc_id)}"
