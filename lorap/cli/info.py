"""``lorap info``: what a model is, without reading its weights."""

from __future__ import annotations

import typer

from lorap.checkpoint.find import ModelSource
from lorap.checkpoint.plain import find_plain
from lorap.cli.common import AsJson, Debug, Model, loading, user_errors
from lorap.evaluation.info import describe_model, format_info


def info_command(model: Model, as_json: AsJson = False, debug: Debug = False) -> None:
    """Parameters by kind, kept share, ranks, widths and bytes of MODEL, read from config and headers alone.

    \b
    Example:
      lorap info ./small
    """
    with user_errors(debug, as_json) as answer:
        described = describe_model(find_plain(model) or _checked(model))
        typer.echo(format_info(described))
        answer(described)


def _checked(model: str) -> ModelSource:
    """A model that is not plain, once it has passed every check there is."""
    with loading():
        from lorap.checkpoint.load import find_model

    return find_model(model, fetch=False)
