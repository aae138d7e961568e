"""Seconds, bytes and versions: what a report says about the machine."""

from __future__ import annotations

import ctypes
import logging
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from lorap.errors import ConfigError
from lorap.version import __version__

_logger = logging.getLogger(__name__)


class Stopwatch:
    """Seconds by stage: ``with watch("load"): ...``. A stage may run many times; a stage inside another is not counted in it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside = [0.0]  # seconds of the stages inside each open one

    def since(self, earlier: Mapping[str, float]) -> dict[str, float]:
        """Seconds by stage that were spent after ``earlier``, a copy of ``seconds``."""
        spent = {stage: seconds - earlier.get(stage, 0.0) for stage, seconds in self.seconds.items()}
        return {stage: seconds for stage, seconds in spent.items() if seconds > 0}

    def add(self, spent: Mapping[str, float]) -> None:
        """Count seconds that an earlier process spent."""
        for stage, seconds in spent.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

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
            _logger.debug("%s took %.2f s", stage, seconds)


def peak_memory_bytes() -> int:
    """Most memory this process has held at once; 0 where the system does not tell (Windows).

    Linux's own mark comes first: ``ru_maxrss`` starts at what the process that started this one had held by then.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text("utf-8")) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# Numbers in a matrix from which on it is worth it. Each call costs 10 ms, and what is needed again comes back page by page:
# SmolLM2 (0.9 million) took 97 s in place of 87 for 128 MB less.
LARGE_MATRIX = 2**22


def release_freed_memory(largest: int) -> None:
    """Give the system what is free already, after work on matrices of up to ``largest`` numbers.

    Does nothing where that is little, or where the C library is not glibc.

    glibc gives back large blocks at once, but of blocks up to 32 MB only what lies at the end of the heap: after planning 12
    layers 2,304 wide a process held 1,452 MB, of which 650 were in use.
    """
    if largest >= LARGE_MATRIX and (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def parse_bytes(text: str | int) -> int:
    """``3GB``, ``500M``, ``2GiB``, ``1e9`` or a plain number, in bytes.

    Raises:
        ConfigError: it is no size.
    """
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d*)?(?:E\+?\d{1,2})?)\s*([KMGT]?I?)B?\s*", str(text).upper())
    if not found or found[2] not in units or float(found[1]) * units[found[2]] < 1:
        raise ConfigError(f"{text!r} is no size; write it like 3GB, 500MB or 2GiB")
    return int(float(found[1]) * units[found[2]])


def free_memory_bytes(device: torch.device) -> int:
    """What programs can still have of a device's memory, without swapping; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 0


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
