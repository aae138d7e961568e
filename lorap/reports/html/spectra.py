"""The part of the report page on singular values: how fast they fall in each projection, and where the rank cut them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from lorap.architectures import PROJECTIONS
from lorap.reports.html.charts import Axis, Series, legend, line_chart, log_axis
from lorap.reports.html.tables import details, figure, figures
from lorap.reports.run import CompressionReport, ProjectionReport
from lorap.reports.spectra import Spectrum

# Colours from the first to the last layer (lorap/reports/html/style.py).
DEPTHS = 5
# Smaller shares of the largest are drawn at this one.
FAINT = 1e-3

Known = tuple[ProjectionReport, Spectrum]


def spectra(report: CompressionReport) -> str:
    """One chart for each kind of projection, with a line for each layer; nothing where no spectrum is known."""
    known = [(one, one.spectrum) for one in report.projections if one.spectrum is not None]
    if not known:
        return ""
    layers = 1 + max(one.layer for one, _ in known)
    least = min((value for _, spectrum in known for value in spectrum.values if value > 0), default=FAINT)
    y = log_axis(min(max(least, FAINT), 0.1), 1.0, "share of the largest")
    charts = [
        _chart(role, found, layers, y)
        for role in PROJECTIONS
        if (found := [pair for pair in known if pair[0].role == role])
    ]
    meaning = (
        "Singular values of each weight between the metrics of its inputs and outputs, relative to the largest. The faster they "
        "fall, the less is lost. Markers stand at the rank: the last value kept. Some solvers look for little more than these. "
        f"Shares below {FAINT:g} are drawn at it."
    )
    header, rows = _numbers(known)
    return f"<p>{escape(meaning)}</p>{figures(*charts)}{details('Singular values as a table', header, rows)}"


def _chart(role: str, found: Sequence[Known], layers: int, y: Axis) -> str:
    x = log_axis(1.0, float(max(spectrum.count for _, spectrum in found)), "number of the singular value")
    lines, cuts = [], []
    for one, spectrum in found:
        points = dict(zip(map(float, spectrum.indices), spectrum.values, strict=True))
        rank = float(one.rank or spectrum.count)
        cut = points[rank] = value_at(points, rank)
        cuts.append((cut, one.layer))
        drawn = tuple((index, max(FAINT, value)) for index, value in sorted(points.items()))
        lines.append(Series(f"layer {one.layer}", drawn, _depth(one.layer, layers), marked=frozenset([rank])))
    (least, low), (most, high) = min(cuts), max(cuts)
    about = f"The last one kept has {least:.2g} (layer {low}) to {most:.2g} (layer {high}) of the largest."
    title = f"Singular values of {role}"
    return figure(role, about, _depth_legend(layers), line_chart(f"spectrum-{role}", title, about, lines, x, y))


def value_at(points: Mapping[float, float], x: float) -> float:
    """The value at ``x`` on straight lines between points on two logarithmic axes; beyond the ends, that of the end."""
    below = max((known for known in points if known <= x), default=min(points))
    above = min((known for known in points if known >= x), default=max(points))
    if below >= above or points[below] <= 0 or points[above] <= 0:
        return points[below]
    share = math.log(x / below) / math.log(above / below)
    return math.exp((1 - share) * math.log(points[below]) + share * math.log(points[above]))


def _depth(layer: int, layers: int) -> str:
    return f"d{layer * DEPTHS // layers}"


def _depth_legend(layers: int) -> str:
    """Which layers have which colour."""
    groups: dict[str, list[int]] = {}
    for layer in range(layers):
        groups.setdefault(_depth(layer, layers), []).append(layer)
    spans = [("\u2013".join(map(str, sorted({found[0], found[-1]}))), style) for style, found in groups.items()]
    return legend([(f"layers {spans[0][0]}" if spans[1:] else f"layer {spans[0][0]}", spans[0][1]), *spans[1:]])


def _numbers(known: Sequence[Known]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row per projection, one column per index; the last one known differs, and has a column of its own."""
    columns = sorted({index for _, spectrum in known for index in spectrum.indices[:-1]})
    rows = []
    for one, spectrum in known:
        values = dict(zip(spectrum.indices, spectrum.values, strict=True))
        cells = [f"{values[index]:.4g}" if index in values else "" for index in columns]
        last = f"{spectrum.values[-1]:.4g} (number {spectrum.count:,})"
        rows.append([f"{one.layer} {one.role}", f"{one.rank:,}" if one.rank else "", *cells, last])
    return ["layer", "rank", *(f"{index:,}" for index in columns), "last known"], rows
