"""``lorap recover``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Optional

import typer

from lorap.cli.common import SOURCE_HELP, AsJson, Debug, Device, Quiet, be_quiet, loading, tell_next, user_errors
from lorap.outputs import work_path
from lorap.recovery.config import MODULES, PRECISIONS, RECOVERY, TuningConfig

_DEFAULT = TuningConfig  # its fields hold the defaults; to make one takes pydantic


def recover_command(
    model: Annotated[str, typer.Argument(help="A folder that lorap compress wrote; it is only read.", metavar="OUT")],
    new: Annotated[
        Path, typer.Argument(help="Folder to write: new or empty. It appears complete or not at all.", metavar="NEW")
    ],
    # What it learns from.
    text: Annotated[
        Optional[list[str]],
        typer.Option(
            help=f"What resembles the text you will run on: {SOURCE_HELP}, "
            "default (the texts that ship with lorap), default/NAME, or with --teacher self (it writes "
            "them: slow); may be repeated, with weights: NAME=WEIGHT.  [default: default]",
            metavar="FILE|NAME|NAME=WEIGHT",
        ),
    ] = None,
    teacher: Annotated[
        Optional[str],
        typer.Option(help="The dense model: learn its predictions on the text, not the text alone.", metavar="MODEL"),
    ] = None,
    # How long.
    steps: Annotated[int, typer.Option(help="Most steps.", min=1)] = _DEFAULT.steps,
    minutes: Annotated[
        Optional[float], typer.Option(help="Most minutes of training; the learning rate falls to 0 by then.")
    ] = None,
    # How.
    learning_rate: Annotated[float, typer.Option(help="The highest; it rises at first and falls to 0.")] = (
        _DEFAULT.learning_rate
    ),
    batch_size: Annotated[int, typer.Option(help="Token windows in each step.", min=1)] = _DEFAULT.batch_size,
    seq_len: Annotated[int, typer.Option(help="Tokens in each window.", min=2)] = _DEFAULT.seq_len,
    rank: Annotated[
        int, typer.Option(help="Of the adapters; the merged model does not grow with it.", min=1)
    ] = _DEFAULT.rank,
    modules: Annotated[str, typer.Option(help="Which projections to tune.", metavar="|".join(MODULES))] = "all",
    precision: Annotated[
        str,
        typer.Option(
            help="Of the matmuls; auto: bfloat16 where the processor multiplies it.", metavar="|".join(PRECISIONS)
        ),
    ] = _DEFAULT.precision,
    dtype: Annotated[
        str, typer.Option(help="Of the frozen weights while training: float32, bfloat16, float16, auto (as stored).")
    ] = "float32",
    seed: Annotated[int, typer.Option(help="Of the adapters and of the order of the windows.")] = _DEFAULT.seed,
    # What it is judged on, and what is written.
    eval_text: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Text to measure the loss on before and after; may be repeated; none skips it.  [default: heldout]"
        ),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget an interrupted run instead of going on with it.")
    ] = False,
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace NEW if it exists.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Tune the compressed model OUT for a few minutes and write it to NEW, no larger than before.

    Adapters are trained on its projections (LoRA) and merged. Parameters, ranks, widths and format stay as they are.
    A run that was stopped or killed goes on where it was when the same command is given again.

    \b
    Example:
      lorap recover ./small ./tuned
      lorap recover ./small ./tuned --text chats.jsonl=2 --text default --minutes 15
      lorap recover ./small ./tuned --teacher HuggingFaceTB/SmolLM2-135M --steps 1000
      torchrun --nproc-per-node 2 -m lorap recover ./small ./tuned
    """
    with user_errors(debug, as_json, unfinished=lambda: work_path(new) / RECOVERY) as answer:
        be_quiet(quiet)
        tuning = TuningConfig(
            steps=steps,
            minutes=minutes,
            batch_size=batch_size,
            seq_len=seq_len,
            learning_rate=learning_rate,
            rank=rank,
            seed=seed,
            precision=precision,  # type: ignore[arg-type]  # refused there where it is no choice
        )
        with loading():
            from lorap.calibration.mixtures import parse_source
            from lorap.calibration.sources import DEFAULT_CALIBRATION, DEFAULT_EVALUATION
            from lorap.distributed import is_main_process
            from lorap.recovery.recover import Recovery, recover
        sources = [parse_source(source) for source in text or [DEFAULT_CALIBRATION]]
        wanted = Recovery(text=sources, teacher=teacher, modules=modules, dtype=dtype, tuning=tuning)
        report = recover(
            model,
            new,
            wanted,
            evaluation=[source for source in eval_text or [DEFAULT_EVALUATION] if source != "none"],
            device=device,
            overwrite=overwrite,
            restart=restart,
            progress=not quiet,
        )
        if not is_main_process():
            return
        typer.echo(report.table())
        typer.echo(f"saved to {new}")
        folder = shlex.quote(str(new))
        hints = [
            (
                f"lorap eval {folder} --baseline {shlex.quote(model)}",
                "against the model before tuning, on a text of your own: --text",
            ),
            (f'lorap generate {folder} --prompt "..."', "what it says"),
        ]
        tell_next(hints, quiet=quiet, as_json=as_json)
        answer({"out": str(new), **report.to_dict()})
