"""Tables and a plot of all cells: python benchmarks/quality/table.py [OUT]

A cell that was not made is shown as "-", and so is every mean that it belongs to.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import plot
from cells import LONG, Cell
from records import DENSE, read_cells
from texts import CALIBRATIONS, DEFAULT, SOURCES

BASELINE = "lorap"
BEST = "best"
OUT = Path(__file__).resolve().parent.parent / "results" / "quality"
Record = dict[str, Any]


class Cells:
    """All cells of a folder, by recipe (with its overrides), sparsity and calibration."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = list(records)
        self._found = {
            (Cell(**record["cell"]).recipe_name, record["cell"]["sparsity"], record["cell"]["calibration"]): record
            for record in self.compressed
        }

    @property
    def compressed(self) -> list[Record]:
        return [record for record in self.records if record["cell"]["recipe"] != DENSE]

    @property
    def recipes(self) -> list[str]:
        """The baseline first, the best next, then by name."""
        first = {BASELINE: 0, BEST: 1}
        return sorted({key[0] for key in self._found}, key=lambda name: (first.get(name, 2), name))

    @property
    def sparsities(self) -> list[float]:
        return sorted({key[1] for key in self._found})

    @property
    def calibrations(self) -> list[str]:
        return [name for name in CALIBRATIONS if name in {key[2] for key in self._found}]

    @property
    def texts(self) -> list[str]:
        return [name for name in SOURCES if any(name == entry["text"] for r in self.records for entry in r["texts"])]

    def get(self, recipe: str, sparsity: float, calibration: str = DEFAULT) -> Record | None:
        """The record of one cell, or None."""
        return self._found.get((recipe, sparsity, calibration))

    def increase(self, recipe: str, sparsity: float, calibration: str, text: str) -> float | None:
        """Nats per token over the dense model."""
        return increase(self.get(recipe, sparsity, calibration), text)

    def ratio(self, recipe: str, sparsity: float, calibration: str, text: str) -> float | None:
        """The increase of a recipe over that of the baseline; None where the baseline loses nothing."""
        ours, theirs = (self.increase(name, sparsity, calibration, text) for name in (recipe, BASELINE))
        return None if ours is None or theirs is None or theirs <= 0 else ours / theirs


def increase(record: Record | None, text: str, size: tuple[int, int] | None = None) -> float | None:
    """Nats per token over the dense model on a text; on its main windows, or on ``size`` = (tokens, seq_len)."""
    for entry in record["texts"] if record else ():
        wanted = entry["main"] if size is None else (entry["tokens_asked"], entry["seq_len"]) == size
        if entry["text"] == text and wanted and entry["dense_nats"] is not None:
            return entry["nats"] - entry["dense_nats"]
    return None


def mean(values: Iterable[float | None]) -> float | None:
    """None where one is missing: a mean over other texts is another number."""
    found = list(values)
    return None if not found or None in found else statistics.fmean(found)  # type: ignore[arg-type]


def same_kind(calibration: str, text: str) -> bool:
    """The calibration is of the domain of the text; the default mixture is of none."""
    return calibration in SOURCES and SOURCES[calibration].kind == SOURCES[text].kind


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, form: str = "+.3f") -> str:
    return "-" if value is None else format(value, form)


def cross_table(cells: Cells, sparsity: float) -> str:
    """Calibration by text: increase of the baseline, of the best, and the ratio; same-kind cells are bold."""

    def entry(calibration: str, text: str) -> str:
        ours, theirs = (cells.increase(name, sparsity, calibration, text) for name in (BEST, BASELINE))
        ratio = cells.ratio(BEST, sparsity, calibration, text)
        shown = f"{number(theirs)} / {number(ours)} ({number(ratio, '.2f')})"
        return f"**{shown}**" if same_kind(calibration, text) else shown

    rows = [[calibration, *(entry(calibration, text) for text in cells.texts)] for calibration in cells.calibrations]
    return markdown(["calibration", *cells.texts], rows)


def summary(cells: Cells, sparsity: float) -> str:
    """Ratios to the baseline by recipe: same kind, other kinds, the worst cell of all, and the default mixture."""
    rows = []
    for recipe in cells.recipes:
        pairs = {(c, t): cells.ratio(recipe, sparsity, c, t) for c in cells.calibrations for t in cells.texts}
        if recipe == BASELINE or not any(value is not None for value in pairs.values()):
            continue
        same = [value for (c, t), value in pairs.items() if same_kind(c, t)]
        other = [value for (c, t), value in pairs.items() if c != DEFAULT and not same_kind(c, t)]
        default = [value for (c, _), value in pairs.items() if c == DEFAULT]
        worst, where = max((value, f"{c} -> {t}") for (c, t), value in pairs.items() if value is not None)
        made = f"{sum(value is not None for value in pairs.values())} of {len(pairs)}"
        means = [number(mean(values), ".3f") for values in (same, other, default)]
        rows.append([recipe, *means, f"{worst:.3f} ({where})", made])
    header = ["recipe", "same kind", "other kinds", "default mixture", "worst", "cells"]
    return markdown(header, rows) if rows else "No recipe was measured beside the baseline."


def recipe_table(cells: Cells, sparsity: float) -> str:
    """Every recipe, calibrated on the default mixture: quality on all texts, and what it cost."""
    rows = []
    for recipe in cells.recipes:
        record = cells.get(recipe, sparsity)
        if record is None:
            continue
        whole = record["params_saved"] / record["params_total_before"]
        work = sum(seconds for stage, seconds in record["seconds"].items() if stage not in ("load", "evaluate"))
        sizes = [None, *LONG]
        losses = [number(mean(increase(record, text, size) for text in cells.texts)) for size in sizes]
        ratio = mean(cells.ratio(recipe, sparsity, DEFAULT, text) for text in cells.texts)
        cost = [f"{work:.0f}", str(record["environment"]["threads"]), f"{record['peak_memory_bytes'] / 1e9:.2f} GB"]
        rows.append([recipe, f"{record['param_ratio']:.4f}", f"{whole:.4f}", *losses, number(ratio, ".3f"), *cost])
    longer = [f"{tokens // 1000},000 tokens, windows of {seq_len}" for tokens, seq_len in LONG]
    header = [
        "recipe",
        "kept",
        "of the whole model",
        "mean nats",
        *longer,
        "mean ratio",
        "seconds",
        "threads",
        "memory",
    ]
    return markdown(header, rows) if rows else "-"


def text_table(cells: Cells) -> str:
    """The texts, and the dense model's loss on them."""
    dense = next((record for record in cells.records if record["cell"]["recipe"] == DENSE), {"texts": []})
    rows = []
    for text in cells.texts:
        found = [entry for record in [dense, *cells.records] for entry in record["texts"] if entry["text"] == text]
        entry = next((one for one in found if one["main"]), found[0])
        size = f"{entry['tokens']:,} in windows of {entry['seq_len']}"
        loss = entry["dense_nats"]
        rows.append([text, entry["kind"], entry["origin"], size, number(loss, ".3f")])
    return markdown(["text", "kind", "from", "tokens", "dense nats"], rows)


def render(cells: Cells) -> str:
    """The whole document."""
    code = {record["code_sha256"] for record in cells.compressed}
    parts = [
        "# Recipes compared",
        "Written by `benchmarks/quality/table.py` from the cells beside it. All losses are increases over the dense model in "
        "nats per token. `-` was not measured.",
        text_table(cells),
    ]
    if len(code) > 1:
        parts.append(f"These cells were made by {len(code)} states of the library's code; `--force` makes them again.")
    for sparsity in cells.sparsities:
        parts += [
            f"## Sparsity {sparsity:g}",
            "Calibrated on the default mixture, means over all texts; seconds and memory of the compression alone.",
            recipe_table(cells, sparsity),
            f"Increase over that of `{BASELINE}` with the same calibration, as the mean of ratios; below 1 is better.",
            summary(cells, sparsity),
            f"`{BASELINE}` / `{BEST}` (ratio) by calibration and text; in bold where both are of one kind.",
            cross_table(cells, sparsity),
        ]
    return "\n\n".join([*parts, "![Increase by recipe and text](quality.svg)"]) + "\n"


def write(out: Path) -> Path:
    """table.md, quality.svg and sizes.svg of a folder of cells."""
    cells = Cells(read_cells(out / "cells"))
    path = out / "table.md"
    path.write_text(render(cells), "utf-8")
    plot.draw(cells, out / "quality.svg")
    plot.draw_sizes(cells, out / "sizes.svg")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=OUT, help="folder with cells/")
    print(write(parser.parse_args().out))
