"""``lorap plan``: what ``lorap compress`` would leave of a model and take to do it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from lorap.cli.common import AsJson, Debug, Model, be_quiet, loading, user_errors
from lorap.cli.compress import chosen_config, chosen_options, compress_command
from lorap.errors import ConfigError

# Options of compress that say what becomes of OUT; all others change what is done and are options here as well.
LEFT_OUT = ("out", "overwrite", "max_shard_size", "restart", "as_json", "debug")
# Options of earlier versions, and what to do now.
GONE = {
    "gpu": "its times were never measured; run plan on a machine with that GPU (--device cuda), or with --no-time for sizes and "
    "memory alone",
    "processes": "times are of one process; torchrun shares calibration windows and factorizations (docs/long-runs.md)",
}
Gone = Annotated[Optional[str], typer.Option(hidden=True)]


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
    time: Annotated[
        bool,
        typer.Option(
            help="Compress some layers of MODEL to see how long it takes; without, nothing but headers is read."
        ),
    ] = True,
    out: Annotated[
        Path,
        typer.Option(help="A folder on the disk that OUT will be on; some layers are written there, and go again."),
    ] = Path("."),
    gpu: Gone = None,
    processes: Gone = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """What `lorap compress` with the same options would do to MODEL, and how long and how much memory it would take.

    Sizes and memory come from config.json and the headers of the weight files. Ranks and widths are exact where they follow from
    shapes (allocation paper and even, target stock); else the budget is printed, and an even split of it. The time is measured on
    this machine, now: some layers of MODEL, often one, are compressed for real with a few windows, and multiplied. --no-time
    leaves that out.

    \b
    Example:
      lorap plan ./llama --sparsity 0.2
      lorap plan ./llama --sparsity 0.5 --recipe lorap --device cuda
      lorap plan ./llama-405b --no-time
    """
    with user_errors(debug, as_json) as answer:
        chosen = context.params
        be_quiet(chosen["quiet"])
        for name, instead in GONE.items():
            if chosen[name] is not None:
                raise ConfigError(f"plan has no --{name} any more: {instead}")
        config = chosen_config(chosen)
        with loading():
            from lorap.calibration.mixtures import check_sources
            from lorap.checkpoint.load import find_model, resolve_device
            from lorap.compression.estimate import ModelShape, Texts, estimate, try_layers
            from lorap.system import free_memory_bytes
        options = chosen_options(chosen)
        check_sources(options.calibration, *options.evaluation)
        source = find_model(model, fetch=False)
        shape = ModelShape.read(source, dtype=options.dtype)
        texts = Texts.of(config, options.calibration, evaluation_texts=len(options.evaluation))
        room = free_memory_bytes(resolve_device(options.device))
        found = estimate(shape, config, texts, room=room, max_memory=options.max_memory_bytes)
        if time and found.fits and not shape.kinds:
            trial = try_layers(source, shape, found.config, options, found.sizes, texts, folder=out)
            found = replace(found, trial=trial)
        typer.echo(found.table())
        answer(found.to_dict())
