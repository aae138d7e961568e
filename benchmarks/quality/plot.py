"""Two pictures of recipes calibrated on the default mixture: the loss on every text, and the loss against the size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from lorap.reports.plots import STYLE, save

COLOURS = ("#9aa7b5", "#c8553d", "#3b6ea5", "#6a9c78", "#b08ec2", "#d9a441", "#4f5d75")
GROUP_WIDTH = 0.8
# Readable on white and on black, since the picture has no background of its own.
GREY = "#7f8893"
SIZE_COLOURS = ("#d9822b", "#3b8ed0", "#4fa36c", "#a277c7")
LABELS = {"lorap": "paper (recipe lorap)", "svd-llm": "svd-llm, without its tuning"}


def draw(cells: Any, picture: Path) -> None:
    """Write ``picture`` from a :class:`table.Cells`; what was not measured is a dash. Nothing where there is nothing."""
    sparsities = [one for one in cells.sparsities if any(cells.get(name, one) for name in cells.recipes)]
    if not sparsities:
        return
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 2.6 * len(sparsities) + 0.5), layout="constrained")
        axes = figure.subplots(len(sparsities), 1, squeeze=False)[:, 0]
        recipes = [name for name in cells.recipes if any(cells.get(name, sparsity) for sparsity in sparsities)]
        # Ablations have tables of their own; here they would only crowd the bars.
        recipes = [name for name in recipes if "+" not in name] or recipes
        for axis, sparsity in zip(axes, sparsities, strict=True):
            _panel(axis, cells, recipes, sparsity)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, ncols=max(1, len(recipes)), loc="outside upper right")
        figure.suptitle("Calibrated on the default mixture", x=0.01, ha="left", fontsize=10)
        save(figure, picture)


def _panel(axis: Any, cells: Any, recipes: list[str], sparsity: float) -> None:
    width = GROUP_WIDTH / len(recipes)
    for index, recipe in enumerate(recipes):
        losses = [cells.increase(recipe, sparsity, "default", text) for text in cells.texts]
        places = [place - GROUP_WIDTH / 2 + (index + 0.5) * width for place in range(len(cells.texts))]
        heights = [float("nan") if loss is None else loss for loss in losses]
        bars = axis.bar(places, heights, width * 0.92, label=recipe, color=COLOURS[index % len(COLOURS)])
        for bar, place, loss in zip(bars, places, losses, strict=True):
            height, shown = (0, "-") if loss is None else (bar.get_height(), f"{loss:.2f}")
            above = {"xytext": (0, 1), "textcoords": "offset points", "ha": "center", "va": "bottom"}
            axis.annotate(shown, (place, height), fontsize=6.5, color="#555555", **above)
    axis.set_xticks(range(len(cells.texts)), cells.texts)
    axis.tick_params(axis="x", length=0)
    axis.set_title(f"sparsity {sparsity:g}")
    axis.set_ylabel("nats over dense")
    axis.axhline(0, color="#888888", linewidth=0.6)
    axis.margins(y=0.12)


def sizes(cells: Any) -> dict[str, list[tuple[float, float]]]:
    """recipe -> (millions of parameters, mean increase of the loss over the texts), the dense model first.

    Calibrated on the default mixture; recipes with changed options, and means that lack a text, are left out.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for recipe in (name for name in cells.recipes if "+" not in name):
        for sparsity in cells.sparsities:
            record = cells.get(recipe, sparsity)
            losses = [cells.increase(recipe, sparsity, "default", text) for text in cells.texts]
            if record is None or None in losses:
                continue
            line = found.setdefault(recipe, [(record["params_total_before"] / 1e6, 0.0)])
            line.append((record["params_saved"] / 1e6, sum(losses) / len(losses)))
    return found


def draw_sizes(cells: Any, picture: Path) -> None:
    """Write ``picture``: quality against size, a line for each recipe. Nothing where there is nothing."""
    lines = sizes(cells)
    if not lines:
        return
    colours = {
        "text.color": GREY,
        "axes.labelcolor": GREY,
        "axes.edgecolor": GREY,
        "xtick.color": GREY,
        "ytick.color": GREY,
    }
    with mpl.rc_context(STYLE | colours):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        figure.patch.set_alpha(0)
        axis = figure.subplots()
        axis.patch.set_alpha(0)
        for index, (recipe, points) in enumerate(lines.items()):
            width, label = (2.4, recipe) if recipe == "best" else (1.3, LABELS.get(recipe, recipe))
            axis.plot(
                *zip(*points, strict=True), marker="o", label=label, linewidth=width, color=SIZE_COLOURS[index % 4]
            )
        dense = next(iter(lines.values()))[0]
        axis.annotate("dense", dense, xytext=(7, -3), textcoords="offset points")
        axis.margins(x=0.1)
        axis.set_xlabel("parameters of the whole model, millions")
        axis.set_ylabel("loss over the dense model,\nnats per token")
        axis.set_title(f"Mean of {len(cells.texts)} texts: lower and further left is better")
        axis.legend()
        save(figure, picture)
