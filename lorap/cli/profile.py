"""``lorap profile``: where the time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lorap.cli.common import AsJson, Debug, Device, Dtype, Model, Quiet, be_quiet, loading, user_errors
from lorap.errors import ConfigError


def profile_command(
    model: Model,
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt that is read at once.", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded one by one after it.", min=1)] = 16,
    optimize: Annotated[
        bool,
        typer.Option("--optimize", help="Merge q/k/v and gate/up first, and use lorap's kernels for dense layers."),
    ] = False,
    trace: Annotated[
        Optional[Path], typer.Option(help="Write a trace for https://ui.perfetto.dev or chrome://tracing.")
    ] = None,
    top: Annotated[int, typer.Option(help="Kernels to show.", min=1)] = 15,
    ranges_only: Annotated[
        bool, typer.Option("--ranges-only", help="Time the stages only, for running under nsys or ncu.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Where the time of MODEL goes, reading a prompt (prefill) and decoding: by stage, then by kernel.

    \b
    Reading the first table: decoding reads every weight once per token, so a stage takes as long as its weights are large,
    and fewer weights help. Prefill computes with each weight many times; fewer multiplications help.
    GB/s are the bytes of weights over the time: in decoding, beside what the memory can do, they say how much is left to gain.
    With --optimize on a CPU, layers of LLaMA's kind decode in one call each, without these stages: the last rows are the mean of
    such calls, and the same of dense layers as large as before compression, with random weights.
    Reading the others: "self" is time in the kernel itself, not in what it called. Many calls of a few microseconds mean
    that Python and launches take the time: try --optimize.

    \b
    Example:
      lorap profile ./small --tokens 512 --trace trace.json
      lorap profile ./small --optimize --dtype bfloat16
    """
    with user_errors(debug, as_json) as answer:
        be_quiet(quiet)
        if trace is not None and not trace.absolute().parent.is_dir():
            raise ConfigError(f"cannot write {trace}: there is no folder {trace.parent}")
        with loading():
            from lorap.cli.models import open_model
            from lorap.evaluation.profiling import deeper, profile_model, run_ranges
            from lorap.nn.fused import optimize_for_inference
        loaded, _, source = open_model(model, device, dtype)
        if optimize:
            optimize_for_inference(loaded)
        if ranges_only:
            run_ranges(loaded, tokens=tokens, new_tokens=new_tokens)
            return
        found = profile_model(loaded, tokens=tokens, new_tokens=new_tokens, trace=trace)
        typer.echo(f"{source.name}, {loaded.dtype}, on {loaded.device}\n\n{found.table(top=top)}\n")
        if trace is not None:
            typer.echo(f"trace written to {trace}\n")
        if not quiet:
            options = ["--tokens", str(tokens), "--new-tokens", str(new_tokens), "--dtype", dtype, "--device", "cuda"]
            typer.echo(deeper(["lorap", "profile", model, *options, *(["--optimize"] if optimize else [])]))
        answer({"model": source.name, "optimized": optimize, **found.to_dict()})
