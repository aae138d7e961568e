"""Seconds by stage: what runs inside a stage is counted once. Peak memory: that of this process alone."""

import platform
import subprocess
import sys

import pytest
import torch

from lorap import system
from lorap.system import Stopwatch


class Clock:
    """Stands still until told otherwise."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(system, "time", clock)
    return clock


def test_a_stage_inside_another_is_not_counted_in_it(clock: Clock) -> None:
    watch = Stopwatch()
    with watch("outer"):
        clock.now += 1
        for _ in range(2):
            with watch("inner"):
                clock.now += 10
    with watch("outer"):
        clock.now += 2
    assert watch.seconds == {"inner": 20, "outer": 3}


def test_a_stage_that_raises_is_counted_and_closed(clock: Clock) -> None:
    watch = Stopwatch()

    def fail() -> None:
        with watch("outer"), watch("inner"):
            clock.now += 5
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    with watch("outer"):
        clock.now += 1
    assert watch.seconds == {"inner": 5, "outer": 1}


def test_peak_memory_is_not_that_of_the_process_that_started_this_one() -> None:
    ballast = torch.ones(2**29)  # 2 GB here must not count there
    command = [sys.executable, "-c", "from lorap.system import peak_memory_bytes; print(peak_memory_bytes())"]
    theirs = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    assert 100e6 < theirs < 2e9 < system.peak_memory_bytes()
    assert ballast[0] == 1


HOLES = """
import torch
from pathlib import Path
from lorap.system import LARGE_MATRIX, release_freed_memory

def resident():
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")).split()[1])

torch.ones(2**23 - 2**10)  # freed, it teaches glibc to keep blocks of up to 32 MB on the heap
before = resident()
blocks = [torch.ones(2**19) for _ in range(300)]  # 629 MB
kept = blocks[-1]  # above all the others
del blocks
held = resident()
release_freed_memory(LARGE_MATRIX - 1)
still = resident()
release_freed_memory(LARGE_MATRIX)
print(1024 * (still - before), 1024 * (held - before), 1024 * (resident() - before), float(kept.sum()))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_below_what_is_in_use_goes_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    after_little, held, left, kept = map(float, done.stdout.split())
    assert held > 500e6
    assert after_little > 500e6
    assert left < 50e6
    assert kept == 2**19
