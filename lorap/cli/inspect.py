"""``lorap inspect``. The file is not called inspect.py, which is a module of Python's own."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
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
from lorap.jsonio import write_json
from lorap.outputs import check_output, staged_folder

NUMBERS = "inspection.json"
NO_CALIBRATION = "none"


def inspect_command(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder to write: new or empty. It appears complete or not at all.")],
    calibration: Annotated[
        Optional[list[str]],
        typer.Option(
            help=f"What resembles the text you will run on: {SOURCE_HELP}, "
            "default (the texts that ship with lorap), or default/NAME; may be repeated, with weights: "
            "NAME=WEIGHT. none: plain spectra only, and the model does not run.  [default: default]",
            metavar="FILE|NAME|NAME=WEIGHT|none",
        ),
    ] = None,
    layers: Annotated[
        Optional[str],
        typer.Option(help="Decoder layers to look at, such as 0,5-10.  [default: all]", metavar="0,5-10"),
    ] = None,
    num_calibration_samples: Annotated[int, typer.Option(help="Token windows to weigh inputs by.", min=1)] = 32,
    calibration_seq_len: Annotated[int, typer.Option(help="Tokens in each window.", min=1)] = 128,
    seed: Annotated[int, typer.Option(help="Which windows are drawn.", min=0, max=2**63 - 1)] = 0,
    plots: Annotated[bool, typer.Option(help="Draw pictures; needs matplotlib.")] = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Is MODEL low rank? Spectra of all projections, plain and weighted by their inputs, and the importance of FFN channels.

    OUT gets inspection.json and four pictures, as PNG and SVG.

    \b
    Reading the tables: the rank that keeps 95 % of the energy (the sum of squared singular values) loses 5 % of it, and is
    worth storing as two factors only where "% of parameters" is below 100. A random matrix has no structure at all, and
    needs no more than its column says.

    \b
    Example:
      lorap inspect HuggingFaceTB/SmolLM2-135M ./look
      lorap inspect ./llama ./look --layers 0,8-11 --calibration wiki.txt
      lorap inspect ./llama ./look --calibration none
    """
    with user_errors(debug, as_json) as answer:
        be_quiet(quiet)
        if plots and find_spec("matplotlib") is None:
            raise ConfigError("pictures need matplotlib: pip install 'lorap[plot]', or pass --no-plots")
        chosen = None if layers is None else parse_layers(layers)
        with loading():
            from lorap.calibration.mixtures import parse_source
            from lorap.calibration.sources import DEFAULT_CALIBRATION
            from lorap.checkpoint.load import find_model, resolve_device
            from lorap.cli.models import open_model
            from lorap.evaluation.inspection.inspect import inspect_model
        texts = calibration or [DEFAULT_CALIBRATION]
        _check_texts(texts)
        source = find_model(model)
        check_output(out, source=source.folder, overwrite=overwrite)
        loaded, tokenizer, _ = open_model(source, device, dtype)
        found = inspect_model(
            loaded,
            calibration=None if texts == [NO_CALIBRATION] else [parse_source(text) for text in texts],
            tokenizer=tokenizer,
            layers=chosen,
            num_calibration_samples=num_calibration_samples,
            calibration_seq_len=calibration_seq_len,
            seed=seed,
            device=str(resolve_device(device)),
            name=source.name,
            progress=not quiet,
        )
        with staged_folder(out, overwrite=overwrite) as stage:
            write_json(stage / NUMBERS, found.to_dict(), indent=None)
            if plots:
                from lorap.evaluation.inspection.plots import write_plots

                write_plots(found, stage)
            names = sorted(path.name for path in stage.iterdir())
        typer.echo(found.table())
        typer.echo(f"\nwrote {', '.join(names)} to {out}")
        answer({"out": str(out), "files": names, **found.to_dict(curves=False)})


def parse_layers(text: str) -> list[int]:
    """``0,5-10`` as numbers.

    Raises:
        ConfigError: a part is no number and no range.
    """
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            found = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            raise ConfigError(f"--layers {text}: {part.strip()!r} is no layer and no range; write 0,5-10") from None
        if not found:
            raise ConfigError(f"--layers {text}: the range {part.strip()} is empty; write the smaller number first")
        layers += found
    return layers


def _check_texts(texts: list[str]) -> None:
    from lorap.calibration.mixtures import check_sources, parse_source
    from lorap.calibration.sources import OWN_SAMPLES

    if NO_CALIBRATION in texts and len(texts) > 1:
        raise ConfigError("--calibration none means that there is no text; leave it out to use the others")
    sources = [parse_source(text) for text in texts]
    for source in sources:
        if OWN_SAMPLES in (source, source[0] if isinstance(source, tuple) else source):
            raise ConfigError(
                "the model writes no text for inspect, that takes too long; give another --calibration than self"
            )
    if texts != [NO_CALIBRATION]:
        check_sources(sources)
