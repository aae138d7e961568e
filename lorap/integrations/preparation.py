"""What must be so before anything else of lorap is imported: ``import lorap`` begins with importing this."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lorap.integrations.after_import import after_import

PACKAGE = Path(__file__).resolve().parents[1]
KERNELS = "lorap.kernels"
PLUG_IN = "lorap.checkpoint.hf_quantizer"


def end_quietly() -> None:
    """Ctrl-C while the command imports ends it with nothing but the exit code; ``lorap.cli.root`` takes over from there.

    Importing takes seconds, nothing has been begun that must be cleaned up, and a traceback through torch helps nobody. A program
    that imports lorap as a library keeps its handler, and so does a job whose shell had it ignore the signal.
    """
    if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)


def leave(_signal: int, _frame: Any) -> NoReturn:
    """A signal handler: the exit code of an interrupted program, at once."""
    os._exit(128 + signal.SIGINT)


def _is_command() -> bool:
    """Whether this process is ``lorap`` or ``python -m lorap``."""
    if Path(sys.argv[0]).stem == "lorap" and Path(sys.argv[0]).suffix in ("", ".exe"):
        return True
    return sys.argv[0] == "-m" and "lorap" in sys.orig_argv[1:]


def find_kernels(package: Path = PACKAGE) -> None:
    """In a clone ``lorap.kernels`` is kernels/triton; a wheel has it inside the package, where Python finds it by itself.

    An installed copy may map the name to its own kernels; those of another version must not be mixed with this code.
    """
    folder = package.parent / "kernels" / "triton"
    if KERNELS in sys.modules or (package / "kernels").is_dir() or not folder.is_dir():
        return
    spec = importlib.util.spec_from_file_location(KERNELS, folder / "__init__.py")
    assert spec
    assert spec.loader
    sys.modules[KERNELS] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["lorap"].kernels = module  # type: ignore[attr-defined]


def prepare_transformers() -> None:
    """Have compressed checkpoints known as soon as transformers' quantizers are imported, which every ``from_pretrained`` does.

    They import torchao wherever it is installed, and it warns of GPU libraries that this machine lacks. lorap does not use it,
    and should not begin with four lines of it. torchao has no option for that: with TORCHAO_FORCE_SKIP_LOADING_SO_FILES=1 it
    warns that it skips them (torchao 0.18, __init__.py).
    """
    after_import(
        "transformers.quantizers.auto",
        lambda: importlib.import_module(PLUG_IN),  # whose last line registers it
        within=lambda: _warnings_dropped("torchao", "torch.utils._pytree"),
    )


@contextmanager
def _warnings_dropped(*loggers: str) -> Iterator[None]:
    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    for name in loggers:
        logging.getLogger(name).addFilter(is_error)
    try:
        yield
    finally:
        for name in loggers:
            logging.getLogger(name).removeFilter(is_error)


end_quietly()
find_kernels()
prepare_transformers()
