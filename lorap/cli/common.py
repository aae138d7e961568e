"""What the commands share: options, opening a model, output, and how a mistake ends."""

from __future__ import annotations

import json
import logging
import math
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from lorap.config import CHOICES, CompressionConfig
from lorap.errors import LoRAPError
from lorap.integrations.after_import import after_import
from lorap.integrations.preparation import leave
from lorap.recovery.config import TuningConfig

# Modules that set up what libraries say, by name: what only prints help or reads headers imports none of them.
LOGGING = ("transformers.utils.logging", "datasets.utils.logging", "huggingface_hub.utils.logging")
BARS = {
    "transformers.utils.logging": "disable_progress_bar",
    "datasets.utils.tqdm": "disable_progress_bars",
    "huggingface_hub.utils.tqdm": "disable_progress_bars",
}
# A source of text, in the help of every option that takes one.
SOURCE_HELP = (
    "FILE (text; JSONL, JSON, CSV, TSV, Parquet or Arrow with a field `text`, or chats in `messages` and the like; .gz, .xz, "
    ".bz2 or .zst of these; .npy or .safetensors tokens), FILE:FIELD for another field, - (standard input), a folder or name for "
    "`datasets`"
)

Model = Annotated[
    str, typer.Argument(help="A model folder, a .gguf file or the folder it is in, or a name on the hub.")
]
Device = Annotated[str, typer.Option(help="auto (the first GPU, else the CPU), cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's own; float32 for GGUF), float32, bfloat16, float16.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout; tables go to stderr.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars, no hints.")]


def be_quiet(quiet: bool) -> None:
    """With ``--quiet``, no progress bars of libraries either, and of what lorap has to say only what went wrong."""
    if quiet:
        for name, silence in BARS.items():
            after_import(name, partial(_call, name, silence))
        logging.getLogger("lorap").setLevel(logging.WARNING)


def listen(verbosity: int = 0) -> None:
    """What the library logs goes to stderr, each line once, from one process of a run; transformers logs errors only.

    Args:
        verbosity: 1 (``-v``) for what is of use to a developer as well, with times; 2 (``-vv``) for what other libraries log too.
    """
    logger = logging.getLogger("lorap")
    logger.setLevel(logging.DEBUG if verbosity else logging.INFO)
    logger.handlers = [_Teller(verbosity)]
    for name in LOGGING if verbosity > 1 else LOGGING[:1]:
        after_import(name, partial(_call, name, "set_verbosity", logging.INFO if verbosity > 1 else logging.ERROR))


def _call(module: str, function: str, *arguments: Any) -> None:
    getattr(sys.modules[module], function)(*arguments)


class _Teller(logging.Handler):
    def __init__(self, verbosity: int) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s" if verbosity else "%(message)s"))
        self.told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        from lorap.distributed import is_main_process  # imports torch, as whoever logs something has done

        if record.levelno < logging.WARNING and not is_main_process():
            return
        said = record.getMessage()  # without the time, which is another one for each
        if said not in self.told:
            self.told.add(said)
            typer.echo(("lorap: " if record.levelno >= logging.WARNING else "") + self.format(record), err=True)


def tell_next(steps: Sequence[tuple[str, str]], *, quiet: bool, as_json: bool) -> None:
    """What can be done now, a command and what it is for in each line; neither with ``--quiet`` nor with ``--json``."""
    if quiet or as_json:
        return
    width = max(len(command) for command, _ in steps)
    typer.echo("\nnext:\n" + "\n".join(f"  {command.ljust(width)}  # {purpose}" for command, purpose in steps))


@contextmanager
def loading() -> Iterator[None]:
    """Around the imports of what a command runs, behind what can be said without: torch and transformers take seconds.

    A signal ends the process meanwhile, with nothing but its exit code: no exception goes through the middle of an import.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if handlers[signal.SIGINT] is signal.default_int_handler:  # else a shell had it ignored, and it stays so
        signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def user_errors(
    debug: bool, as_json: bool = False, *, unfinished: Callable[[], Path] | None = None
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A mistake of the user ends with one sentence and exit code 2, an interruption with 130 or 143; ``--debug`` shows both.

    Yields the function that prints a command's answer with ``--json``, and does nothing without. With ``--json`` stdout is for
    this one line: whatever the command, or a library, prints meanwhile goes to stderr.

    Args:
        unfinished: tells where work that was interrupted is kept, if it is.
    """
    stdout = sys.stdout

    def answer(value: Mapping[str, Any]) -> None:
        if as_json:
            typer.echo(json.dumps(_finite(value), allow_nan=False), file=stdout)

    try:
        with ExitStack() as stack:
            if as_json:
                stack.enter_context(redirect_stdout(sys.stderr))
            yield answer
    except LoRAPError as error:
        if debug:
            raise
        typer.echo(f"lorap: {as_options(str(error))}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt as error:
        if debug:
            raise
        if unfinished is not None and unfinished().exists():
            left = f"what is finished is kept in {unfinished()}; run the same command again to go on"
        else:
            left = "nothing was written"
        for number in (signal.SIGINT, signal.SIGTERM):  # nobody who asks twice gets tracebacks of Python's own end
            signal.signal(number, signal.SIG_IGN)
        typer.echo(f"lorap: interrupted; {left}", err=True)
        raise typer.Exit(exit_code(error)) from None


def as_options(message: str) -> str:
    """A sentence of the library in the words of the command line, whose options are called like the fields of the configs.

    width_multiple becomes --width-multiple, and target stock --target stock. What is quoted or part of a path stays.
    """
    names = {field.name for config in (CompressionConfig, TuningConfig) for field in fields(config)}
    words = [name for name in sorted(names, reverse=True) if "_" in name]
    words += [f"{name}(?= should )" for name in names]
    words += [f"{name}(?= (?:{'|'.join(values)})\\b)" for name, values in CHOICES.items() if "_" not in name]
    pattern = rf"(?<![\w./'\"`-])(?:{'|'.join(words)})(?![\w./'\"`-])"
    return re.sub(pattern, lambda found: "--" + found[0].replace("_", "-"), message)


def _finite(value: Any) -> Any:
    """The same with null for NaN and infinities, for which JSON has no words."""
    if isinstance(value, Mapping):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Terminated(KeyboardInterrupt):
    """Interrupted by SIGTERM."""


def exit_code(error: KeyboardInterrupt) -> int:
    """As shells number them: 128 and the signal."""
    return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


def interrupt(_signal: int, _frame: Any) -> NoReturn:
    """A signal handler: a killed run cleans up like an interrupted one. `timeout` sends the signal twice."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated
