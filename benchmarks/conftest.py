"""What is measured is said before it is, and each row of the table fits on a line."""

from __future__ import annotations

import common
import pytest

from lorap.errors import BackendError

COLUMNS = ["median", "iqr", "rounds"]


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("benchmark_columns", None) is None:
        config.option.benchmark_columns = COLUMNS


def pytest_report_header(config: pytest.Config) -> str:
    if config.getoption("benchmark_disable", False):
        return "benchmarks: each runs once, small, as a test"
    try:
        return f"measuring {common.measured()}"
    except BackendError as error:
        raise pytest.UsageError(str(error)) from None
