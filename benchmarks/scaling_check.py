"""`lorap plan` beside `lorap compress` on models that are small enough to try: sizes, peak memory and time in one table.

    python benchmarks/scaling_check.py                          prints the table, of what was measured last of each run
    python benchmarks/scaling_check.py --write docs/scaling.md  and writes it between its markers
    python benchmarks/scaling_check.py --runs smollm2-best      measures this one alone
    python benchmarks/scaling_check.py --runs --write docs/scaling.md     measures nothing

What was measured last is kept in results/scaling.json. Each command is a process of its own. With --processor-time all seconds
are those that the process has been given, as on a busy machine; with one thread these are what it would take alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import assets
import numpy as np
import torch
from documents import insert, markdown
from streaming import llama, make_model

from lorap.checkpoint.load import find_model
from lorap.compression.estimate.estimate import duration, quantity
from lorap.evaluation.info import describe_model

RESULTS = Path(__file__).resolve().parent / "results" / "scaling.json"
# By name: the model, the recipe, the sparsity, and windows of 128 tokens.
RUNS = {
    "smollm2-lorap": ("SmolLM2-135M", "lorap", 0.5, 64),
    "smollm2-best": ("SmolLM2-135M", "best", 0.5, 24),
    "7b": ("4 layers of LLaMA-2-7B", "lorap", 0.2, 8),
    "1b": ("4 layers of Llama-3.2-1B", "lorap", 0.5, 32),
}


def prepared(model: str, folder: Path, *, windows: int) -> tuple[Path, list[object]]:
    """Where the model is, and options that go with it: one with random weights has no tokenizer, so it reads token ids."""
    if model.startswith("SmolLM2"):
        assets.fetch()
        return assets.MODEL, []
    layers, _, _, shapes = model.split()
    config = llama(shapes, int(layers))
    make_model(folder / "dense", config)
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, config.vocab_size, (windows, 128)))
    np.save(folder / "others.npy", np.random.default_rng(1).integers(0, config.vocab_size, (4, 128)))
    texts = ["--calibration", folder / "tokens.npy", "--eval-text", folder / "others.npy", "--dtype", "float32"]
    return folder / "dense", texts


def lorap(*arguments: object, clock: str) -> dict[str, Any]:
    """The last line of a command whose seconds are those of the given clock."""
    program = f"import time; time.perf_counter = time.{clock}; from lorap.cli import main; main()"
    command = [sys.executable, "-c", program, *map(str, arguments), "--json", "--quiet"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(model: str, recipe: str, sparsity: float, windows: int, *, clock: str) -> dict[str, Any]:
    """Plan, then run."""
    with tempfile.TemporaryDirectory() as name:
        path, options = prepared(model, Path(name), windows=windows)
        options += ["--recipe", recipe, "--sparsity", sparsity, "--num-calibration-samples", windows]
        plan = lorap("plan", path, *options, "--out", name, clock=clock)
        run = lorap("compress", path, Path(name) / "small", *options, clock=clock)
        saved = describe_model(find_model(Path(name) / "small"))
    return {
        "model": model,
        "recipe": recipe,
        "sparsity": sparsity,
        "windows": windows,
        "threads": torch.get_num_threads(),
        "clock": "processor time" if clock == "process_time" else "wall time",
        "exact": plan["exact"],
        "bytes": [plan["bytes"], saved["bytes"]],
        "memory": [plan["memory_bytes"], run["peak_memory_bytes"]],
        "seconds": [plan["seconds"], sum(run["seconds"].values())],
        "stages": {
            stage["name"]: [stage["seconds"], run["seconds"].get(stage["name"], 0.0)] for stage in plan["stages"]
        },
        "trial": {name: plan["trial"][name] for name in ("layers", "windows")}
        | {"seconds": sum(plan["trial"]["tried"].values())},
    }


def row(found: Mapping[str, Any]) -> list[str]:
    cells = [
        found["model"],
        f"`{found['recipe']}`, {found['sparsity']}, {found['windows']}",
        duration(found["trial"]["seconds"]),
    ]
    for name, shown in (("bytes", quantity), ("memory", quantity), ("seconds", duration)):
        planned, measured = (shown(value) if shown is duration else shown(value, "B") for value in found[name])
        ratio = f"{found[name][0] / found[name][1]:.2f}"
        if name == "bytes":
            ratio = "equal" if found[name][0] == found[name][1] else f"{ratio}, by the budget"
        cells += [planned, measured, ratio]
    return cells


def table(kept: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each run."""
    header = ["model", "recipe, sparsity, windows", "plan took"]
    header += [
        f"{what}{part}"
        for what in ("bytes", "peak memory", "time")
        for part in (" planned", " measured", ", planned / measured")
    ]
    how = sorted({f"{found['clock']} of {found['threads']} thread(s)" for found in kept.values()})
    rows = [row(kept[name]) for name in RUNS if name in kept]
    return f"Times are {', '.join(how)}.\n\n{markdown(header, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="*", choices=RUNS, default=RUNS)
    parser.add_argument("--processor-time", action="store_true", help="on a busy machine; with one thread")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the text between the markers in FILE")
    options = parser.parse_args()
    for name in options.runs:
        found = measure(*RUNS[name], clock="process_time" if options.processor_time else "perf_counter")
        kept = (json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}) | {name: found}
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    kept = json.loads(RESULTS.read_text("utf-8"))
    print(table(kept))
    if options.write is not None:
        insert(options.write, "scaling", table(kept))


if __name__ == "__main__":
    main()
