"""``lorap eval`` of texts: perplexity, and how much better or worse than another model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import typer

from lorap.calibration.windows import consecutive_windows
from lorap.checkpoint.load import ModelSource, find_model
from lorap.cli.models import open_model
from lorap.evaluation.info import report_beside
from lorap.evaluation.perplexity import WindowLosses, evaluate_windows, paired_difference
from lorap.evaluation.tasks import Estimate
from lorap.nn.linear import embedding_weight
from lorap.reports.records import Evaluation


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
