"""The command line in this process."""

import json
import signal
from typing import Any

from typer.testing import CliRunner

from lorap.cli import app


def run(*arguments: Any, stdin: str | bytes | None = None) -> Any:
    """``lorap`` with these words. It installs handlers of signals; pytest's own come back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def last_json(result: Any) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def assert_refused(result: Any, message: str) -> None:
    """In one sentence, which holds ``message``."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("lorap: ")
    assert message in line
