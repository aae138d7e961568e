"""Open damaged checkpoints and texts for as long as you like:

    python tests/fuzz/run.py --minutes 10                      all targets, by turns
    python tests/fuzz/run.py --minutes 2 --target load         one
    python tests/fuzz/run.py --minutes 2 --engine atheris      guided by the branches of lorap that an input reaches

The first input that breaks the promise of fuzz_targets.py ends the run with its smallest form and exit code 1. atheris is not
among lorap's requirements: pip install atheris.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Shares of the time: opening a model takes 20 ms, the others a few.
SHARES = {"header": 0.1, "pickle": 0.1, "index": 0.1, "info": 0.1, "quantization_config": 0.1, "load": 0.15}
SHARES |= {"doors": 0.1, "texts": 0.1, "gguf": 0.1, "reports": 0.05}
GIBIBYTES = 2  # of address space beyond what the process has after its imports
HANG_SECONDS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="in all (10)")
    parser.add_argument("--target", choices=SHARES, help="only this one")
    parser.add_argument("--engine", choices=("hypothesis", "atheris"), default="hypothesis")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="printed, so that a run can be repeated")
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)  # of the process that does the work
    wanted = parser.parse_args()
    if wanted.place:
        _fuzz(wanted.target, wanted.engine, 60 * wanted.minutes, wanted.seed, wanted.place)
        return
    memory = Path("/dev/shm")  # on a disk, writing would take most of the time
    print(f"seed {wanted.seed}", flush=True)
    total = 0
    for target in [wanted.target] if wanted.target else SHARES:
        minutes = wanted.minutes * (1.0 if wanted.target else SHARES[target])
        options = ["--minutes", str(minutes), "--target", target, "--engine", wanted.engine, "--seed", str(wanted.seed)]
        # libFuzzer ends its process without cleaning up, so the folder is not that process's own.
        with (
            tempfile.TemporaryFile("w+") as log,
            tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as place,
        ):
            environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            command = [sys.executable, __file__, "--place", place, *options]
            run = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, check=False)
            lines = [line for line in run.stdout.splitlines() if line.startswith("{")]
            if run.returncode or not lines:
                log.seek(0)
                print(run.stdout, log.read()[-20_000:], sep="\n")
                raise SystemExit(1)
        counts = json.loads(lines[-1])
        total += counts["inputs"]
        print(
            f"{target:20} {counts['inputs']:8,} inputs in {minutes:4.1f} min: {counts['refused']:,} refused, "
            f"{counts['opened']:,} opened, slowest {counts['slowest']:.2f} s",
            flush=True,
        )
    print(f"{total:,} inputs, no failure")


def _fuzz(target: str, engine: str, seconds: float, seed: int, place: Path) -> None:
    if engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["lorap"]):
            import lorap.checkpoint.load  # noqa: F401
    sys.path.append(str(Path(__file__).parents[1]))
    import fuzz_targets
    from hypothesis import HealthCheck, settings
    from hypothesis import seed as with_seed

    folders = fuzz_targets.Folders(place)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + GIBIBYTES * 2**30,) * 2)
    quiet = settings(max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    end = time.monotonic() + seconds
    if engine == "atheris":
        one_input = quiet(folders.target(target)).hypothesis.fuzz_one_input

        def watched(data: bytes) -> None:
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
            one_input(data)
            if time.monotonic() > end:  # libFuzzer ends the process without asking anybody
                _print_counts(fuzz_targets)

        limits = [f"-max_total_time={int(seconds) + 2}", "-timeout=60", "-rss_limit_mb=8192", "-max_len=20000"]
        options = [*limits, "-len_control=0", f"-seed={seed}", f"-artifact_prefix={tempfile.gettempdir()}/"]
        atheris.Setup([sys.argv[0], *options], watched)
        atheris.Fuzz()
    for turn in range(sys.maxsize):
        if time.monotonic() > end:
            break
        faulthandler.dump_traceback_later(60 * HANG_SECONDS, exit=True)
        with_seed(seed + turn)(quiet(folders.target(target)))()
    _print_counts(fuzz_targets)


def _print_counts(fuzz_targets: Any) -> None:
    outcomes = fuzz_targets.outcomes
    counts = {what: sum(n for (_, outcome), n in outcomes.items() if outcome == what) for what in ("refused", "opened")}
    print(json.dumps(counts | {"inputs": sum(counts.values()), "slowest": fuzz_targets.slowest()}), flush=True)


if __name__ == "__main__":
    main()
