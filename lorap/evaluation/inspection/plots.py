"""The pictures of an inspection. Needs matplotlib: ``pip install 'lorap[plot]'``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lorap.evaluation.inspection.report import GROUPS, Inspection
from lorap.evaluation.inspection.values import LEAST, LEVELS, SingularValues, random_matrix, sample_points
from lorap.reports.plots import INK, ROLE_LOOKS, SERIES, STYLE, depth_colours, save

DEPTH = depth_colours()
GROUP_LOOKS: dict[str, Any] = {
    group: {"color": SERIES[index], "marker": "os"[index]} for index, group in enumerate(GROUPS)
}
# Half a pixel: an SVG of 420 spectra stays small.
THIN: dict[Any, Any] = {"path.simplify_threshold": 0.5}
RANDOM: dict[str, Any] = {"color": INK, "linestyle": (0, (4, 2)), "linewidth": 1.0}
KIND_TITLES = {"plain": "plain weights", "weighted": "weighted by their inputs"}
# The spectra of a panel end here, relative to the largest singular value.
FLOOR = 1e-3


def write_plots(found: Inspection, folder: Path) -> list[Path]:
    """``spectra``, ``energy_ranks``, ``effective_ranks`` and ``channels``, each as .png and .svg, into an existing folder."""
    written = []
    for name, draw in FIGURES.items():
        with mpl.rc_context(STYLE | THIN):
            figure = draw(found)
            for suffix in (".svg", ".png"):
                save(figure, folder / f"{name}{suffix}")
                figure.set_layout_engine("none")  # what the first drawing has found stays, and takes no time again
                written.append(folder / f"{name}{suffix}")
    return written


def spectra(found: Inspection) -> Figure:
    """Singular values over the largest: a row for the attention and one for the FFN, plain and again weighted."""
    rows = [(kind, group) for kind in found.kinds for group in GROUPS]
    figure = Figure(figsize=(9.5, 2.15 * len(rows) + 0.7), layout="constrained")
    panels = figure.subplots(len(rows), 4, sharex=True, sharey=True, squeeze=False)
    for (kind, group), axes in zip(rows, panels, strict=True):
        for axis, role in zip(axes, GROUPS[group], strict=False):
            _spectra_panel(axis, found, kind, role)
        for axis in axes[len(GROUPS[group]) :]:
            axis.set_axis_off()
        axes[0].set_ylabel("singular value / largest")
        axes[len(GROUPS[group]) - 1].tick_params(labelbottom=True)
    for axis in panels[-1]:
        axis.set_xlabel("singular value no. / full rank")
    panels[0, 0].set(yscale="log", ylim=(FLOOR, 1.2), xlim=(0, 1))
    panels[1, 3].legend(handles=_spectra_legend(found), loc="center left", title="one line a layer", alignment="left")
    _depth_bar(figure, found, panels)
    _title(figure, found, "Spectra: the earlier a line falls, the lower the rank that will do")
    return figure


def _spectra_panel(axis: Any, found: Inspection, kind: str, role: str) -> None:
    norm = _depths(found)
    lines = found.find(kind, roles=[role])
    for layer, line in zip(found.layers_with(role), lines, strict=True):
        axis.plot(*_curve(line), color=DEPTH(norm(layer)), linewidth=0.8)
    for shape in dict.fromkeys(line.shape for line in lines) if kind == "plain" else ():
        axis.plot(*_curve(random_matrix(shape)), **RANDOM)
    axis.set_title(f"{role}, {kind}")


def _curve(line: SingularValues) -> tuple[list[float], tuple[float, ...]]:
    """Share of the full rank, singular value; the numbers of singular values are centred in their share."""
    return [(point - 0.5) / line.full_rank for point in sample_points(line.full_rank)], line.values


def _spectra_legend(found: Inspection) -> list[Line2D]:
    norm = _depths(found)
    first_and_last = sorted({found.layers[0], found.layers[-1]})
    ends = [Line2D([], [], color=DEPTH(norm(layer)), label=f"layer {layer}") for layer in first_and_last]
    return [*ends, Line2D([], [], **RANDOM, label="random matrix\nof that shape")]


def energy_ranks(found: Inspection) -> Figure:
    """By layer, attention against FFN: a column for each level of energy, plain and below it weighted."""
    figure = Figure(figsize=(9.5, 2.7 * len(found.kinds) + 0.9), layout="constrained")
    panels = figure.subplots(len(found.kinds), len(LEVELS), sharex=True, sharey=True, squeeze=False)
    for kind, axes in zip(found.kinds, panels, strict=True):
        for column, axis in enumerate(axes):
            for group in GROUPS:
                _group_lines(axis, found, kind, group, column)
            axis.set_title(f"{LEVELS[column]:.0%} of the energy, {KIND_TITLES[kind]}")
        axes[0].set_ylabel("rank / full rank")
    for axis in panels[-1]:
        _layer_axis(axis, found)
    panels[0, 0].set_ylim(0, 1)
    panels[0, 0].yaxis.set_major_formatter(PercentFormatter(1))
    handles = [Line2D([], [], **look, markersize=3, label=f"{group}, mean") for group, look in GROUP_LOOKS.items()]
    handles.append(
        Line2D([], [], color=INK, alpha=0.35, linewidth=6, label="from the lowest projection to the highest")
    )
    handles.append(Line2D([], [], color=INK, linestyle="--", label="random matrices of these shapes (plain)"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    shares = {kind: [f"{found.shares(kind, group)[0]:.0%}" for group in GROUPS] for kind in found.kinds}
    told = "; ".join(f"{one} against {other} ({kind})" for kind, (one, other) in shares.items())
    _title(figure, found, f"Rank for {LEVELS[0]:.0%} of the energy, attention against FFN: {told}")
    return figure


def _group_lines(axis: Any, found: Inspection, kind: str, group: str, column: int) -> None:
    look, roles = GROUP_LOOKS[group], GROUPS[group]
    each = [[one.rank_shares[column] for one in found.find(kind, layer=layer, roles=roles)] for layer in found.layers]
    axis.fill_between(
        found.layers, list(map(min, each)), list(map(max, each)), color=look["color"], alpha=0.15, linewidth=0
    )
    means = [found.shares(kind, group, layer=layer)[column] for layer in found.layers]
    axis.plot(found.layers, means, **look, markersize=2.5, label=group)
    if kind == "plain":
        axis.axhline(found.random_shares(group)[column], color=look["color"], linestyle="--", linewidth=0.9)


def effective_ranks(found: Inspection) -> Figure:
    """By layer, a line a projection."""
    figure = Figure(figsize=(9.5, 4.1), layout="constrained")
    axes = figure.subplots(1, len(found.kinds), sharey=True, squeeze=False)[0]
    for kind, axis in zip(found.kinds, axes, strict=True):
        for role, look in ROLE_LOOKS.items():
            shares = [one.effective_share for one in found.find(kind, roles=[role])]
            axis.plot(found.layers_with(role), shares, **look, markersize=3.5, linewidth=1, label=role)
        axis.set_title(KIND_TITLES[kind])
        _layer_axis(axis, found)
    axes[0].set(ylabel="effective rank / full rank", ylim=(0, 1))
    axes[0].yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(handles=axes[0].get_lines(), loc="outside right center")
    _title(figure, found, "Effective rank: over how many directions the energy of a projection is spread")
    return figure


def channels(found: Inspection) -> Figure:
    """FFN channels from the least important: importance, and the share of the whole that they hold together."""
    figure = Figure(figsize=(9.5, 3.1 * len(found.kinds) + 0.5), layout="constrained")
    panels = figure.subplots(len(found.kinds), 2, sharex="col", sharey="col", squeeze=False)
    norm, sizes = _depths(found), [kinds["plain"].channels for kinds in found.channels.values()]
    for kind, (single, together) in zip(found.kinds, panels, strict=True):
        least = []
        for layer, kinds in found.channels.items():
            one = kinds[kind]
            shares = [point / one.channels for point in sample_points(one.channels)]
            single.plot(shares, one.values, color=DEPTH(norm(layer)), linewidth=0.8)
            together.plot(shares, one.cumulative, color=DEPTH(norm(layer)), linewidth=0.8)
            least.append(one.least_share)
        single.set_title(f"importance of a channel, {KIND_TITLES[kind]}")
        held = " to ".join(sorted({f"{min(least):.2%}", f"{max(least):.2%}"}))
        together.set_title(f"the least {LEAST:.0%} hold {held} of the importance")
        single.set_ylabel("importance / mean")
        together.set_ylabel("share of all importance")
        together.plot([0, 1], [0, 1], **RANDOM)
        for axis in (single, together):
            axis.axvline(LEAST, color=SERIES[5], linewidth=1)
    panels[0, 0].set(xscale="log", yscale="log", xlim=(1 / max(sizes), 1))
    low, high = panels[0, 0].get_ylim()
    panels[0, 0].set_ylim(min(low, 0.5), max(high, 2))  # small differences look small
    panels[0, 1].set(xlim=(0, 1), ylim=(0, 1))
    for axis in panels[-1]:
        axis.set_xlabel("share of the channels, the least important first")
    handles = [
        Line2D([], [], color=SERIES[5], label=f"least important {LEAST:.0%}"),
        Line2D([], [], **RANDOM, label="if all channels were alike"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    _depth_bar(figure, found, panels)
    _title(
        figure, found, "FFN channels by importance: where a line is flat, or near the dashed one, channels are alike"
    )
    return figure


FIGURES: dict[str, Callable[[Inspection], Figure]] = {
    "spectra": spectra,
    "energy_ranks": energy_ranks,
    "effective_ranks": effective_ranks,
    "channels": channels,
}


def _title(figure: Figure, found: Inspection, text: str) -> None:
    figure.suptitle(f"{text}\n{found.model}", x=0.01, ha="left")


def _depths(found: Inspection) -> Normalize:
    return Normalize(0, max(found.num_layers - 1, 1))


def _depth_bar(figure: Figure, found: Inspection, panels: Any) -> None:
    """What the colours of the layers mean, beside all panels."""
    bar = figure.colorbar(ScalarMappable(_depths(found), DEPTH), ax=panels, aspect=40, pad=0.01, fraction=0.02)
    bar.set_label("decoder layer")
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _layer_axis(axis: Any, found: Inspection) -> None:
    axis.set_xlabel("decoder layer")
    axis.set_xlim(found.layers[0] - 0.5, found.layers[-1] + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
