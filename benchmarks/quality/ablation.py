"""What each choice of a recipe is worth: the recipe with one choice taken back at a time, on the default mixture.

    python benchmarks/quality/ablation.py                  at 0.2 and 0.5; writes its tables into docs/results.md
    python benchmarks/quality/ablation.py --tables-only    the same, of what has been made so far

The cells lie among those of matrix.py and are not made twice.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cells import Cell
from documents import insert, markdown
from jobs import finish
from matrix import SPARSITIES, add_common, make_cells, out_folder
from records import read_cells
from table import Cells, mean, number
from texts import DEFAULT, SOURCES, assets, gather

RECIPE = "best"
# What is taken back or changed, and the options that do it.
ABLATIONS: Sequence[tuple[str, dict[str, Any]]] = (
    ("all outputs count alike", {"output_weighting": "none"}),
    ("the paper's allocation", {"allocation": "paper", "rank_multiple": 1, "width_multiple": 1}),
    ("channel norms in place of the second moment", {"attention_method": "awsvd"}),
    ("second moment not shrunk", {"metric_shrinkage": 0.0}),
    ("down_proj not refitted", {"repair": False}),
    ("next to no ridge in the refit", {"repair_ridge": 0.001}),
    ("channels scored by what they add to the output", {"channel_score": "output"}),
    ("the least important 1 % of channels stay", {"least_important_kept": 0.01}),
    ("tokens weighted by their hidden state", {"token_weighting": "residual"}),
    ("no correction steps", {"correction_steps": 0}),
    ("statistics again behind each changed part", {"sequential": "sublayer"}),
    ("factor pairs, not pivoted", {"storage": "factors"}),
    ("one shape for all layers", {"shapes": "uniform"}),
    ("mean output of dropped channels into a bias", {"bias_compensation": True}),
)
RESULTS = assets.CACHE.parent / "docs" / "results.md"


def cells_of(sparsities: Sequence[float]) -> list[Cell]:
    """The recipe itself and each of its ablations at each sparsity."""
    options = [{}, *(overrides for _, overrides in ABLATIONS)]
    found = [Cell(recipe=RECIPE, sparsity=sparsity, overrides=one) for sparsity in sparsities for one in options]
    for cell in found:
        cell.config()  # a bad option is refused before any work
    return found


def ablation_table(cells: Cells, sparsity: float) -> str:
    """Increase in nats over the dense model of the whole recipe, and what each ablation that was made adds to it."""
    whole, rows = cells.increase(RECIPE, sparsity), []
    for label, overrides in ((f"`{RECIPE}`", {}), *ABLATIONS):
        name = Cell(recipe=RECIPE, overrides=overrides).recipe_name
        if (record := cells.runs.get((name, sparsity, DEFAULT))) is None:
            continue
        found = cells.increase(name, sparsity) - (whole if overrides else 0)
        rows.append([label, *map(number, [*found, mean(found)]), f"{record['param_ratio']:.4f}"])
    return markdown([f"sparsity {sparsity:g}", *cells.texts, "mean", "kept"], rows)


def main() -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--texts", nargs="+", choices=tuple(SOURCES), default=tuple(SOURCES))
    parser.add_argument("--document", type=Path, default=RESULTS, help="where the tables go")
    parser.add_argument("--tables-only", action="store_true", help="make no cells; rows that have none are left out")
    add_common(parser)
    arguments = parser.parse_args()
    arguments.out = arguments.out or out_folder(arguments.model)
    wanted, failed = cells_of(arguments.sparsities), []
    if not arguments.tables_only:
        failed = make_cells(wanted, gather(arguments.model, arguments.texts, (DEFAULT,)), arguments)
    cells = Cells(read_cells(arguments.out / "cells"))
    text = "\n\n".join(ablation_table(cells, sparsity) for sparsity in arguments.sparsities)
    insert(arguments.document, "ablation", text)
    print(text)
    return failed


if __name__ == "__main__":
    finish(main)
