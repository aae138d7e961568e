"""Charts of the report page: what each shows in words, and how it is drawn where matplotlib is.

A chart is 360 units wide, about as many pixels as a phone, so that its text is as large there as the text around it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lorap.architectures import ATTENTION, MLP, PROJECTIONS
from lorap.reports.plots import GROUND, INK, ROLE_LOOKS, SERIES, STYLE, depth_colours, page_svg
from lorap.reports.run import CompressionReport, ProjectionReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUBLAYERS = {"attention": ATTENTION, "FFN": MLP}
WIDTH, HEIGHT, BAR_HEIGHT = 360, 226, 24
# Smaller shares of the largest singular value are drawn at this one; larger numbers than the other have no scale.
FAINT, HUGE = 1e-3, 1e300
LABEL = 10  # characters
ERROR = "relative error"
Point = tuple[ProjectionReport, float, bool]  # and its number, and whether it is the same as it was


@dataclass(frozen=True)
class Chart:
    """One drawing.

    Args:
        name: unique on the page.
        title: what is shown.
        about: what there is to see, for who does not see it.
        draw: onto the axes.
        height: in units.
        margins: beside the axes, in units: left, below, right, above.
    """

    name: str
    title: str
    about: str
    draw: Callable[[Axes], object]
    height: float = HEIGHT
    margins: tuple[float, float, float, float] = (46, 58, 22, 22)

    def svg(self) -> str:
        """As an element of the page; needs matplotlib."""
        import matplotlib as mpl
        from matplotlib.figure import Figure

        left, below, right, above = self.margins
        place = (left / WIDTH, below / self.height, 1 - (left + right) / WIDTH, 1 - (below + above) / self.height)
        with (
            mpl.rc_context(STYLE | {"font.size": 11.5, "axes.titlesize": 11.5, "axes.titley": 1.02}),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # a letter that matplotlib's font lacks is drawn by the browser's
            figure = Figure(figsize=(WIDTH / 72, self.height / 72))
            self.draw(figure.add_axes(place))
            return page_svg(figure, self.name)


def has_matplotlib() -> bool:
    """Whether charts can be drawn: matplotlib is the extra ``plot``."""
    return find_spec("matplotlib") is not None


def size_charts(report: CompressionReport) -> list[Chart]:
    """Rank of each factor pair and width of each FFN, by layer."""
    found = {}
    for name, roles in SUBLAYERS.items():
        ours = [one for one in report.projections if one.role in roles]
        if any(one.rank is not None for one in ours):
            points = [(one, float(one.rank or min(one.shape_after)), one.rank is None) for one in ours]
            note = "Dense ones are hollow, at full rank."
            found[name] = _by_layer(f"ranks-{name}", f"Rank in {name}", "rank", points, note)
    gates = report.by_role("gate_proj")
    if gates and "FFN" not in found:  # whose FFN is low-rank keeps its width
        points = [(one, float(one.shape_after[0]), one.shape_after == one.shape_before) for one in gates]
        title = f"FFN width, of {max(one.shape_before[0] for one in gates):,}"
        found["FFN"] = _by_layer("widths", title, "channels", points, "Full widths are hollow.")
    return list(found.values())


def error_charts(report: CompressionReport) -> list[Chart]:
    """Activation-weighted error of each projection, by layer."""
    found = []
    for name, roles in SUBLAYERS.items():
        if points := [(one, one.error, not one.error > 0) for one in report.projections if one.role in roles]:
            note = "Unchanged ones are hollow."
            found.append(_by_layer(f"errors-{name}", f"Error in {name}", ERROR, points, note))
    return found


def spectrum_charts(report: CompressionReport) -> list[Chart]:
    """Singular values of each kind of projection, a line for each layer, with a marker where the rank cut them."""
    known = [one for one in report.projections if one.spectrum is not None]
    layers = 1 + max((one.layer for one in known), default=0)
    return [
        _spectrum(role, ours, layers) for role in PROJECTIONS if (ours := [one for one in known if one.role == role])
    ]


def bar_chart(name: str, title: str, about: str, rows: Sequence[tuple[str, float, float, str]]) -> Chart:
    """Horizontal bars, each inside the outline of another: what there was, and what is left of it.

    Args:
        name, title, about: as in :class:`Chart`.
        rows: label, length of the outline, length of the bar, text behind it; longer labels than 10 characters are cut.
    """

    def draw(axis: Any) -> None:
        places = range(len(rows))
        labels = [label if len(label) <= LABEL else f"{label[: LABEL - 1]}\u2026" for label, *_ in rows]
        outlines = [_drawable(outline, 0.0) for _, outline, _, _ in rows]
        bars = [_drawable(bar, 0.0) for _, _, bar, _ in rows]
        axis.barh(places, bars, 0.66, color=SERIES[0])
        axis.barh(places, outlines, 0.66, color="none", edgecolor=INK, linewidth=0.8)
        axis.set(xlim=(0, max(outlines, default=0.0) or 1.0), ylim=(len(rows) - 0.5, -0.5), xticks=[])
        axis.set_yticks(places, labels)
        axis.tick_params(length=0)
        axis.grid(False)
        axis.spines[:].set_visible(False)
        for place, (*_, text) in zip(places, rows, strict=True):
            axis.annotate(
                text, (1, place), (72, 0), ("axes fraction", "data"), "offset points", ha="right", va="center"
            )

    return Chart(name, title, about, draw, max(1, len(rows)) * BAR_HEIGHT, (88, 1, 74, 1))


def _by_layer(name: str, title: str, unit: str, points: Sequence[Point], note: str) -> Chart:
    """A line for each role; hollow where a projection is the same as it was."""
    roles = [role for role in PROJECTIONS if any(one.role == role for one, _, _ in points)]
    changed = [(value, one) for one, value, same in points if not same]
    about = "Nothing changed."
    if changed:
        least, most = (
            f"{value:,.{4 if unit == ERROR else 0}f} (layer {one.layer}{f', {one.role}' if roles[1:] else ''})"
            for value, one in (pick(changed, key=lambda point: point[0]) for pick in (min, max))
        )
        about = f"Smallest {least}, largest {most}."

    def draw(axis: Any) -> None:
        for role in roles:
            ours = sorted((one.layer, _drawable(value), same) for one, value, same in points if one.role == role)
            look = ROLE_LOOKS[role] | {"clip_on": False}
            axis.plot([layer for layer, _, _ in ours], [value for _, value, _ in ours], label=role, gid=role, **look)
            hollow = [(layer, value) for layer, value, same in ours if same]
            look |= {"linestyle": "none", "markerfacecolor": GROUND, "zorder": 3, "gid": f"{role}-hollow"}
            axis.plot([layer for layer, _ in hollow], [value for _, value in hollow], **look)
        axis.set_xlim(-0.5, 0.5 + max(one.layer for one, _, _ in points))
        axis.set_ylim(0, 1.08 * max((top for _, value, _ in points if (top := _drawable(value)) > 0), default=1.0))
        _finish(axis, "layer", unit, len(roles))

    return Chart(name, title, about if len(changed) == len(points) else f"{about} {note}", draw)


def _spectrum(role: str, found: Sequence[ProjectionReport], layers: int) -> Chart:
    cuts = {one.layer: _value_at_rank(one) for one in found}
    low, high = min(cuts, key=cuts.__getitem__), max(cuts, key=cuts.__getitem__)
    about = f"The last one kept has {cuts[low]:.2g} (layer {low}) to {cuts[high]:.2g} (layer {high}) of the largest."

    def draw(axis: Any) -> None:
        colours = depth_colours()
        for one in found:
            assert one.spectrum is not None
            look = {"color": colours(one.layer / max(layers - 1, 1)), "marker": "o", "clip_on": False}
            shown = {"label": f"layer {one.layer}"} if one in (found[0], found[-1]) else {}
            values = [min(1.0, max(FAINT, value)) for value in one.spectrum.values]
            axis.plot(one.spectrum.indices, values, **(look | {"marker": "", "gid": f"{role}-{one.layer}"} | shown))
            axis.plot(one.rank or one.spectrum.count, max(FAINT, cuts[one.layer]), **look)
        axis.set(xscale="log", yscale="log", xlim=(1, None), ylim=(FAINT, 1.2))
        _finish(axis, "number of the singular value", "share of the largest", 2)

    return Chart(f"spectrum-{role}", role, about, draw)


def _value_at_rank(one: ProjectionReport) -> float:
    """The last singular value kept, on straight lines between known ones on two logarithmic axes."""
    import numpy as np

    assert one.spectrum is not None
    values = np.maximum(one.spectrum.values, 1e-12)
    rank = math.log(max(1, one.rank or one.spectrum.count))
    return float(np.exp(np.interp(rank, np.log(one.spectrum.indices), np.log(values))))


def _finish(axis: Any, across: str, up: str, columns: int) -> None:
    """Names of the axes, where they take no room from the lines, and a legend below."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    axis.set_title(up)
    axis.set_xlabel(across, loc="right", labelpad=3)
    axis.grid(axis="x", visible=False)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(lambda value, _: f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}")
        if side.get_scale() == "linear":
            side.set_major_locator(
                MaxNLocator(6, steps=[1, 2, 5, 10], integer=side is axis.xaxis or up != ERROR, min_n_ticks=1)
            )
        else:
            side.set_minor_locator(NullLocator())
    axis.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 0),
        bbox_transform=axis.figure.transFigure,
        ncols=columns,
        columnspacing=1.2,
        handletextpad=0.4,
        borderpad=0.1,
    )


def _drawable(value: float, otherwise: float = math.nan) -> float:
    return min(max(value, 0.0), HUGE) if math.isfinite(value) else otherwise
