"""The modules of benchmarks/quality by name, and gone again afterwards: ``table`` is also the name of a file in benchmarks."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
NAMES = [
    path.stem
    for folder in (BENCHMARKS, BENCHMARKS / "quality")
    for path in folder.glob("*.py")
    if path.stem != "conftest"
]


class _Modules:
    def __getattr__(self, name: str) -> Any:
        return importlib.import_module(name)


@contextmanager
def quality_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Modules]:
    """Attributes are modules, imported when they are asked for."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "quality"))
    before = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    path = list(sys.path)
    yield _Modules()
    sys.path[:] = path
    for name in NAMES:
        sys.modules.pop(name, None)
    sys.modules.update(before)
