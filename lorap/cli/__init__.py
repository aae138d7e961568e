"""The ``lorap`` command: plan, compress, eval, compare, generate, recover, export, report, inspect, info, profile, env.

Tables go to stdout, progress to stderr; with ``--json`` stdout is one line, a JSON object, and all else goes to stderr. A mistake
of the user ends with one sentence and exit code 2; ``--debug`` shows the traceback instead.
"""

from __future__ import annotations

import signal
from typing import Annotated

import typer
from transformers.utils import logging as transformers_logging

import lorap
from lorap.cli.common import interrupt, tell_what_is_read
from lorap.cli.compare import compare_command
from lorap.cli.compress import compress_command
from lorap.cli.env import env_command
from lorap.cli.evaluate import evaluate_command
from lorap.cli.export import export_command
from lorap.cli.generate import generate_command
from lorap.cli.info import info_command
from lorap.cli.inspect import inspect_command
from lorap.cli.plan import plan_command
from lorap.cli.profile import profile_command
from lorap.cli.recover import recover_command
from lorap.cli.report import report_command
from lorap.integrations.preparation import leave

app = typer.Typer(
    help="Compress LLaMA-family language models with LoRAP (arXiv 2404.09695), and judge and run the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
# In the order of `lorap --help`.
app.command("plan")(plan_command)
app.command("compress")(compress_command)
app.command("eval")(evaluate_command)
app.command("compare")(compare_command)
app.command("generate")(generate_command)
app.command("recover")(recover_command)
app.command("export")(export_command)
app.command("report")(report_command)
app.command("inspect")(inspect_command)
app.command("info")(info_command)
app.command("env")(env_command)
app.command("profile")(profile_command)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"lorap {lorap.__version__}")
        raise typer.Exit
    signal.signal(signal.SIGTERM, interrupt)
    transformers_logging.set_verbosity_error()
    tell_what_is_read()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Entry point of the ``lorap`` command and of ``python -m lorap``."""
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    app()
