"""``lorap plan``: what ``lorap compress`` would leave of a model and take to do it, from headers alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from lorap.calibration.mixtures import check_sources, parse_source
from lorap.calibration.sources import DEFAULT_CALIBRATION, DEFAULT_EVALUATION
from lorap.checkpoint.load import find_model
from lorap.cli.common import AsJson, Debug, Model, be_quiet, user_errors
from lorap.cli.compress import chosen_config, compress_command
from lorap.compression.estimate import GPUS, ModelShape, estimate, find_gpu, this_machine
from lorap.system import parse_bytes

# Options of compress that say what becomes of OUT; all others change what is done and are options here as well.
LEFT_OUT = ("out", "overwrite", "max_shard_size", "device", "restart", "as_json", "debug")


def with_compress_options(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with the options of ``lorap compress`` between its own; it finds their values in ``context.params``."""
    own = inspect.signature(command, eval_str=True).parameters
    theirs = inspect.signature(compress_command, eval_str=True).parameters
    shared = {name: option for name, option in theirs.items() if name not in own and name not in LEFT_OUT}
    first = [own[name] for name in ("context", "model")]
    last = [option for name, option in own.items() if name not in ("context", "model")]
    options = [*first, *shared.values(), *last]

    def wrapped(**given: Any) -> None:
        command(**{name: value for name, value in given.items() if name in own})

    wrapped.__doc__ = command.__doc__
    wrapped.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {option.name: option.annotation for option in options}
    return wrapped


@with_compress_options
def plan_command(
    context: typer.Context,
    model: Model,
    gpu: Annotated[
        Optional[str],
        typer.Option(
            help="Estimate for a GPU from published figures, instead of for this machine: "
            f"{', '.join(GPUS)}, or name=NAME,memory=GB,bandwidth=GB/s,bf16=TFLOP/s,fp32=TFLOP/s,fp64=TFLOP/s,pcie=GB/s.",
            metavar="NAME",
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(help="Processes that share the calibration windows and the factorizations.", min=1)
    ] = 1,
    out: Annotated[
        Path, typer.Option(help="A folder on the disk that OUT will be on; a file of 128 MB is tried there.")
    ] = Path("."),
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """What `lorap compress` with the same options would do to MODEL, and how long and how much memory it would take.

    Only config.json and the headers of the weight files are read. Ranks and widths are exact where they follow from shapes
    (allocation paper and even, target stock); else the budget is printed, and an even split of it. Seconds are what this machine
    is seen to do in a few seconds, or what is published of a GPU, times the operations that are listed below the table.

    \b
    Example:
      lorap plan ./llama --sparsity 0.2
      lorap plan ./llama --sparsity 0.5 --recipe lorap --gpu h100 --processes 8
    """
    with user_errors(debug, as_json) as answer:
        options = context.params
        be_quiet(options["quiet"])
        config = chosen_config(options)
        calibration = [parse_source(text) for text in options["calibration"] or [DEFAULT_CALIBRATION]]
        evaluation = [text for text in options["eval_text"] or [DEFAULT_EVALUATION] if text != "none"]
        check_sources(calibration, *evaluation)
        shape = ModelShape.read(find_model(model, fetch=False), dtype=options["dtype"])
        machine = find_gpu(gpu, processes=processes) if gpu else this_machine(out, dtype=shape.dtype)
        found = estimate(
            shape,
            config,
            machine,
            calibration=calibration,
            evaluation_texts=len(evaluation),
            processes=processes,
            max_memory=parse_bytes(options["max_memory"]) if options["max_memory"] else None,
        )
        typer.echo(found.table())
        answer(found.to_dict())
