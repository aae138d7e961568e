"""Two pictures of recipes calibrated on the default mixture: the loss on every text, and the loss against the size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from lorap.reports.plots import INK, MARKERS, SERIES, STYLE, save

LABELS = {
    "lorap": "paper (recipe lorap)",
    "svd-llm": "svd-llm, without its tuning",
    "aa-svd": "aa-svd, without its tuning",
}
DEFAULT = "default"


def draw(cells: Any, picture: Path) -> None:
    """Write ``picture`` from a :class:`table.Cells`; what was not measured has no bar. Nothing where there is nothing."""
    found = {one: _losses(cells, one) for one in cells.sparsities if _losses(cells, one).notna().any(axis=None)}
    if not found:
        return
    with mpl.rc_context(STYLE | {"axes.prop_cycle": mpl.cycler(color=(INK, *SERIES))}):
        figure = Figure(figsize=(9.5, 2.6 * len(found) + 0.5), layout="constrained")
        for axis, (sparsity, losses) in zip(
            figure.subplots(len(found), squeeze=False)[:, 0], found.items(), strict=True
        ):
            losses.plot.bar(ax=axis, width=0.8, rot=0, legend=False, title=f"sparsity {sparsity:g}", xlabel="")
            axis.grid(axis="x", visible=False)
            for bars, name in zip(axis.containers, losses, strict=True):
                # pandas draws what is missing as a bar of height 0, which would say that nothing is lost.
                labels = ["" if pd.isna(loss) else f"{loss:.2f}" for loss in losses[name]]
                axis.bar_label(bars, labels=labels, fontsize=6.5)
            axis.tick_params(axis="x", length=0)
            axis.set_ylabel("nats over dense")
            axis.margins(y=0.12)
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, ncols=len(labels), loc="outside upper right")
        figure.suptitle("Calibrated on the default mixture", x=0.01, ha="left")
        save(figure, picture)


def _losses(cells: Any, sparsity: float) -> pd.DataFrame:
    """By text and recipe. Ablations have tables of their own; here they would only crowd the bars."""
    plain = [name for name in cells.recipes if "+" not in name]
    return pd.DataFrame({name: cells.increase(name, sparsity) for name in plain or cells.recipes})


def sizes(cells: Any) -> dict[str, list[tuple[float, float]]]:
    """recipe -> (millions of parameters, mean increase of the loss over the texts), the dense model first.

    Calibrated on the default mixture; recipes with changed options, and means that lack a text, are left out.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for recipe in (name for name in cells.recipes if "+" not in name):
        for sparsity in cells.sparsities:
            record = cells.runs.get((recipe, sparsity, DEFAULT))
            losses = cells.increase(recipe, sparsity)
            if record is None or losses.isna().any():
                continue
            line = found.setdefault(recipe, [(record["params_total_before"] / 1e6, 0.0)])
            line.append((record["params_saved"] / 1e6, losses.mean()))
    return found


def draw_sizes(cells: Any, picture: Path) -> None:
    """Write ``picture``: quality against size, a line for each recipe. Nothing where there is nothing."""
    lines = sizes(cells)
    if not lines:
        return
    with mpl.rc_context(STYLE | {"axes.prop_cycle": mpl.cycler(color=SERIES, marker=MARKERS)}):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        axis = figure.subplots()
        for recipe, points in lines.items():
            width, label = (2.4, recipe) if recipe == "best" else (1.2, LABELS.get(recipe, recipe))
            axis.plot(*zip(*points, strict=True), label=label, linewidth=width)
        axis.annotate("dense", next(iter(lines.values()))[0], xytext=(7, -3), textcoords="offset points")
        axis.margins(x=0.1)
        axis.set_xlabel("parameters of the whole model, millions")
        axis.set_ylabel("loss over the dense model,\nnats per token")
        axis.set_title(f"Mean of {len(cells.texts)} texts: lower and further left is better")
        axis.legend()
        save(figure, picture)
