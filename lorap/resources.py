"""Seconds, bytes and versions: what a report says about the machine."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers

from lorap.version import __version__


class Stopwatch:
    """Seconds by stage: ``with watch("load"): ...``. A stage may run many times; a stage inside another is not counted in it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside = [0.0]  # seconds of the stages inside each open one

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        self._inside.append(0.0)
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds - self._inside.pop()
            self._inside[-1] += seconds


def peak_memory_bytes() -> int:
    """Most memory this process has held at once; 0 where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe_environment(device: torch.device, dtype: str) -> dict[str, Any]:
    """Versions, device, dtype and thread count of a run."""
    return {
        "lorap": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
    }
