"""The ``lorap`` command: plan, compress, eval, compare, generate, recover, export, report, inspect, info, profile, env.

Tables go to stdout, progress to stderr; with ``--json`` stdout is one line, a JSON object, and all else goes to stderr. A mistake
of the user ends with one sentence and exit code 2; ``--debug`` shows the traceback instead.
"""

from __future__ import annotations

import importlib
import signal
from collections.abc import Iterator, MutableMapping
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import lorap
from lorap.cli.common import interrupt, listen
from lorap.integrations.preparation import leave

# In the order of `lorap --help`, which imports none of them: the module, and what the help begins with.
COMMANDS = {
    "plan": (
        "plan",
        "What `lorap compress` with the same options would do to MODEL, and how long and how much memory it would take.",
    ),
    "compress": ("compress", "Compress MODEL into the Hugging Face folder OUT."),
    "eval": (
        "evaluate",
        "Perplexity of MODEL, dense or compressed, over windows that do not overlap (the paper's protocol), tasks or answers.",
    ),
    "compare": ("compare", "Size, loss, tasks, speed and memory of DENSE and of what was made from it, side by side."),
    "generate": (
        "generate",
        "Continue a prompt with MODEL, dense or compressed; a model with a chat template answers it.",
    ),
    "recover": (
        "recover",
        "Tune the compressed model OUT for a few minutes and write it to NEW, no larger than before.",
    ),
    "export": ("export", "Write the compressed MODEL for hosts without lorap into the folder DEST."),
    "report": (
        "report",
        "Write OUT/report.html anew from OUT/lorap_report.json: what the compression did, with charts, for a browser.",
    ),
    "inspect": (
        "inspect",
        "Is MODEL low rank? Spectra of all projections, plain and weighted by their inputs, and the importance of FFN channels.",
    ),
    "info": (
        "info",
        "Parameters by kind, kept share, ranks, widths and bytes of MODEL, read from config and headers alone.",
    ),
    "env": ("env", "Versions, devices, and which kernels run what on this machine; paste it into a bug report."),
    "profile": (
        "profile",
        "Where the time of MODEL goes, reading a prompt (prefill) and decoding: by stage, then by kernel.",
    ),
}


def _verbose(
    times: Annotated[
        int,
        typer.Option(
            "--verbose",
            "-v",
            count=True,
            callback=lambda times: times and listen(times),
            help="Tell what is done, with times; -vv: and what other libraries log.",
            show_default=False,
        ),
    ] = 0,
) -> None:
    """The option that every command has and none needs to know of."""


def _command(name: str, function: Any) -> Any:
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    alone.command(name)(function)
    return typer.main.get_command(alone)


class _Commands(MutableMapping[str, Any]):
    """The commands by name, each imported when it is first asked for; torch and transformers only when it runs."""

    def __init__(self) -> None:
        self._imported: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._imported:
            module, _ = COMMANDS[name]
            function = getattr(importlib.import_module(f"lorap.cli.{module}"), f"{module}_command")
            command, more = _command(name, function), _command(name, _verbose).params[0]
            more.expose_value = False
            command.params.append(more)
            self._imported[name] = command
        return self._imported[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._imported[name] = command

    def __delitem__(self, name: str) -> None:
        raise TypeError("commands stay")

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class _Group(TyperGroup):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = _Commands()

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """As for commands that begin like this; none is imported."""
        summaries: dict[str, Any] = {name: TyperCommand(name, help=summary) for name, (_, summary) in COMMANDS.items()}
        TyperGroup(commands=summaries).format_commands(ctx, formatter)


app = typer.Typer(
    cls=_Group,
    help="Compress LLaMA-family language models with LoRAP (arXiv 2404.09695), and judge and run the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"lorap {lorap.__version__}")
        raise typer.Exit
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) is leave:  # commands are light until they run (lorap.cli.common.loading)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    listen()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Entry point of the ``lorap`` command and of ``python -m lorap``."""
    app()
