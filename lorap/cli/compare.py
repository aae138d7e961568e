"""``lorap compare``: dense and compressed models in one table and one picture."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lorap.cli.common import AsJson, Debug, Device, Dtype, Quiet, be_quiet, exit_code, loading, user_errors
from lorap.errors import ConfigError
from lorap.evaluation.comparison.contender import DECODE, PREFILL, Contender
from lorap.evaluation.comparison.plot import check_plot, draw
from lorap.evaluation.tasks import TASKS, Estimate, open_source
from lorap.reports.run import markdown_table

if TYPE_CHECKING:
    from lorap.evaluation.comparison.compare import ComparisonOptions

# Ratios of one model that differ by more between rounds say little about it.
BUSY = 1.25


def compare_command(
    models: Annotated[
        list[str], typer.Argument(help="DENSE A B ...: folders, .gguf files or hub names; the first is compared with.")
    ],
    text: Annotated[
        Optional[list[str]],
        typer.Option(help="As for `lorap eval`; may be repeated.  [default: heldout, ships with lorap]"),
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.", min=2)] = 128,
    max_tokens: Annotated[Optional[int], typer.Option(help="Use the first N tokens of each text only.", min=2)] = None,
    tasks: Annotated[
        Optional[str], typer.Option(help=f"Zero-shot tasks too, with commas between them: {', '.join(TASKS)}, or all.")
    ] = None,
    limit: Annotated[Optional[int], typer.Option(help="Ask at most N questions of each task.", min=1)] = None,
    task_data: Annotated[str, typer.Option(help="Where questions come from, as for `lorap eval`.")] = "auto",
    prompt_tokens: Annotated[int, typer.Option(help="Read at once, for the prefill rate.", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(help="Decoded one by one, for the decode rate.", min=1)] = 32,
    rounds: Annotated[int, typer.Option(help="Of speed, each model once in each; medians are shown.", min=1)] = 3,
    optimize: Annotated[bool, typer.Option(help="Prepare models for speed as `lorap generate` does.")] = True,
    plot: Annotated[
        Optional[Path], typer.Option(help="Draw quality against size and against speed: a .png or .svg file.")
    ] = None,
    work: Annotated[
        Optional[Path], typer.Option(help="Keep measurements here; an interrupted comparison goes on from there.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Size, loss, tasks, speed and memory of DENSE and of what was made from it, side by side.

    \b
    Every model is measured in processes of its own. Speed is measured in rounds, all models in each, and "x" is the
    median of the ratios within a round. One model that fails loses its numbers; the others keep theirs, and the exit
    code is 1.

    \b
    Example:
      lorap compare ./dense ./small-0.2 ./small-0.5 --text wiki.txt --max-tokens 8192 --plot compared.svg
      lorap compare ./dense ./small --tasks piqa,boolq --limit 200 --work ./measurements
    """
    with user_errors(debug, as_json) as answer:
        be_quiet(quiet)
        if plot is not None:
            check_plot(plot)
        with loading():
            from lorap.calibration.sources import DEFAULT_EVALUATION
            from lorap.checkpoint.load import resolve_device
            from lorap.evaluation.comparison.compare import ComparisonOptions
        options = ComparisonOptions(
            texts=tuple(text or [DEFAULT_EVALUATION]),
            seq_len=seq_len,
            max_tokens=max_tokens,
            tasks=_task_names(models, tasks, task_data, limit),
            task_data=task_data,
            limit=limit,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            optimize=optimize,
            device=device,
            dtype=dtype,
        )
        resolve_device(device)
        found = _measure(models, options, work, quiet)
        typer.echo(render(found))
        if plot is not None and (missing := draw(found, plot)):
            typer.echo(f"not in {plot}, for want of numbers: {', '.join(missing)}", err=True)
        answer({"options": asdict(options), "models": [one.to_dict() for one in found]})
        if any(one.errors for one in found):
            raise typer.Exit(1)


def _task_names(models: Sequence[str], tasks: str | None, task_data: str, limit: int | None) -> tuple[str, ...]:
    """The tasks, after making sure that there are models and questions."""
    if tasks is None:
        if limit is not None or task_data != "auto":
            raise ConfigError("--limit and --task-data belong to --tasks, which is not given")
        return ()
    from lorap.evaluation.comparison.compare import find_contenders

    find_contenders(models)  # a model that cannot be opened is refused before the hub is asked for questions
    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    open_source(names, data=task_data, limit=limit)
    return names


def _measure(models: Sequence[str], options: ComparisonOptions, work: Path | None, quiet: bool) -> list[Contender]:
    from lorap.evaluation.comparison.compare import compare

    if work is not None:
        try:
            work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot use {work} for measurements: {error.strerror}") from None
    try:
        with nullcontext(work) if work is not None else tempfile.TemporaryDirectory() as folder:
            return compare(models, options=options, work=Path(folder), progress=not quiet)
    except KeyboardInterrupt as error:
        if work is None:
            raise
        typer.echo(f"lorap: interrupted; the same command goes on from what is in {work}", err=True)
        raise typer.Exit(exit_code(error)) from None


def render(contenders: Sequence[Contender]) -> str:
    """A Markdown table, and below it what was measured and what failed; "-" was not measured."""
    dense = contenders[0]
    texts = list(dict.fromkeys(one["text"] for contender in contenders for one in contender.texts))
    tasks = list(dict.fromkeys(task for contender in contenders for task in contender.tasks))
    header = ["model", "parameters", "on disk", "dtype", *(f"{text}: nats (perplexity)" for text in texts)]
    header += [name for task in tasks for name in (task, "over dense")]
    header += ["decode, tokens/s", "prefill, tokens/s", "peak memory"]
    rows = [[one.label, *_row(one, dense, texts, tasks)] for one in contenders]
    lines = [markdown_table(header, rows, padded=True), "", *_notes(contenders)]
    lines += [f"{one.label}, {part}: {error}" for one in contenders for part, error in one.errors.items()]
    return "\n".join(lines)


def _row(one: Contender, dense: Contender, texts: Sequence[str], tasks: Sequence[str]) -> list[str]:
    losses = {found["text"]: f"{found['nats']:.4f} ({found['perplexity']:.2f})" for found in one.texts}
    row = [_shown(one.params, "{:,}"), _megabytes(one.bytes), one.environment.get("dtype", "-")]
    row += [losses.get(text, "-") for text in texts]
    differences = one.task_differences(dense) if one is not dense else {}
    for task in tasks:
        row += [one.tasks[task].accuracy().percent() if task in one.tasks else "-", _difference(differences.get(task))]
    return [*row, _rate(one, dense, DECODE), _rate(one, dense, PREFILL), _megabytes(one.peak_bytes())]


def _rate(one: Contender, dense: Contender, name: str) -> str:
    rate, over = one.rate(name), one.rate_over(dense, name)
    return "-" if rate is None else f"{rate:,.1f}" + (f" ({over:.2f} x)" if over is not None else "")


def _difference(found: Estimate | None) -> str:
    return "-" if found is None else found.percent("+.1f")


def _megabytes(size: int | None) -> str:
    return _shown(size and size / 1e6, "{:,.1f} MB")


def _shown(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)


def _notes(contenders: Sequence[Contender]) -> list[str]:
    """What was read and asked, once for all models."""
    texts = next((one.texts for one in contenders if one.texts), [])
    notes = [f"{one['text']}: {one['tokens']:,} tokens in windows of {one['seq_len']}" for one in texts]
    tasks = next((one.tasks for one in contenders if one.tasks), {})
    notes += [
        f"{task}: accuracy is {result.metric}, percent ± standard error; {result.prompts}"
        for task, result in tasks.items()
    ]
    about = next((one.environment for one in contenders if one.environment), None)
    if about:
        rounds = max(len(one.speeds) for one in contenders)
        machine = f"{about['device']}, threads: {about['threads']}, torch {about['torch']}"
        notes.append(f"speed: one sequence, rounds: {rounds}, {machine}")
    for one in contenders[1:]:
        found = one.ratios(contenders[0], DECODE)
        if found and max(found) > BUSY * min(found):
            notes.append(
                f"speed: {one.label} decodes {min(found):.2f} to {max(found):.2f} x as fast as {contenders[0].label}, "
                "depending on the round; the machine is busy, so measure again when it is not"
            )
    return notes
