"""What is measured is said before it is, and each row of the table fits on a line."""

from __future__ import annotations

import common
import pytest

from lorap.errors import BackendError

COLUMNS = ["median", "iqr", "rounds"]


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("benchmark_columns", None) is None:
        config.option.benchmark_columns = COLUMNS


def pytest_sessionstart(session: pytest.Session) -> None:
    """Not in the header, which ``--quiet`` leaves out, and the refusal with it."""
    if session.config.getoption("benchmark_disable", False):
        return
    try:
        found = common.measured()
    except BackendError as error:
        raise pytest.UsageError(str(error)) from None
    if reporter := session.config.pluginmanager.get_plugin("terminalreporter"):
        reporter.write_line(f"measuring {found}")
