"""Kill compressions of SmolLM2-135M at random moments, run them again, and compare all bytes with a run left in peace.

    python benchmarks/kill_runs.py --times 20

The last quarter of the kills aims at the end of the run, where files are renamed. The source model is hashed before and after.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from assets import MODEL, WIKI, fetch

OPTIONS = [
    "--recipe",
    "lorap",
    "--num-calibration-samples",
    "4",
    "--calibration-seq-len",
    "64",
    "--eval-text",
    "none",
    "--quiet",
]


def start(out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lorap", "compress", str(MODEL), str(out), "--calibration", str(WIKI), *OPTIONS]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def digest(folder: Path) -> dict[str, str]:
    """Hashes of all files, but for the reports, which tell times."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name not in ("lorap_report.json", "report.html")
    }


def finish(out: Path) -> float:
    """Seconds until a run ends well."""
    begun = time.perf_counter()
    process = start(out)
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"the run ended with {process.returncode}: {errors.decode()[-500:]}")
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    known = parser.parse_args()
    fetch()
    folder = Path(tempfile.mkdtemp(prefix="lorap-kills-"))
    source = digest(MODEL)
    seconds = finish(folder / "whole")
    expected = digest(folder / "whole")
    moments = random.Random(known.seed)
    failures = 0
    for index in range(known.times):
        out = folder / f"out{index}"
        late = index >= known.times * 3 // 4
        moment = seconds * moments.uniform(0.93 if late else 0.2, 1.0 if late else 0.93)
        process = start(out)
        time.sleep(moment)
        ended = process.poll() is not None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        journal = folder / f".out{index}.lorap"
        done = len(list(journal.glob("layer-*.json")))
        if not out.exists():
            finish(out)
        same = digest(out) == expected
        failures += not same
        told = {"at": round(moment, 2), "of": round(seconds, 2), "ended": ended, "layers": done, "same": same}
        print(json.dumps(told), flush=True)
        shutil.rmtree(out)
    unchanged = digest(MODEL) == source
    print(f"{known.times - failures} of {known.times} the same bytes; source {'unchanged' if unchanged else 'CHANGED'}")
    shutil.rmtree(folder)
    sys.exit(failures > 0 or not unchanged)


if __name__ == "__main__":
    main()
