"""Runs the steps of gpu_check.sh, each in processes of its own with a time limit, and reports what they found.

Imports neither torch nor lorap: a step that hangs or crashes takes nothing along.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import gpu_report

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = {"check": 340, "tune": 340}
NO_TIME, NOT_DRY, NO_GPU = -1, -2, 3


@dataclass(frozen=True)
class Step:
    """``name`` of gpu_check.py in ``shards`` processes, for at most ``limit`` seconds; ``dry``: part of a dry run too."""

    name: str
    limit: int
    shards: int = 1
    dry: bool = True


# What is cheap and decides the rest comes first. "compile" fills Triton's cache on all cores for the steps after it.
PLANS = {
    "check": (
        Step("environment", 30),
        Step("build", 90, dry=False),
        Step("program", 60, dry=False),
        Step("sanitizer", 60, dry=False),
        Step("compile", 60, shards=12),
        Step("self-check", 60, shards=4),
        Step("self-check-cuda", 25),
        Step("values", 75, shards=12),
        Step("values-cuda", 25),
        Step("graphs", 30),
        Step("graphs-cuda", 20),
        Step("timings", 90),
        Step("timings-cuda", 25),
        Step("merged", 25),
        Step("merged-cuda", 10),
        Step("quantized", 20),
        Step("quantized-cuda", 15),
        Step("trellis", 15),
        Step("launches", 15),
        Step("squares", 15),
        Step("out-dtype", 10),
        Step("factorization", 40),
    ),
    "tune": (
        Step("environment", 30),
        Step("build", 90, dry=False),
        Step("sweep-compile", 70, shards=12, dry=False),
        Step("sweep", 80, dry=False),
        Step("models", 170),
        Step("layer", 30),
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=(ROOT / "benchmarks/gpu_check.sh").read_text())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", choices=PLANS)
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), help="folder for all rows and the report")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, small: tests this program")
    parser.add_argument("--seconds", type=int, help="time limit of the whole command")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="gpu-check-"))
    work = out.resolve() / options.command
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    os.environ["LORAP_CHECK_CUDA_LIBRARY"] = str(work / "lorap_cuda.so")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))  # with what is known so far
    try:
        no_gpu = run_all(
            PLANS[options.command], work, options.seconds or TOTAL_SECONDS[options.command], options.dry_run
        )
    finally:
        wrong = gpu_report.finish(work, dry_run=options.dry_run)
    if no_gpu:
        print("gpu_check.sh: torch sees no GPU here; --dry-run tests this program without one", file=sys.stderr)
    return 2 if no_gpu else int(wrong)


def run_all(plan: tuple[Step, ...], work: Path, seconds: float, dry_run: bool) -> bool:
    """True where there is no GPU, and so nothing to do."""
    end = time.monotonic() + seconds
    for step in plan:
        start = time.monotonic()
        limit = min(step.limit, end - start)
        if dry_run and not step.dry:
            code = NOT_DRY
        elif limit < 4:
            code = NO_TIME
        else:
            code = run(step, work, limit, dry_run)
        with (work / "steps.tsv").open("a") as file:
            file.write(f"{step.name}\t{code}\t{time.monotonic() - start:.0f}\t{step.limit}\n")
        if step.name == "environment" and code == NO_GPU:
            return True
    return False


def run(step: Step, work: Path, limit: float, dry_run: bool) -> int:
    """Exit code of the step: that of the first process that failed; 124 where it was cut off."""
    print(f"-- {step.name}, at most {limit:.0f} s", file=sys.stderr, flush=True)
    shards = 1 if dry_run else step.shards
    command = [sys.executable, str(ROOT / "benchmarks/gpu_check.py"), step.name, "--work", str(work)]
    command += ["--dry-run"] if dry_run else []
    end, processes = time.monotonic() + limit, []
    for i in range(shards):
        # A group of its own, so that what it started ends with it.
        processes.append(
            subprocess.Popen([*command, f"--shard={i}/{shards}"], stdout=sys.stderr, start_new_session=True)
        )
    codes = []
    try:
        for process in processes:
            try:
                codes.append(process.wait(max(0.1, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                codes.append(124)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    raise SystemExit(main())
