"""``lorap export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorap.checkpoint import check_output
from lorap.cli.common import AsJson, Debug, Dtype, Model, Quiet, be_quiet, open_model, user_errors
from lorap.errors import ConfigError
from lorap.export import export_gguf, export_stock
from lorap.loading import find_model
from lorap.modules import count_parameters

FORMATS = ("stock", "gguf")


def export_command(
    model: Model,
    dest: Annotated[Path, typer.Argument(help="Folder to write: new or empty. It appears complete or not at all.")],
    format: Annotated[str, typer.Option(help="What to write, see above.", metavar="|".join(FORMATS))] = "stock",
    pad_widths: Annotated[
        bool,
        typer.Option(
            "--pad-widths",
            help="Fill up FFNs narrower than the widest with zeros, where layers differ: exact, but larger.",
        ),
    ] = False,
    dtype: Dtype = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DEST if it exists.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file.")] = "5GB",
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write the compressed MODEL for hosts without lorap into the folder DEST.

    \b
    Formats:
      stock    an ordinary Hugging Face folder (LlamaForCausalLM, ...): attention is dense again, the FFN stays narrower
      gguf     the same as one file for llama.cpp, with the tokenizer: F32, F16 or BF16, as --dtype says

    \b
    What low-rank attention saved is given back here. To save the same without lorap, plan for it from the start:
    lorap compress MODEL OUT --target stock.

    \b
    Example:
      lorap export ./small ./plain
      lorap export ./small ./plain --pad-widths --dtype bfloat16
      lorap export ./small ./file --format gguf --dtype float16
    """
    with user_errors(debug, as_json) as answer:
        be_quiet(quiet)
        if format not in FORMATS:
            raise ConfigError(f"unknown format {format!r}; choose from {', '.join(FORMATS)}")
        check_output(dest, source=find_model(model).folder, overwrite=overwrite)
        loaded, tokenizer, source = open_model(model, "cpu", dtype)
        before = count_parameters(loaded)
        readme = source.folder / "README.md" if source.folder else None
        card = readme.read_text("utf-8") if readme is not None and readme.is_file() else ""
        options: dict[str, Any] = {
            "tokenizer": tokenizer,
            "card": card,
            "pad_widths": pad_widths,
            "overwrite": overwrite,
        }
        if format == "gguf":
            export_gguf(loaded, dest, **options)
        else:
            export_stock(loaded, dest, max_shard_size=max_shard_size, **options)
        after = count_parameters(loaded)
        typer.echo(f"{type(loaded).__name__}, FFN width {loaded.config.intermediate_size:,}, {loaded.dtype}")
        typer.echo(f"{before:,} parameters in {source.name}, {after:,} without low-rank layers")
        typer.echo(f"saved to {dest}")
        answer(
            {
                "out": str(dest),
                "format": format,
                "class": type(loaded).__name__,
                "intermediate_size": loaded.config.intermediate_size,
                "params_compressed": before,
                "params": after,
            },
        )
