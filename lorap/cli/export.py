"""``lorap export``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from lorap.architectures import known_architecture
from lorap.checkpoint.gguf.header import read_gguf
from lorap.cli.common import AsJson, Debug, Dtype, Model, Quiet, be_quiet, loading, tell_next, user_errors
from lorap.errors import ConfigError
from lorap.evaluation.info import describe_model, report_beside
from lorap.outputs import check_output
from lorap.reports.model_card import opened_as

FORMATS = ("stock", "gguf", "deci")


def export_command(
    model: Model,
    dest: Annotated[Path, typer.Argument(help="Folder to write: new or empty. It appears complete or not at all.")],
    format: Annotated[str, typer.Option(help="What to write, see above.", metavar="|".join(FORMATS))] = "stock",
    pad_widths: Annotated[
        bool,
        typer.Option(
            "--pad-widths",
            help="stock and gguf: fill up FFNs narrower than the widest with zeros, where layers differ: exact, but larger.",
        ),
    ] = False,
    quantize: Annotated[
        Optional[str],
        typer.Option(
            help="gguf: fewer bits, by llama.cpp's names: Q8_0, and by its llama-quantize, where that is on the PATH, "
            "Q4_K_M and the others.",
            metavar="TYPE",
        ),
    ] = None,
    dtype: Dtype = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DEST if it exists.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file: 5GB, 500MiB, bytes.")] = "5GB",
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write the compressed MODEL for hosts without lorap into the folder DEST.

    \b
    Formats:
      stock    an ordinary Hugging Face folder (LlamaForCausalLM, ...), whose FFNs have one width
      deci     the same for vLLM, each FFN as wide as it is; vLLM runs the folder's own 20 lines of Python for its config, and so
               wants --trust-remote-code
      gguf     one file for llama.cpp, with the tokenizer; each FFN as wide as it is; F32, F16 or BF16, as --dtype says

    \b
    Attention is dense again: what its factors saved is given back here. To save the same without lorap, plan for it from the
    start: lorap compress MODEL OUT --target stock.

    \b
    Example:
      lorap export ./small ./plain
      lorap export ./small ./plain --pad-widths --dtype bfloat16
      lorap export ./small ./file --format gguf --quantize Q8_0
    """
    with user_errors(debug, as_json) as answer:
        be_quiet(quiet)
        if format not in FORMATS:
            raise ConfigError(f"unknown format {format!r}; choose from {', '.join(FORMATS)}")
        if quantize is not None and format != "gguf":
            raise ConfigError(f"--quantize {quantize} makes GGUF files, and --format is {format}; add --format gguf")
        with loading():
            from lorap.checkpoint.load import find_model
            from lorap.checkpoint.reconstruct import refuse_quantized
            from lorap.cli.models import open_model
            from lorap.integrations.deci import export_deci
            from lorap.integrations.llamacpp import export_gguf, overflow_warning, width_cost, width_range
            from lorap.integrations.stock import export_stock
            from lorap.nn.linear import count_parameters
            from lorap.reports.model_card import read_card
            from lorap.system import parse_bytes
        shard_bytes = parse_bytes(max_shard_size)
        source = find_model(model)
        if source.checked and source.checked.compression:
            refuse_quantized(source.checked.compression.weights_text)
        check_output(dest, source=source.folder, overwrite=overwrite)
        loaded, tokenizer, _ = open_model(source, "cpu", dtype)
        before = count_parameters(loaded)
        card = read_card(source.folder) if source.folder else ""
        options: dict[str, Any] = {"tokenizer": tokenizer, "card": card, "overwrite": overwrite}
        if format == "gguf":
            kind = None if quantize is None else quantize.upper()
            export_gguf(loaded, dest, pad_widths=pad_widths, quantize=kind, **options)
        elif format == "deci":
            export_deci(loaded, dest, max_shard_size=shard_bytes, **options)
        else:
            export_stock(loaded, dest, pad_widths=pad_widths, max_shard_size=shard_bytes, **options)
        told = _facts(loaded, dest, format)
        told |= {"params_dense": describe_model(source)["params_before"], "params_compressed": before}
        typer.echo(savings(told["params_dense"], before, told["params"]))
        kind = f"llama.cpp's architecture {told['architecture']}" if format == "gguf" else told["class"]
        typer.echo(f"{kind}, {width_range(told['intermediate_sizes'])}, {quantize or loaded.dtype}")
        typer.echo(width_cost(loaded))
        if warning := overflow_warning(report_beside(source), loaded.dtype):
            typer.echo(f"warning: {warning}", err=True)
        typer.echo(f"saved to {dest}")
        tell_next(next_steps(dest, format, told["class"]), quiet=quiet, as_json=as_json)
        answer(told)


def _facts(exported: Any, dest: Path, format: str) -> dict[str, Any]:
    """What ``--json`` tells of an export."""
    from lorap.integrations.deci import DECI_CLASS
    from lorap.nn.linear import count_parameters

    widths = known_architecture(exported, to="export").ffn_widths(exported)
    told = {
        "out": str(dest),
        "format": format,
        "class": DECI_CLASS if format == "deci" else type(exported).__name__,
        "intermediate_size": max(widths),
        "intermediate_sizes": widths,
        "params": count_parameters(exported),
    }
    if format == "gguf":
        (file,) = dest.glob("*.gguf")
        told |= {"file": file.name, "bytes": file.stat().st_size, "architecture": read_gguf(file).architecture}
    return told


def savings(dense: int | None, compressed: int, exported: int) -> str:
    """What an export saves of the dense model, in parameters; where it gives back what compression saved, with the way out.

    Args:
        dense: parameters of the dense model; None where they are not known; those that there are, where nothing tells of others.
        compressed: of the compressed model.
        exported: of what was written.
    """
    if dense is None:
        return (
            f"{compressed:,} parameters compressed, {exported:,} exported; how many the dense model has is unknown: the report "
            "beside it is damaged or of another model"
        )
    counts = f"{dense:,} parameters dense, {compressed:,} compressed, {exported:,} exported"
    if exported >= dense:
        if compressed >= dense:
            return f"{exported:,} parameters exported of {compressed:,}; nothing in this folder says what it was compressed from"
        more = "as large as" if exported == dense else "larger than"
        return (
            f"{counts}: exports {more} the dense model, so nothing of the compression is left but its loss; to save without "
            "lorap, compress the dense model with --target stock"
        )
    kept = f"{counts}: {1 - exported / dense:.1%} less than the dense model"
    if exported > compressed:
        kept += f", where the compressed one has {1 - compressed / dense:.1%} less; --target stock saves all of it without lorap"
    return kept


def next_steps(dest: Path, format: str, class_name: str = "") -> list[tuple[str, str]]:
    """How to open what was written in the host that it is for."""
    if format == "gguf":
        name = next((path.name for path in sorted(dest.glob("*.gguf"))), "*.gguf")
        file = shlex.quote(str(dest / name))
        return [
            (f'llama-cli -m {file} -p "..."', "run it in llama.cpp"),
            (f"llama-server -m {file}", "or serve it"),
        ]
    folder = shlex.quote(str(dest))
    if format == "deci":
        from lorap.integrations.deci import CONFIG_FILE

        return [(f"vllm serve {folder} --trust-remote-code", f"serve it; this runs {folder}/{CONFIG_FILE}")]
    return [
        (
            opened_as(f'AutoModelForCausalLM.from_pretrained("{dest}")', class_name),
            "open it in transformers, without lorap",
        ),
        (f"vllm serve {folder}", "or serve it"),
        (f"lorap export {folder} NEW --format gguf", "or one file of it for llama.cpp"),
    ]
