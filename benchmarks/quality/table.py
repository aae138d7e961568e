"""Tables and pictures of all cells of a folder: table.md, quality.svg and sizes.svg; python benchmarks/quality/table.py [OUT]

A cell that was not made is shown as "-", and so is every mean that it belongs to.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import plot
from cells import COMPARED_TOKENS, LONG, Cell
from documents import markdown
from records import DENSE, read_cells
from texts import CALIBRATIONS, DEFAULT, SOURCES

BASELINE = "lorap"
BEST = "best"
OUT = Path(__file__).resolve().parent.parent / "results" / "quality"
Record = dict[str, Any]


class Cells:
    """All cells of a folder; losses are nats per token over the dense model, NaN where one was not measured.

    Args:
        records: what the cells' files hold.

    Attributes:
        runs: a row for each compressed cell, by recipe (with its overrides), sparsity and calibration.
        losses: a row for each text and size that one was judged on.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = list(records)
        runs, losses = {}, []
        for record in self.records:
            cell = record["cell"]
            key = (Cell(**cell).recipe_name, cell["sparsity"], cell["calibration"])
            losses += [dict(zip(_KEY, key, strict=True)) | entry for entry in record["texts"]]
            if cell["recipe"] != DENSE:
                runs[key] = record
        self.runs = runs
        self.losses = pd.DataFrame(
            losses, columns=[*_KEY, "text", "main", "tokens_asked", "seq_len", "nats", "dense_nats", *_FIDELITY]
        )
        self.losses["increase"] = self.losses.nats - self.losses.dense_nats.astype(float)
        for measure in _FIDELITY:
            self.losses[measure] = self.losses[measure].astype(float)
        self.texts = [name for name in SOURCES if name in set(self.losses.text)]
        self.calibrations = [name for name in CALIBRATIONS if name in {key[2] for key in runs}]
        self.sparsities = sorted({key[1] for key in runs})
        # The baseline first, the best next, then by name.
        first = {BASELINE: 0, BEST: 1}
        self.recipes = sorted({key[0] for key in runs}, key=lambda name: (first.get(name, 2), name))
        self._increases: dict[Any, pd.DataFrame] = {}

    def increase(
        self, recipe: str, sparsity: float, calibration: str = DEFAULT, size: tuple[int, int] | None = None
    ) -> pd.Series:
        """By text; on its main windows, or on ``size`` = (tokens, seq_len)."""
        if size not in self._increases:
            losses = self.losses
            chosen = losses.main if size is None else (losses.tokens_asked == size[0]) & (losses.seq_len == size[1])
            self._increases[size] = losses[chosen].pivot_table("increase", _KEY, "text", aggfunc="first")
        wide, key = self._increases[size], (recipe, sparsity, calibration)
        found = wide.loc[key] if key in wide.index else pd.Series(dtype=float)
        return found.reindex(self.texts)

    def fidelity(self, measure: str, recipe: str, sparsity: float, calibration: str = DEFAULT) -> pd.Series:
        """``divergence`` of a recipe's predictions from the dense model's, or ``same_token``, by text; NaN where not measured."""
        key = (self.losses[_KEY] == [recipe, sparsity, calibration]).all(axis=1) & self.losses.main
        return self.losses[key].groupby("text")[measure].first().reindex(self.texts)

    def ratio(self, recipe: str, sparsity: float, calibration: str = DEFAULT) -> pd.Series:
        """The increase over that of the baseline, by text; NaN where the baseline loses nothing."""
        theirs = self.increase(BASELINE, sparsity, calibration)
        return self.increase(recipe, sparsity, calibration) / theirs.where(theirs > 0)

    def ratios(self, recipe: str, sparsity: float) -> pd.DataFrame:
        """The ratios by calibration and text."""
        return pd.DataFrame({name: self.ratio(recipe, sparsity, name) for name in self.calibrations}).T

    def kinds(self) -> pd.DataFrame:
        """By calibration and text whether they are of the ``same`` kind, of ``other`` kinds, or the ``default`` mixture."""

        def kind(calibration: str, text: str) -> str:
            return DEFAULT if calibration == DEFAULT else "same" if _kind(calibration) == _kind(text) else "other"

        found = {text: [kind(name, text) for name in self.calibrations] for text in self.texts}
        return pd.DataFrame(found, index=self.calibrations)


_KEY = ["recipe", "sparsity", "calibration"]
_FIDELITY = ["divergence", "same_token"]


def _kind(name: str) -> str:
    return SOURCES[name].kind


def mean(values: Any) -> float:
    """NaN where one is missing: a mean over other texts is another number."""
    return pd.Series(values, dtype=float).mean(skipna=False)


def number(value: float, form: str = "+.3f") -> str:
    return "-" if math.isnan(value) else format(value, form)


def cross_table(cells: Cells, sparsity: float) -> str:
    """Calibration by text: increase of the baseline, of the best, and the ratio; same-kind cells are bold."""
    rows = []
    kinds = cells.kinds()
    for name in cells.calibrations:
        theirs, ours = (cells.increase(recipe, sparsity, name) for recipe in (BASELINE, BEST))
        ratios = cells.ratio(BEST, sparsity, name)
        row = [f"{number(theirs[text])} / {number(ours[text])} ({number(ratios[text], '.2f')})" for text in cells.texts]
        bold = kinds.loc[name] == "same"
        rows.append([name, *(f"**{cell}**" if strong else cell for cell, strong in zip(row, bold, strict=True))])
    return markdown(["calibration", *cells.texts], rows)


def summary(cells: Cells, sparsity: float) -> str:
    """Ratios to the baseline by recipe: same kind, other kinds, the worst cell of all, and the default mixture."""
    rows, kinds = [], cells.kinds().stack()
    for recipe in cells.recipes:
        pairs = cells.ratios(recipe, sparsity).reindex(columns=cells.texts).stack(future_stack=True)
        if recipe == BASELINE or pairs.isna().all():
            continue
        means = [number(mean(pairs[kinds == kind]), ".3f") for kind in ("same", "other", DEFAULT)]
        calibration, text = pairs.idxmax()
        made = f"{pairs.notna().sum()} of {len(pairs)}"
        rows.append([recipe, *means, f"{pairs.max():.3f} ({calibration} -> {text})", made])
    header = ["recipe", "same kind", "other kinds", "default mixture", "worst", "cells"]
    return markdown(header, rows) if rows else "No recipe was measured beside the baseline."


def recipe_table(cells: Cells, sparsity: float) -> str:
    """Every recipe, calibrated on the default mixture: quality on all texts, and what it cost."""
    rows = []
    for recipe in cells.recipes:
        record = cells.runs.get((recipe, sparsity, DEFAULT))
        if record is None:
            continue
        whole = record["params_saved"] / record["params_total_before"]
        work = sum(seconds for stage, seconds in record["seconds"].items() if stage not in ("load", "evaluate"))
        losses = [number(mean(cells.increase(recipe, sparsity, size=size))) for size in (None, *LONG)]
        ratio = number(mean(cells.ratio(recipe, sparsity)), ".3f")
        close = [number(mean(cells.fidelity(measure, recipe, sparsity)), ".3f") for measure in _FIDELITY]
        cost = [f"{work:.0f}", str(record["environment"]["threads"]), f"{record['peak_memory_bytes'] / 1e9:.2f} GB"]
        rows.append([recipe, f"{record['param_ratio']:.4f}", f"{whole:.4f}", *losses, ratio, *close, *cost])
    longer = [f"{tokens // 1000},000 tokens, windows of {seq_len}" for tokens, seq_len in LONG]
    header = [
        "recipe",
        "kept",
        "of the whole model",
        "mean nats",
        *longer,
        "mean ratio",
        "divergence",
        "same token",
        "seconds",
        "threads",
        "memory",
    ]
    return markdown(header, rows) if rows else "-"


def text_table(cells: Cells) -> str:
    """The texts, and the dense model's loss on them."""
    records = sorted(cells.records, key=lambda record: record["cell"]["recipe"] != DENSE)
    rows = []
    for text in cells.texts:
        found = [entry for record in records for entry in record["texts"] if entry["text"] == text]
        entry = next((one for one in found if one["main"]), found[0])
        size = f"{entry['tokens']:,} in windows of {entry['seq_len']}"
        rows.append([text, entry["kind"], entry["origin"], size, number(entry["dense_nats"] or math.nan, ".3f")])
    return markdown(["text", "kind", "from", "tokens", "dense nats"], rows)


def render(cells: Cells) -> str:
    """The whole document."""
    code = {record["code_sha256"] for record in cells.records if record["cell"]["recipe"] != DENSE}
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
            "Calibrated on the default mixture, means over all texts; seconds and memory of the compression alone. Divergence is "
            "that of the dense model's predictions from the recipe's, in nats, and `same token` the share of predictions with "
            f"the same likeliest token, both on the first {COMPARED_TOKENS:,} tokens of each text; older cells lack them.",
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
