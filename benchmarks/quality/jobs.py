"""Commands side by side, each in a process of its own, with one bar for all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from lorap.errors import LoRAPError

POLL_SECONDS = 0.2
ERROR_LINES = 15


@dataclass(frozen=True)
class Job:
    """A command and what to call it."""

    name: str
    command: Sequence[str]


@dataclass(frozen=True)
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    errors: Any  # a temporary file


def run(jobs: Sequence[Job], *, processes: int = 1, threads: int | None = None) -> list[str]:
    """Run all jobs; one that fails does not stop the others. On Ctrl-C what is running is ended, and the exception goes on.

    Args:
        jobs: in this order.
        processes: how many at once.
        threads: of each; by default the cores are divided among the processes.

    Returns:
        The names of the jobs that failed; what they said is on stderr.
    """
    threads = threads or max(1, (os.cpu_count() or 1) // processes)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    waiting, running, failed = list(jobs), [], []
    bar = tqdm(total=len(jobs), unit="cell", disable=not jobs)
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                running.append(_start(waiting.pop(0), environment))
                bar.set_postfix_str(", ".join(one.job.name for one in running))
            ended = [one for one in running if one.process.poll() is not None]
            running = [one for one in running if one not in ended]
            for one in ended:
                failed += _end(one)
                bar.update()
            if not ended:
                time.sleep(POLL_SECONDS)
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait()
        bar.close()
    return failed


def finish(call: Callable[[], list[str]]) -> None:
    """Run a command line's main and turn failures and Ctrl-C into exit codes; being terminated is as Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        failed = call()
    except KeyboardInterrupt:
        print("\ninterrupted; what was finished is kept, and the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None
    except LoRAPError as error:
        raise SystemExit(f"error: {error}") from None
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _start(job: Job, environment: dict[str, str]) -> _Running:
    errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in _end
    process = subprocess.Popen(list(job.command), env=environment, stdout=subprocess.DEVNULL, stderr=errors)
    return _Running(job, process, errors)


def _end(one: _Running) -> list[str]:
    with one.errors as file:
        file.seek(0)
        said = file.read().decode(errors="replace").splitlines()
    if one.process.returncode == 0:
        return []
    tqdm.write("\n".join([f"{one.job.name} failed:", *said[-ERROR_LINES:]]), file=sys.stderr)
    return [one.job.name]
