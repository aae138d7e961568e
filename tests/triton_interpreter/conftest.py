"""Tests that run the Triton kernels on the CPU, in Triton's interpreter.

The interpreter is chosen when a kernel is decorated, so these tests need a process of their own::

    TRITON_INTERPRET=1 pytest tests/triton_interpreter
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    REASON = "triton is not installed"
elif os.environ.get("TRITON_INTERPRET") != "1":
    REASON = "needs a process of its own: TRITON_INTERPRET=1 pytest tests/triton_interpreter"
elif version("triton").startswith("3.6.") and tuple(map(int, version("numpy").split(".")[:2])) >= (2, 4):
    REASON = "the interpreter of triton 3.6 makes numbers of arrays with one element, which numpy refuses from 2.4 on"
else:
    REASON = ""

if REASON:

    @pytest.hookimpl(tryfirst=True)
    def pytest_pycollect_makemodule(module_path: Any, parent: Any) -> Any:
        return _Skipped.from_parent(parent, path=module_path)

    class _Skipped(pytest.Module):
        """A test file that is reported as skipped without being imported: importing it would decorate its kernels."""

        def collect(self) -> Any:
            pytest.skip(REASON, allow_module_level=True)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN (integers: -1), so an element that no kernel writes does not pass for a zero."""

    def poisoned(create: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = create(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

        return make

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
