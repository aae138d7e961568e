"""``lorap eval --tasks``: zero-shot tasks, and what a model gained and lost against another."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import typer

from lorap.checkpoint.load import ModelSource, find_model
from lorap.cli.models import open_model
from lorap.errors import ConfigError
from lorap.evaluation.tasks import Estimate, TaskResult, TaskSource, difference, open_source
from lorap.evaluation.tasks.results import Difference, average, number
from lorap.reports.run import markdown_table


@dataclass(frozen=True)
class TaskOptions:
    """What the command line says besides the models."""

    tasks: Sequence[str]
    data: str
    limit: int | None
    device: str
    dtype: str
    progress: bool


def evaluate_tasks(model: str, baseline: str | None, options: TaskOptions) -> dict[str, Any]:
    """Ask one model, then the other, print a table, and return everything for ``--json``."""
    names = [name.strip() for name in options.tasks if name.strip()]
    where, other_where = find_model(model), None if baseline is None else find_model(baseline)
    source = open_source(names, data=options.data, limit=options.limit)
    name, found, seconds = _ask(where, source, options)
    results: dict[str, Any] = {task: result.to_dict() for task, result in found.items()}
    told: dict[str, Any] = {"model": name, "tasks": results, "seconds": seconds}
    told["average"] = _mean([result.accuracy() for result in found.values()])
    differences = None
    if other_where is not None:
        other_name, other, told["baseline_seconds"] = _ask(other_where, source, options)
        told["baseline"] = other_name
        differences = {task: difference(found[task], other[task]) for task in found}
        for task, one in differences.items():
            results[task] |= {"baseline": other[task].to_dict(), "difference": one.to_dict()}
        told["average_difference"] = _mean([one.estimate for one in differences.values()])
        typer.echo(f"{name} against {other_name}, accuracies in percent with their standard errors\n")
    else:
        other = None
        typer.echo(f"{name}, accuracies in percent with their standard errors\n")
    typer.echo(render(found, other, differences))
    return told


def _ask(model: ModelSource, source: TaskSource, options: TaskOptions) -> tuple[str, dict[str, TaskResult], float]:
    """One model at a time is in memory."""
    loaded, tokenizer, _ = open_model(model, options.device, options.dtype)
    if tokenizer is None:
        raise ConfigError(f"{model.name} has no tokenizer, so it cannot read questions")
    start = time.perf_counter()
    found = source.run(loaded, tokenizer, progress=options.progress)
    seconds = round(time.perf_counter() - start, 3)
    del loaded
    gc.collect()
    return model.name, found, seconds


def render(
    found: Mapping[str, TaskResult],
    other: Mapping[str, TaskResult] | None = None,
    differences: Mapping[str, Difference] | None = None,
) -> str:
    """A Markdown table, and below it what was asked."""
    header = ["task", "questions", "acc", "acc_norm", "accuracy"]
    if other is not None:
        header += ["baseline", "difference", "95 % interval", "gained", "lost"]
    rows = []
    for task, result in found.items():
        shown = [result.accuracy(one).percent() if one in result.correct else "-" for one in ("acc", "acc_norm")]
        row = [task, str(result.questions), *shown, result.accuracy().percent()]
        if other is not None and differences is not None:
            row += [other[task].accuracy().percent(), *_difference(differences[task].estimate)]
            row += [str(differences[task].gained), str(differences[task].lost)]
        rows.append(row)
    if len(found) > 1:
        row = ["average", "", "", "", average([result.accuracy() for result in found.values()]).percent()]
        if other is not None and differences is not None:
            row.append(average([result.accuracy() for result in other.values()]).percent())
            row += [*_difference(average([one.estimate for one in differences.values()])), "", ""]
        rows.append(row)
    lines = [markdown_table(header, rows, padded=True), ""]
    lines += [f"{task}: accuracy is {result.metric}; {result.prompts}{_cut(result)}" for task, result in found.items()]
    return "\n".join(lines)


def _cut(result: TaskResult) -> str:
    return f"; {result.truncated} without their beginning, longer than the model reads" if result.truncated else ""


def _difference(found: Estimate) -> list[str]:
    low, high = found.interval
    return [found.percent("+.1f"), f"{100 * low:+.1f} to {100 * high:+.1f}"]


def _mean(found: Sequence[Estimate]) -> dict[str, Any]:
    value = average(found)
    low, high = map(number, value.interval)
    return {"mean": value.mean, "stderr": number(value.error), "low": low, "high": high}
