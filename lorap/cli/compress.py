"""``lorap compress``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

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
    tell_next,
    user_errors,
)
from lorap.config import CHOICES, DEFAULT_RECIPE, RECIPES, CompressionConfig
from lorap.outputs import work_path
from lorap.reports.run import CompressionReport

if TYPE_CHECKING:
    from lorap.compression.runs.run import RunOptions

# Options that are written as a comma-separated list.
LISTS = ("sublayers",)
# Options that are numbers or `auto`.
NUMBERS_OR_AUTO = ("rank_multiple", "width_multiple", "metric_shrinkage", "repair_ridge")


def _option(name: str, text: str) -> Any:
    """An option that is a field of CompressionConfig: its ways of being written, one sentence, and its value in ``best``."""
    metavar = "|".join(CHOICES[name]) if name in CHOICES else "NUMBER|auto" if name in NUMBERS_OR_AUTO else None
    value = RECIPES[DEFAULT_RECIPE][name]
    shown = ",".join(value) if name in LISTS else str(value).lower()
    return typer.Option(help=f"{text}  [{DEFAULT_RECIPE}: {shown}]", metavar=metavar)


def compress_command(
    context: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder to write: new or empty. It appears complete or not at all.")],
    # What becomes of the model. An option that is called like a field of CompressionConfig is that field; nothing else has to
    # be written for it. None leaves the choice to the recipe.
    sparsity: Annotated[
        Optional[float],
        typer.Option(
            "--sparsity",
            "--sparsity-ratio",
            help="Fraction of the compressed sub-layers' parameters to remove, in [0, 1).  [default: 0.2, or what --size or "
            "--bits-per-weight takes]",
        ),
    ] = None,
    size: Annotated[
        Optional[str],
        typer.Option(
            help="Bytes of all weights in OUT at most, such as 1.2GB: --weights and the sparsity follow.",
            metavar="SIZE",
        ),
    ] = None,
    bits_per_weight: Annotated[
        Optional[float],
        typer.Option(
            help="The same in bits for each weight of the dense decoder layers, scales included, such as 3.5."
        ),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="Where options that are not given come from; `lorap compress --help` tells them apart.",
            metavar="|".join(RECIPES),
        ),
    ] = DEFAULT_RECIPE,
    sublayers: Annotated[
        Optional[str], _option("sublayers", "Which sub-layers to compress; a list with commas.")
    ] = None,
    # Who gets the parameters that stay.
    allocation: Annotated[
        Optional[str],
        _option(
            "allocation",
            "Who keeps how much: paper gives {v, o} more than {q, k}, even the same to every matrix, loss what costs least "
            "by a backward pass, flap cuts FFNs only, at one threshold.",
        ),
    ] = None,
    vo_to_qk_ratio: Annotated[
        Optional[float], _option("vo_to_qk_ratio", "Parameters for {v, o} per one for {q, k}, under allocation paper.")
    ] = None,
    shapes: Annotated[
        Optional[str], _option("shapes", "uniform: the same ranks and width in all layers, which some hosts want.")
    ] = None,
    rank_multiple: Annotated[
        Optional[str],
        _option(
            "rank_multiple",
            "Ranks are multiples of this; auto: up to 64, as GPUs like, as far as allocation loss can afford it.",
        ),
    ] = None,
    width_multiple: Annotated[Optional[str], _option("width_multiple", "The same for FFN widths.")] = None,
    # Low-rank pairs, and how errors are weighed.
    attention_method: Annotated[
        Optional[str],
        _option(
            "attention_method",
            "What a low-rank pair is fitted to: inputs weighted by channel norms (awsvd) or with their correlations "
            "(second_moment), the bare weight (svd), the outputs' principal components (afm).",
        ),
    ] = None,
    metric_shrinkage: Annotated[
        Optional[str],
        _option(
            "metric_shrinkage",
            "How far to distrust correlations of inputs, 0 to 1; auto: as far as two halves of the calibration text disagree.",
        ),
    ] = None,
    output_weighting: Annotated[
        Optional[str],
        _option(
            "output_weighting",
            "loss: errors of outputs are weighted by the second moment of their gradients.",
        ),
    ] = None,
    anchor: Annotated[
        Optional[str],
        _option(
            "anchor",
            "dense: factor pairs give what the dense model has in their place, not what the dense matrix makes of inputs that "
            "have changed; keeps a second stream of hidden states.",
        ),
    ] = None,
    token_weighting: Annotated[
        Optional[str],
        _option(
            "token_weighting",
            "residual: for o_proj and down_proj tokens count relative to their hidden state, so that huge ones do not decide.",
        ),
    ] = None,
    # The FFN.
    mlp_method: Annotated[
        Optional[str], _option("mlp_method", "Remove whole FFN channels, or make the FFN matrices low-rank as well.")
    ] = None,
    channel_score: Annotated[
        Optional[str],
        _option(
            "channel_score",
            "Which channels stay: largest weighted norms (lorap), largest share of the output (output), largest variance "
            "(fluctuation).",
        ),
    ] = None,
    least_important_kept: Annotated[
        Optional[float],
        _option("least_important_kept", "Fraction of least important FFN channels that stay; the paper: 0.01."),
    ] = None,
    repair: Annotated[
        Optional[bool],
        _option("repair", "Refit down_proj, so that the channels that stay do the work of those that went."),
    ] = None,
    repair_ridge: Annotated[
        Optional[str],
        _option(
            "repair_ridge",
            "Pull of the refit towards the old weights, 0 or more; auto: what serves the other half of the text best.",
        ),
    ] = None,
    bias_compensation: Annotated[
        Optional[bool], _option("bias_compensation", "Put the mean output of the channels that went into a bias.")
    ] = None,
    # The order of the layers, and what is written.
    sequential: Annotated[
        Optional[str],
        _option(
            "sequential",
            "When statistics are taken: once before a layer changes, or behind each part of it that has changed (slower).",
        ),
    ] = None,
    storage: Annotated[
        Optional[str],
        _option("storage", "pivoted: higher ranks for the same parameters, without loss (checkpoint format 2)."),
    ] = None,
    correction_steps: Annotated[
        Optional[int],
        _option(
            "correction_steps",
            "Afterwards, so many small steps of all weights towards what the dense model predicts on the calibration text; fewer "
            "and smaller ones on few windows, and undone where further windows do not agree.",
        ),
    ] = None,
    scale_steps: Annotated[
        Optional[int],
        _option(
            "scale_steps",
            "Once the weights are rounded, so many such steps that move their scales alone, likewise undone where further "
            "windows do not agree.",
        ),
    ] = None,
    weights: Annotated[
        Optional[str],
        _option(
            "weights",
            "Bits of the weights in OUT: float, as --dtype says; int8 or int4, rounded on the calibration text at the end; tcq6 "
            "to tcq2, codes on a trellis, which lose less in as many bits and take longer. With --sparsity 0 nothing else is "
            "done. With --size or --bits-per-weight auto, the most that fit, of codes below int8, and sparsity where 3 bits are "
            "too many; tcq, codes of 2 to 6 bits, more for the matrices where that helps most for its bytes; mixed, likewise "
            "int4 and int8, which lose more and are faster for one sequence on a CPU.",
        ),
    ] = None,
    group_size: Annotated[
        Optional[int],
        _option(
            "group_size", "Weights in few bits of a row that share a scale, a multiple of 32; of tcq 256 unless given."
        ),
    ] = None,
    target: Annotated[
        Optional[str],
        _option(
            "target",
            "Who is to open OUT: lorap, hosts that have it; stock, any host: attention stays dense and one FFN width takes the "
            "whole sparsity; int8 and int4 as compressed-tensors has them, and no codes (tcq), which only lorap opens.",
        ),
    ] = None,
    num_calibration_samples: Annotated[int, typer.Option(help="Token windows to calibrate on.")] = 128,
    calibration_seq_len: Annotated[int, typer.Option(help="Tokens in each window.")] = 128,
    seed: Annotated[int, typer.Option(help="Which windows are drawn, and what the model writes for self.")] = 0,
    # What it is calibrated and judged on.
    calibration: Annotated[
        Optional[list[str]],
        typer.Option(
            help=f"What resembles the text you will run on: {SOURCE_HELP}, "
            "self (the model writes it), default (half texts that ship with lorap, half self), or one of "
            "those texts, default/NAME; may be repeated, with weights: NAME=WEIGHT.  [default: default]",
            metavar="FILE|NAME|NAME=WEIGHT",
        ),
    ] = None,
    eval_text: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Text to measure perplexity on before and after, in any of these forms; may be repeated; none skips it.  "
            "[default: heldout]"
        ),
    ] = None,
    # Where it runs and what comes out.
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_memory: Annotated[
        Optional[str],
        typer.Option(help="Hidden states of the windows beyond this size, such as 3GB, go to disk.", metavar="SIZE"),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what an unfinished run to OUT has done.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file: 5GB, 500MiB, bytes.")] = "5GB",
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compress MODEL into the Hugging Face folder OUT.

    A recipe is a set of values for the options below; an option that is given replaces the recipe's.

    \b
    Recipes:
      best     low-rank attention, pruned and refitted FFN, sizes chosen by the loss: most quality, use it unless you compare
      lorap    the paper exactly (arXiv 2404.09695): to reproduce it, or where there is no time for a backward pass
      svd-llm  every linear layer low-rank, one share everywhere (arXiv 2403.07378): to compare, or where widths must stay
      aa-svd   svd-llm, each part of a layer fitted to what the dense model has there (arXiv 2604.02119): to compare
      flap     FFN channels only, attention stays dense (arXiv 2312.11983): to compare, or where nothing may become low-rank

    \b
    Example:
      lorap compress HuggingFaceTB/SmolLM2-135M ./small --sparsity 0.2
      lorap compress ./llama ./small --sparsity 0.5 --calibration my.jsonl --eval-text wiki.txt
      lorap compress ./llama ./small --recipe lorap --allocation even
      lorap compress ./llama ./small --size 1.2GB
      lorap compress ./llama ./small --weights int4
      lorap compress ./llama ./small --target stock
      torchrun --nproc-per-node 2 -m lorap compress ./llama ./small

    The model is read one decoder layer at a time, so it may be larger than the memory. Interrupted, the same command goes on
    behind the last finished layer; with the same number of threads (OMP_NUM_THREADS) it comes to the same bytes.
    """
    with user_errors(debug, as_json, unfinished=partial(work_path, out)) as answer:
        be_quiet(quiet)
        config = chosen_config(context.params)
        with loading():
            from lorap.compression.runs.run import compress_to_folder
            from lorap.distributed import is_main_process
            from lorap.system import parse_bytes
        options = replace(
            chosen_options(context.params),
            max_shard_size=parse_bytes(max_shard_size),
            overwrite=overwrite,
            restart=restart,
            command=shlex.join(["lorap", *sys.argv[1:]]),
        )
        report = compress_to_folder(model, out, config, options)
        if is_main_process():
            typer.echo(report.table())
            typer.echo(saved(out))
            tell_next(next_steps(model, out, report), quiet=quiet, as_json=as_json)
            answer({"out": str(out), **report.to_dict()})


def saved(out: Path) -> str:
    """Where a compressed model is, and how large: bytes first, since they are what a budget asks for."""
    from lorap.checkpoint.load import find_model
    from lorap.evaluation.info import describe_model, size_text

    info = describe_model(find_model(str(out)))
    line = f"saved to {out}: {size_text(info)}"
    if info["bits_per_dense_weight"]:
        line += f", {info['bits_per_dense_weight']:.2f} bits for each weight that the dense decoder layers have"
    if info["group_size"] and "F32" in info["dtypes"]:
        line += "\nembeddings and all else that is not rounded are in float32; --dtype bfloat16 halves them"
    return line


def next_steps(model: str, out: Path, report: CompressionReport) -> list[tuple[str, str]]:
    """What to do with a compressed model."""
    dense, folder = shlex.quote(model), shlex.quote(str(out))
    widths = {projection.shape_after for projection in report.by_role("down_proj")}
    stock = report.config.target == "stock"
    gguf = stock or len(widths) > 1
    host = ("llama.cpp" if gguf else "hosts without lorap") + ("" if stock else ", but larger")
    if stock and report.config.bits is not None:
        return [
            (f"vllm serve {folder}", "serve it"),
            (
                f'AutoModelForCausalLM.from_pretrained("{out}")',
                "open it in transformers, with compressed-tensors installed",
            ),
        ]
    steps = [
        (f"lorap eval {folder} --baseline {dense}", "how much worse it predicts"),
        (f'lorap generate {folder} --prompt "..."', "what it says"),
    ]
    if report.config.bits is not None:  # neither tuned nor exported
        return steps
    return [
        *steps,
        (f"lorap recover {folder} TUNED", "tune it for some minutes: better, and no larger"),
        (
            f"lorap export {folder} DEST{' --format gguf' * gguf}",
            f"for {host}",
        ),
    ]


def chosen_options(options: Mapping[str, Any]) -> RunOptions:
    """Where a command line reads from and runs; what becomes of OUT is not among it.

    Raises:
        ConfigError: ``max_memory`` is no size.
    """
    from lorap.calibration.mixtures import parse_source
    from lorap.calibration.sources import DEFAULT_CALIBRATION, DEFAULT_EVALUATION
    from lorap.compression.runs.run import RunOptions
    from lorap.system import parse_bytes

    return RunOptions(
        calibration=[parse_source(text) for text in options["calibration"] or [DEFAULT_CALIBRATION]],
        evaluation=[text for text in options["eval_text"] or [DEFAULT_EVALUATION] if text != "none"],
        device=options["device"],
        dtype=options["dtype"],
        max_memory_bytes=None if options["max_memory"] is None else parse_bytes(options["max_memory"]),
        progress=not options["quiet"],
    )


def chosen_config(options: Mapping[str, Any]) -> CompressionConfig:
    """The config that the options of a command line ask for, by the names of the fields; other options are passed over.

    Raises:
        ConfigError: a value is out of range.
    """
    chosen = {field.name: options[field.name] for field in fields(CompressionConfig) if field.name in options}
    for name in LISTS:
        if chosen.get(name) is not None:
            chosen[name] = tuple(part.strip() for part in chosen[name].split(","))
    for name in NUMBERS_OR_AUTO:
        if chosen.get(name) is not None:
            chosen[name] = _number(chosen[name])
    return CompressionConfig.from_recipe(**chosen)


def _number(text: str) -> int | float | str:
    """Text as the number that it spells; other text as it is, for the config to accept ``auto`` and to refuse the rest."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
