"""Charts of the report page as inline SVG: lines over an axis, and horizontal bars.

A chart is 360 units wide, about as many pixels as a phone, so that its text is as large there as the text around it. Colours
are classes of the page's style sheet (lorap/reports/html/style.py), so that one drawing serves light and dark. What the lines
mean is said by a legend of HTML, which wraps where a legend inside the drawing would be cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 24, 38
BAR_HEIGHT, BAR_LEFT, BAR_RIGHT = 24, 92, 76
LABEL = 10  # characters
MANY = 40  # points of a line from which on its markers are smaller
# Paths of markers around (0, 0), by the number of the series: circle, square, triangle, diamond.
MARKERS = (
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0z",
    "M-2.6 -2.6h5.2v5.2h-5.2z",
    "M0 -3.4L3.2 2.6H-3.2z",
    "M0 -3.7L3.7 0L0 3.7L-3.7 0z",
)


@dataclass(frozen=True)
class Axis:
    """Numbers along one side of a chart.

    Args:
        low, high: numbers at its two ends.
        ticks: that are written beside it.
        label: what the numbers are.
        log: whether equal steps are equal factors.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    label: str
    log: bool = False

    def share(self, value: float) -> float:
        """Where a number lies between the ends, from 0 to 1; beyond them, at the end."""
        scale = math.log10 if self.log else float
        if self.log and value <= self.low:
            return 0.0
        low, high = scale(self.low), scale(self.high)
        return min(1.0, max(0.0, (scale(value) - low) / (high - low)))


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Args:
        name: for the legend and for what a marker says under the mouse.
        points: (x, y) from left to right; those that are not finite are left out.
        style: class of its colour, and its marker: the last digit.
        hollow: x of points whose marker is only an outline.
        marked: x of points that have a marker; None for all.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    style: str
    hollow: frozenset[float] = field(default_factory=frozenset)
    marked: frozenset[float] | None = None


def linear_axis(values: Iterable[float], label: str, *, whole: bool = False) -> Axis:
    """From 0 to a round number not below the largest of ``values``, with two to six ticks.

    Args:
        values: that are to lie on it; NaN, infinity and what is not above 0 do not count.
        label: of the axis.
        whole: ticks at whole numbers only.
    """
    top = max((value for value in values if math.isfinite(value) and value > 0), default=1.0)
    rough = top / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * (1 - 1e-9))
    step = max(1.0, math.ceil(step)) if whole else step
    count = math.ceil(top / step - 1e-9)
    return Axis(0.0, count * step, tuple(index * step for index in range(count + 1)), label)


def index_axis(count: int, label: str) -> Axis:
    """0 to ``count`` - 1, with a tick at every first, second, fifth, ... such that there are seven at most."""
    steps = (step * 10**power for power in range(7) for step in (1, 2, 5))
    step = next(step for step in steps if (count - 1) // step <= 6)
    ticks = tuple(float(index) for index in range(0, count, step))
    return Axis(-0.5, count - 0.5, ticks, label)


def log_axis(low: float, high: float, label: str) -> Axis:
    """Powers of ten from the one below ``low`` to ``high``, every second one and so on where they are many.

    Args:
        low: smallest value, above 0.
        high: largest value.
        label: of the axis.
    """
    first = math.floor(math.log10(low) + 1e-9)
    powers = range(first, max(first + 1, math.floor(math.log10(high) + 1e-9)) + 1)
    ticks = tuple(10.0**power for power in powers[:: math.ceil(len(powers) / 6)])
    return Axis(10.0**first, max(high, ticks[-1]), ticks, label, log=True)


def line_chart(name: str, title: str, description: str, series: Sequence[Series], x: Axis, y: Axis) -> str:
    """Lines with markers over a grid.

    Args:
        name: unique on the page; identifies title and description for screen readers.
        title: what is shown.
        description: what there is to see, for who does not see it.
        series: the lines; at most four look different in their markers.
        x, y: the axes.
    """
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for tick in y.ticks:
        at = _place(y.share(tick), bottom, TOP)
        parts.append(
            f'<path class="grid" d="M{LEFT} {at}H{right}"/>{_text(LEFT - 6, at, "end", number(tick), "0.32em")}'
        )
    for tick in x.ticks:
        at = _place(x.share(tick), LEFT, right)
        parts.append(f'<path class="tick" d="M{at} {bottom}v4"/>{_text(at, bottom + 15, "middle", number(tick))}')
    parts.append(_text(0, 12, "start", y.label) + _text(right, HEIGHT - 4, "end", x.label))
    for one in series:
        places = [
            (value, height, _place(x.share(value), LEFT, right), _place(y.share(height), bottom, TOP))
            for value, height in one.points
            if math.isfinite(height)
        ]
        line = " ".join(f"{across},{down}" for _, _, across, down in places)
        parts.append(f'<polyline class="line {one.style}" points="{line}"/>')
        parts += [_marker(one, *place) for place in places if one.marked is None or place[0] in one.marked]
    return _svg(name, title, description, HEIGHT, parts)


def bar_chart(name: str, title: str, description: str, rows: Sequence[tuple[str, float, float, str]]) -> str:
    """Horizontal bars, each inside the outline of another: what there was, and what is left of it.

    Args:
        name, title, description: as in :func:`line_chart`.
        rows: label, length of the outline, length of the bar, text behind it. Labels and texts have up to 10 characters; longer
            labels are cut.
    """
    longest = max((outline for _, outline, _, _ in rows), default=0.0) or 1.0
    space = WIDTH - BAR_LEFT - BAR_RIGHT
    parts = []
    for index, (label, outline, bar, text) in enumerate(rows):
        top = index * BAR_HEIGHT + 4
        parts.append(_text(BAR_LEFT - 8, top + 8, "end", _cut(label), "0.32em"))
        for length, style in ((outline, "outline"), (bar, "bar")):
            width = _place(length / longest, 0, space)
            parts.append(f'<rect class="{style}" x="{BAR_LEFT}" y="{top}" width="{width}" height="16" rx="2"/>')
        parts.append(_text(WIDTH, top + 8, "end", text, "0.32em"))
    return _svg(name, title, description, len(rows) * BAR_HEIGHT, parts)


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """What the lines of a chart are, as a list of HTML, from names and styles."""
    items = []
    for name, style in entries:
        line = f'<path class="line {style}" d="M1 6H21"/>'
        mark = f'<path class="mark {style}" transform="translate(11 6)" d="{_shape(style)}"/>'
        swatch = f'<svg viewBox="0 0 22 12" width="22" height="12" aria-hidden="true">{line}{mark}</svg>'
        items.append(f"<li>{swatch}{escape(name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def number(value: float) -> str:
    """A number beside an axis: short, with commas."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _marker(series: Series, x: float, y: float, across: str, down: str) -> str:
    hollow = " hollow" if x in series.hollow else ""
    says = escape(f"{series.name}, {number(x)}: {y:,.5g}")
    look = f'class="mark {series.style}{hollow}" d="{_shape(series.style)}"'
    smaller = " scale(0.6)" if len(series.points) > MANY else ""
    return f'<path {look} transform="translate({across} {down}){smaller}"><title>{says}</title></path>'


def _shape(style: str) -> str:
    return MARKERS[int(style[-1]) % len(MARKERS)]


def _cut(label: str) -> str:
    return label if len(label) <= LABEL else f"{label[: LABEL - 1]}\u2026"


def _place(share: float, start: float, end: float) -> str:
    """A coordinate with one digit behind the point: finer than any screen shows."""
    return f"{start + share * (end - start):.1f}".removesuffix(".0")


def _text(x: float | str, y: float | str, anchor: str, text: str, lower: str = "") -> str:
    down = f' dy="{lower}"' if lower else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{down}>{escape(text)}</text>'


def _svg(name: str, title: str, description: str, height: int, parts: Sequence[str]) -> str:
    head = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
    labels = f'role="img" aria-labelledby="{name}-title" aria-describedby="{name}-desc"'
    return f'<svg class="chart" id="{name}" viewBox="0 0 {WIDTH} {height}" {labels}>{head}{"".join(parts)}</svg>'
