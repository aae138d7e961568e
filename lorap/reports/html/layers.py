"""The parts of the report page that go layer by layer: ranks and widths, errors, and what solved and stored the factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from lorap.architectures import ATTENTION, MLP, PROJECTIONS
from lorap.reports.html.charts import Axis, Series, index_axis, legend, line_chart, linear_axis
from lorap.reports.html.tables import details, figure, figures
from lorap.reports.run import CompressionReport, ProjectionReport, solver_lines, storage_lines

STYLES = {
    role: f"{group}{index}" for group, roles in (("a", ATTENTION), ("f", MLP)) for index, role in enumerate(roles)
}
SUBLAYERS = {"attention": ATTENTION, "FFN": MLP}

Value = Callable[[ProjectionReport], float]


def sizes(report: CompressionReport) -> str:
    """Rank of each factor pair and width of each FFN, by layer."""
    drawn = [_ranks(report, name) for name, roles in SUBLAYERS.items() if _has_factors(report, roles)]
    gates = report.by_role("gate_proj")
    if gates and not _has_factors(report, MLP):  # whose FFN is low-rank keeps its width
        drawn.append(_widths(report, gates))
    widths = {str(one.layer): f"{one.shape_after[0]:,}" for one in gates}
    header, rows = by_layer(report, lambda one: "dense" if one.rank is None else f"{one.rank:,}")
    header = [header[0], *(f"{role} rank" for role in header[1:]), "FFN width"]
    return figures(*drawn) + details(
        "Ranks and widths as a table", header, [[*row, widths.get(row[0], "")] for row in rows]
    )


def errors(report: CompressionReport) -> str:
    """Activation-weighted error of each projection, by layer, what solved them, and what storing them added."""
    drawn = []
    for name, roles in SUBLAYERS.items():
        lines = _lines(report, roles, _error, hollow=lambda one: one.error == 0)
        if lines:
            about = _extremes(report, roles, "error", _error, only=lambda one: one.error > 0, digits=4)
            about += " Unchanged ones are hollow." if any(line.hollow for line in lines) else ""
            y = linear_axis([error for line in lines for _, error in line.points], "relative error")
            chart = line_chart(f"errors-{name}", f"Error in {name} by layer", about, lines, _layers(report), y)
            drawn.append(figure(f"Error in {name}", about, _legend(lines), chart))
    meaning = "How much of a projection's output is lost, weighed by the inputs it sees: 0 is nothing, 1 is everything."
    notes = [f"{line[:1].upper()}{line[1:]}." for line in solver_lines(report) + storage_lines(report)]
    told = "".join(f"<p>{escape(note)}</p>" for note in notes)
    tables = details("Errors as a table", *by_layer(report, lambda one: f"{one.error:.4f}"))
    if any(one.storage_error for one in report.projections):
        tables += details(
            "What storing the factors added, as a table", *by_layer(report, lambda one: f"{one.storage_error:.2g}")
        )
    return f"<p>{escape(meaning)}</p>{figures(*drawn)}{told}{tables}"


def by_layer(report: CompressionReport, cell: Callable[[ProjectionReport], str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table: one row per layer, one column per role that there is."""
    roles = [role for role in PROJECTIONS if report.by_role(role)]
    found = {(one.layer, one.role): cell(one) for one in report.projections}
    layers = sorted({one.layer for one in report.projections})
    return ["layer", *roles], [[str(layer), *(found.get((layer, role), "") for role in roles)] for layer in layers]


def _ranks(report: CompressionReport, name: str) -> str:
    lines = _lines(report, SUBLAYERS[name], _rank, hollow=lambda one: one.rank is None)
    y = linear_axis([rank for line in lines for _, rank in line.points], "rank", whole=True)
    about = _extremes(report, SUBLAYERS[name], "rank", _rank, only=lambda one: one.rank is not None)
    about += " Dense ones are hollow, at full rank." if any(line.hollow for line in lines) else ""
    chart = line_chart(f"ranks-{name}", f"Rank in {name} by layer", about, lines, _layers(report), y)
    return figure(f"Rank in {name}", about, _legend(lines), chart)


def _widths(report: CompressionReport, gates: Sequence[ProjectionReport]) -> str:
    lines = _lines(
        report, ("gate_proj",), _width, name="FFN width", hollow=lambda one: one.shape_after == one.shape_before
    )
    dense = max(one.shape_before[0] for one in gates)
    about = _extremes(report, ("gate_proj",), "width", _width, only=lambda one: one.shape_after != one.shape_before)
    about = f"Dense: {dense:,} channels. {about}" + (" Full widths are hollow." if lines[0].hollow else "")
    y = linear_axis([float(dense)], "channels", whole=True)
    chart = line_chart("widths", "FFN width by layer", about, lines, _layers(report), y)
    return figure("FFN width", about, _legend(lines), chart)


def _has_factors(report: CompressionReport, roles: Sequence[str]) -> bool:
    return any(one.rank is not None for role in roles for one in report.by_role(role))


def _error(one: ProjectionReport) -> float:
    return one.error


def _rank(one: ProjectionReport) -> float:
    """Of the factors, or of a dense matrix at most."""
    return float(min(one.shape_after) if one.rank is None else one.rank)


def _width(one: ProjectionReport) -> float:
    return float(one.shape_after[0])


def _lines(
    report: CompressionReport,
    roles: Sequence[str],
    value: Value,
    *,
    hollow: Callable[[ProjectionReport], bool],
    name: str = "",
) -> list[Series]:
    """One line for each of ``roles`` that there is, called ``name`` or like the role."""
    lines = []
    for role in roles:
        found = sorted(report.by_role(role), key=lambda one: one.layer)
        points = tuple((float(one.layer), value(one)) for one in found)
        outlined = frozenset(float(one.layer) for one in found if hollow(one))
        lines.append(Series(name or role, points, STYLES[role], hollow=outlined))
    return [line for line in lines if line.points]


def _extremes(
    report: CompressionReport,
    roles: Sequence[str],
    what: str,
    value: Value,
    *,
    only: Callable[[ProjectionReport], bool],
    digits: int = 0,
) -> str:
    """The smallest and the largest in words, among those that changed."""
    found = [one for role in roles for one in report.by_role(role) if only(one)]
    if not found:
        return "Nothing changed."
    least, most = (
        f"{value(one):,.{digits}f} (layer {one.layer}{f', {one.role}' if roles[1:] else ''})"
        for one in (min(found, key=value), max(found, key=value))
    )
    return f"Smallest {what} {least}, largest {most}."


def _legend(lines: Sequence[Series]) -> str:
    return legend([(line.name, line.style) for line in lines])


def _layers(report: CompressionReport) -> Axis:
    return index_axis(1 + max(one.layer for one in report.projections), "layer")
