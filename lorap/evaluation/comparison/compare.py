"""Dense and compressed models side by side: size, quality, speed, memory.

Everything but sizes is measured by lorap.evaluation.comparison.worker, in a process of its own per model and part. Speed is
measured in rounds, each model once in every round, so that a machine that slows down slows all of them; ratios are taken
within a round.
Every process leaves a cell, one JSON file, and cells that are there are not measured again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lorap.calibration.mixtures import check_sources
from lorap.calibration.sources import DEFAULT_EVALUATION
from lorap.calibration.windows import consecutive_windows
from lorap.checkpoint.load import dtype_name, find_model, load_tokenizer
from lorap.errors import ConfigError, LoRAPError
from lorap.evaluation.comparison.cells import Cells
from lorap.evaluation.comparison.contender import Contender
from lorap.evaluation.comparison.worker import SPEED, TASKS, TEXTS
from lorap.evaluation.info import describe_model
from lorap.evaluation.tasks import TaskResult


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions:
    """What to measure.

    Args:
        texts: as for ``lorap eval``.
        seq_len: tokens per window.
        max_tokens: the first so many tokens of each text; None for all.
        tasks: zero-shot tasks; none by default.
        task_data: where questions come from, as for ``lorap eval``.
        limit: most questions of a task.
        prompt_tokens: read at once, for the prefill rate.
        new_tokens: decoded one by one, for the decode rate.
        rounds: of speed; medians are over these.
        optimize: merge projections and use lorap's kernels first, as ``lorap generate`` does.
        device: ``auto``, ``cpu``, ``cuda``, ...
        dtype: ``auto`` for each checkpoint's own.
    """

    texts: tuple[str, ...] = (DEFAULT_EVALUATION,)
    seq_len: int = 128
    max_tokens: int | None = None
    tasks: tuple[str, ...] = ()
    task_data: str = "auto"
    limit: int | None = None
    prompt_tokens: int = 128
    new_tokens: int = 32
    rounds: int = 3
    optimize: bool = True
    device: str = "auto"
    dtype: str = "auto"


def find_contenders(models: Sequence[str]) -> list[Contender]:
    """The models of a comparison, the one that others are compared with first.

    Raises:
        ConfigError: one is given twice.
        CheckpointError: one is not there, or its files are damaged.
    """
    sources = [find_model(model) for model in models]
    names = [source.name for source in sources]
    labels = [name if names.count(name) == 1 else model for name, model in zip(names, models, strict=True)]
    if len(set(labels)) < len(labels):
        raise ConfigError(
            f"{next(one for one in labels if labels.count(one) > 1)} is given twice; name each model once"
        )
    return [Contender(*one) for one in zip(labels, models, sources, strict=True)]


def check_tokens(contenders: Sequence[Contender], options: ComparisonOptions) -> list[str]:
    """The sha256 of each text's windows, after checking that all models read the same tokens; no weight is loaded.

    Raises:
        ConfigError: two models split a text differently, so that their losses per token are not comparable.
        CalibrationError: a text cannot be read.
    """
    sizes: dict[str, Any] = {"seq_len": options.seq_len, "max_tokens": options.max_tokens, "vocab_size": sys.maxsize}
    first: list[str] = []
    for contender in contenders:
        tokenizer = load_tokenizer(contender.source)
        found = [consecutive_windows(text, tokenizer, **sizes) for text in options.texts]
        first = first or [one.sha256 for one in found]
        for one, wanted in zip(found, first, strict=True):
            if one.sha256 != wanted:
                raise ConfigError(
                    f"{contender.label} splits {one.name} into other tokens than {contenders[0].label} does, so their losses per "
                    "token cannot be compared; leave it out, or compare models of one tokenizer"
                )
    return first


def compare(
    models: Sequence[str], *, options: ComparisonOptions, work: Path, progress: bool = False
) -> list[Contender]:
    """Measure all models; a part that fails is an entry of ``errors`` and does not stop the others.

    Args:
        models: the one that others are compared with first.
        options: what to measure.
        work: an existing folder for cells; those of an interrupted comparison are used.
        progress: show a bar on stderr.

    Raises:
        ConfigError: as :func:`find_contenders` and :func:`check_tokens`, or there is no such dtype.
        LoRAPError: a model or text is not there.
    """
    options = replace(options, dtype=dtype_name(options.dtype))  # of whatever spelling, measurements are kept under one
    check_sources(*options.texts)
    contenders = find_contenders(models)
    cells = Cells(work, asdict(options), check_tokens(contenders, options))

    parts = (TEXTS, *([TASKS] if options.tasks else []))
    total = len(contenders) * (len(parts) + options.rounds)
    with tqdm(desc="Measuring", unit="part", total=total, disable=not progress) as bar:
        for contender in contenders:
            for part in parts:
                _measure(contender, cells, bar, part)
        for number in range(1, options.rounds + 1):
            # A round that was cut short is measured again as a whole: its ratios hold only within it.
            paths = [cells.path(contender.source, SPEED, number) for contender in contenders]
            if not all(path.exists() for path in paths):
                for path in paths:
                    path.unlink(missing_ok=True)
            for contender in contenders:
                _measure(contender, cells, bar, SPEED, number)
    for contender in contenders:
        _add_size(contender)
    return contenders


def _measure(contender: Contender, cells: Cells, bar: Any, part: str, number: int = 0) -> None:
    """One part of one model, measured or found; what went wrong is kept in ``errors``."""
    bar.set_postfix_str(f"{contender.label}: {part}{f', round {number}' if number else ''}")
    error = cells.make(contender.model, contender.source, part, number)
    if error is None:
        _keep(contender, part, cells.read(contender.source, part, number))
    else:
        contender.errors.setdefault(part, error)
        contender.speeds += [None] if part == SPEED else []
    bar.update()


def _keep(contender: Contender, part: str, found: dict[str, Any]) -> None:
    """Add what a cell holds to what is known of a model."""
    contender.environment = found["environment"]
    if part == TEXTS:
        contender.texts = found["texts"]
    elif part == TASKS:
        contender.tasks = {task: _answers(task, one) for task, one in found["tasks"].items()}
    else:
        contender.speeds.append({name: value for name, value in found.items() if name != "environment"})


def _answers(task: str, found: dict[str, Any]) -> TaskResult:
    """Back from :meth:`TaskResult.to_dict`, which keeps the answers by the customary metric."""
    correct = {found["metric"]: tuple(answer == "1" for answer in found["correct"])}
    about = {name: found[name] for name in ("metric", "prompts", "identity", "truncated")}
    return TaskResult(task=task, correct=correct, **about)


def _add_size(contender: Contender) -> None:
    source = contender.source
    try:
        described = describe_model(source)
        contender.params, contender.bytes = described["params"], described["bytes"]
    except (LoRAPError, OSError) as error:
        contender.errors["size"] = str(error).splitlines()[0]
