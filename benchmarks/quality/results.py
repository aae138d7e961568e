"""All tables of docs/results.md, and the files that it leads to, from the cells that are there: nothing is measured.

    python benchmarks/quality/results.py [DOCUMENT]

The table of ``lorap compare`` is the one that is not made here: its numbers are of a run on one machine (docs/compare.md).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import bits
import budgets_report
import pandas as pd
import table
from ablation import RESULTS, ablation_table
from documents import insert, markdown
from matrix import SPARSITIES
from records import DENSE, read_cells
from table import BEST, OUT, Cells, mean, number
from tasks import AGAINST, TASKS, answers, average_of, estimate, percent, render
from texts import DEFAULT

FEW = OUT.parent / "few"
# Without correction steps, and other choices as the recipe once made them.
UNCORRECTED = f"{BEST}+channel_score=output+correction_steps=0+sequential=sublayer+token_weighting=residual"
LABELS = {
    DEFAULT: "default mixture",
    "wiki": "encyclopedia",
    "web": "web pages",
    "news": "newswire",
    "wells": "a novel",
    "python": "language reference",
}


def share_table(cells: Cells, recipe: str, last: str) -> str:
    """The increase of a recipe over that of the baseline by calibration, mean over texts of its kind and of others."""
    columns = {}
    for sparsity in SPARSITIES:
        ratios, kinds = cells.ratios(recipe, sparsity), cells.kinds()
        for kind in ("same", "other"):
            wanted = (kinds == kind) | (kinds == DEFAULT if kind == "other" else False)
            found = {name: mean(ratios.loc[name][wanted.loc[name]]) for name in ratios.index}
            columns[f"{sparsity:g}, {'same kind' if kind == 'same' else 'other kinds'}"] = found
    shares = pd.DataFrame(columns).dropna(how="all")
    shares.loc[last] = shares.drop(DEFAULT).mean()
    rows = [[LABELS.get(name, name), *(number(one, ".2f") for one in row)] for name, row in shares.iterrows()]
    return markdown(["calibrated on", *shares.columns], rows)


def few_table(cells: Cells) -> str:
    """Baseline and best by sparsity and text, and the mean of the ratios."""
    rows = []
    for sparsity in cells.sparsities:
        theirs, ours = (cells.increase(recipe, sparsity) for recipe in (table.BASELINE, BEST))
        losses = [f"{number(theirs[text])} / {number(ours[text])}" for text in cells.texts]
        rows.append([f"{sparsity:g}", *losses, number(mean(cells.ratio(BEST, sparsity)), ".2f")])
    return markdown(["sparsity", *(LABELS[text] for text in cells.texts), "mean ratio"], rows)


def task_table(records: Sequence[table.Record]) -> str:
    """Accuracies in percent, and their mean with its standard error."""
    rows = []
    for record in sorted(
        records, key=lambda one: (one["cell"]["sparsity"], one["name"] != DENSE, one["name"][0] != "l")
    ):
        right = [answers(record, task) or [] for task in TASKS]
        name = f"`{record['cell']['recipe']}` {record['cell']['sparsity']:g}" if record["name"] != DENSE else DENSE
        rows.append(
            [name, *(f"{100 * mean(one):.1f}" for one in right), percent(average_of([estimate(one) for one in right]))]
        )
    return markdown(["", *TASKS, "average"], rows)


def write(document: Path) -> None:
    """Everything."""
    for folder in (OUT, FEW):
        table.write(folder)
    cells, tasks = Cells(read_cells(OUT / "cells")), read_cells(OUT / "tasks")
    (OUT / "tasks.md").write_text(render(tasks, AGAINST), "utf-8")
    insert(document, "shares", share_table(cells, BEST, "mean of the five single ones"))
    insert(document, "uncorrected", share_table(cells, UNCORRECTED, "mean"))
    insert(document, "few tokens", few_table(Cells(read_cells(FEW / "cells"))))
    insert(document, "tasks", task_table(tasks))
    insert(document, "bits", bits.table({record["cell"]: record for record in read_cells(bits.OUT)}))
    found = OUT / "budgets"
    budgets_report.write({record["cell"]: record for record in read_cells(found)}, found, document)
    insert(document, "ablation", "\n\n".join(ablation_table(cells, sparsity) for sparsity in SPARSITIES))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path, nargs="?", default=RESULTS)
    write(parser.parse_args().document)
