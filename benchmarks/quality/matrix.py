"""Compare recipes: every recipe at every sparsity, calibrated on every source, judged on every text.

    python benchmarks/quality/matrix.py                    all of it; hours on a few cores, and it may be interrupted
    python benchmarks/quality/matrix.py --quick            a small corner of it in five minutes
    python benchmarks/quality/matrix.py --recipes lorap lorap+mlp_method=factorize --calibrations default

Each cell is one JSON file in OUT/cells; cells that are there already are not made again. At the end table.md and quality.svg
are written from all cells in OUT.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import table
from cells import CALIBRATION_WINDOWS, TOKENS, Cell, is_done, specification
from jobs import Job, finish, run
from records import DENSE, add_dense
from rivals import RIVALS
from texts import CALIBRATIONS, DEFAULT, SOURCES, Material, assets, gather

from lorap.config import RECIPES

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "results" / "quality"
WANTED = ("lorap", "best", "svd-llm", "aa-svd", "flap", "modegpt", "slicegpt")
SPARSITIES = (0.2, 0.5)
QUICK = {"calibrations": (DEFAULT, "wiki"), "texts": ("wiki", "web", "wells"), "sparsities": (0.2,)}
QUICK_RECIPES = ("lorap", "best")
QUICK_TOKENS, QUICK_WINDOWS = 2000, 32


def parse_recipe(text: str) -> tuple[str, dict[str, Any]]:
    """``NAME+option=value+...`` as a name and options; values are JSON where they can be read as such."""
    name, *options = text.split("+")
    overrides = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise SystemExit(f"{text}: {option} is no option; write RECIPE+option=value")
        try:
            overrides[key] = json.loads(value)
        except json.JSONDecodeError:
            overrides[key] = value
    return name, overrides


def make_cells(
    cells: Sequence[Cell], material: Material, arguments: argparse.Namespace, *, count: int = TOKENS
) -> list[str]:
    """Make the cells that are not there yet, the dense model's first; returns the names of those that failed."""
    folder = arguments.out / "cells"
    jobs = []
    for cell in [Cell(recipe=DENSE), *cells]:
        given = specification(cell, material, count=count, long_probes=not arguments.no_long)
        path = folder / f"{cell.name}.json"
        if (arguments.force and cell.recipe != DENSE) or not is_done(path, given):
            command = [sys.executable, str(HERE / "cells.py"), json.dumps(given | {"out": str(path)})]
            jobs.append(Job(cell.name, command))
    print(f"{len(cells) + 1} cells, {len(jobs)} to make", file=sys.stderr)
    try:
        return run(jobs, processes=arguments.processes, threads=arguments.threads)
    finally:  # cells that were ready before the dense one do not know it yet
        add_dense(folder)


def all_cells(arguments: argparse.Namespace) -> list[Cell]:
    """The default mixture's cells first: they take longest, and answer most."""
    cells = []
    for calibration in sorted(arguments.calibrations, key=lambda name: name != DEFAULT):
        for sparsity in arguments.sparsities:
            for name, overrides in map(parse_recipe, arguments.recipes):
                found = Cell(
                    recipe=name,
                    sparsity=sparsity,
                    calibration=calibration,
                    overrides=overrides,
                    windows=arguments.windows,
                )
                found.config()  # a bad option is refused before any work
                cells.append(found)
    return cells


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with what --quick and the recipes of this version make of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 calibrations, 3 texts, 2 recipes at 0.2, less text")
    parser.add_argument("--recipes", nargs="+", help=f"NAME or NAME+option=value (default: {' '.join(WANTED)})")
    parser.add_argument("--sparsities", nargs="+", type=float)
    parser.add_argument("--calibrations", nargs="+", choices=CALIBRATIONS)
    parser.add_argument("--texts", nargs="+", choices=tuple(SOURCES))
    parser.add_argument("--tokens", type=int, help=f"of each text (default: {TOKENS})")
    parser.add_argument("--windows", type=int, help=f"to calibrate on (default: {CALIBRATION_WINDOWS})")
    add_common(parser)
    arguments = parser.parse_args(argv)
    quick = arguments.quick
    usual = {"calibrations": CALIBRATIONS, "texts": tuple(SOURCES), "sparsities": SPARSITIES}
    usual["recipes"] = [name for name in (QUICK_RECIPES if quick else WANTED) if name in RECIPES or name in RIVALS]
    usual["tokens"], usual["windows"] = (QUICK_TOKENS, QUICK_WINDOWS) if quick else (TOKENS, CALIBRATION_WINDOWS)
    usual["out"] = assets.QUALITY / "quick" if quick else out_folder(arguments.model)
    for name, value in (usual | (QUICK if quick else {})).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def out_folder(model: Path) -> Path:
    """Results of another model than the usual one are kept apart."""
    return OUT if model == assets.MODEL else OUT / model.name


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of every command here."""
    parser.add_argument("--model", type=Path, default=assets.MODEL, help="folder of the dense model")
    parser.add_argument("--out", type=Path, help="folder of what is written (default: benchmarks/results/quality)")
    parser.add_argument("--processes", type=int, default=1, help="cells made at once")
    parser.add_argument("--threads", type=int, help="of each process (default: the cores are divided)")
    parser.add_argument("--no-long", action="store_true", help="leave out the long probes of the default mixture")
    parser.add_argument("--force", action="store_true", help="make cells again, as after a change of the library")


def main() -> list[str]:
    arguments = parse()
    cells = all_cells(arguments)
    material = gather(arguments.model, arguments.texts, arguments.calibrations)
    failed = make_cells(cells, material, arguments, count=arguments.tokens)
    print(table.write(arguments.out))
    return failed


if __name__ == "__main__":
    finish(main)
