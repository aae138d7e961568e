"""``lorap env``: what a machine offers."""

from __future__ import annotations

import typer

from lorap.cli.common import AsJson, Debug, loading, user_errors


def env_command(as_json: AsJson = False, debug: Debug = False) -> None:
    """Versions, devices, and which kernels run what on this machine; paste it into a bug report.

    \b
    Example:
      lorap env
    """
    with user_errors(debug, as_json) as answer:
        with loading():
            from lorap.evaluation.environment import describe_environment, format_environment
        found = describe_environment()
        typer.echo(format_environment(found))
        answer(found)
