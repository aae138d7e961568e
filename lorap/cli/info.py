"""``lorap info``: what a model is, without reading its weights."""

from __future__ import annotations

import typer

from lorap.checkpoint.load import find_model
from lorap.cli.common import AsJson, Debug, Model, user_errors
from lorap.evaluation.info import describe_model, format_info


def info_command(model: Model, as_json: AsJson = False, debug: Debug = False) -> None:
    """Parameters by kind, kept share, ranks, widths and bytes of MODEL, read from config and headers alone.

    \b
    Example:
      lorap info ./small
    """
    with user_errors(debug, as_json) as answer:
        described = describe_model(find_model(model, fetch=False))
        typer.echo(format_info(described))
        answer(described)
