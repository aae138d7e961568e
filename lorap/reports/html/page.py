"""``report.html``: what a compression run did, as one page that needs nothing but itself.

The page is made from the :class:`~lorap.reports.run.CompressionReport` alone, so ``lorap report`` can write it anew at any
time. It holds no script and loads nothing, which its content security policy enforces. Every chart has its numbers in a table
beside or below it; without matplotlib there are the tables alone. Equal reports make equal pages.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from lorap.architectures import PROJECTIONS
from lorap.config import RECIPES, CompressionConfig
from lorap.files import replacing
from lorap.reports.html import charts
from lorap.reports.model_card import method_text, said_as_tuned
from lorap.reports.records import TUNED_HEADER
from lorap.reports.run import (
    KIND_HEADER,
    PAGE,
    CompressionReport,
    ProjectionReport,
    correction_lines,
    expert_lines,
    solver_lines,
    storage_lines,
)

# Bytes of a number, by the name of its dtype.
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
Table = tuple[list[str], list[list[str]]]


def write_page(report: CompressionReport, folder: Path) -> Path:
    """Write ``report.html`` into a folder, in place of an older one, and return where it is."""
    with replacing(folder / PAGE) as draft:
        draft.write_text(compression_page(report), "utf-8")
    return folder / PAGE


def compression_page(report: CompressionReport) -> str:
    """The page, as text of an HTML file."""
    options, changed = _options(report.config)
    sources = report.calibration.get("sources", ())
    found: dict[str, Any] = {
        "report": report,
        "drawn": charts.has_matplotlib(),
        "method": _method(report),
        "tiles": _tiles(report),
        "tuned_header": TUNED_HEADER,
        "tunings": [(tuning, [entry.row() for entry in tuning.evaluations]) for tuning in report.tunings],
        "kind_header": ["", "before", *KIND_HEADER[2:]],
        "perplexities": _perplexities(report),
        "charts": _charts(report),
        "tables": _tables(report),
        "notes": {
            "correction": correction_lines(report.correction) + correction_lines(report.rescaling, "scale"),
            "factors": expert_lines(report) + solver_lines(report) + storage_lines(report),
        },
        "faint": charts.FAINT,
        "sources": [[one["name"], f"{one['weight']:.3g}", f"{one['windows']:,}"] for one in sources],
        "options": options,
        "changed": changed,
    }
    return _template().render(found)


@cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2")


def _method(report: CompressionReport) -> Any:
    """In words, with links."""
    from markupsafe import Markup, escape  # comes with jinja2

    text = method_text(report.config, report.correction, report.rescaling)
    text = str(escape(said_as_tuned(text) if report.tunings else text))
    return Markup(re.sub(r"\[([^]]+)\]\((https://[^)]+)\)", r'<a href="\2">\1</a>', text))


def _tiles(report: CompressionReport) -> list[tuple[str, str, str]]:
    """The numbers to know first: what each is, the number, and more about it."""
    config, before, after = report.config, report.params_total_before, report.params_saved
    dtype = str(report.environment.get("dtype"))
    size = f", about {after * ITEM_BYTES[dtype] / 1e6:,.1f} MB in {dtype}" if dtype in ITEM_BYTES else ""
    kept = f"{after / before:.4f}" if before else "unknown"
    tiles = [
        ("Recipe", config.recipe, ""),
        (
            "Sparsity that follows" if config.has_byte_budget else "Sparsity asked for",
            f"{config.sparsity:g}",
            ", ".join(filter(None, (f"of {' and '.join(config.sublayers)}", config.budget_text))),
        ),
        ("Kept of these", f"{report.param_ratio:.4f}", f"{report.params_before:,} \u2192 {report.params_after:,}"),
        ("Kept of the whole model", kept, f"{before:,} \u2192 {after:,}{size}"),
    ]
    when = " before tuning" if report.tunings else ""
    for text, dense, compressed, rise, _ in _perplexities(report):
        more = f"{dense} \u2192 {compressed}, {rise} nats" if dense else ""
        tiles.append((f"Perplexity{when}, {text}", compressed, more))
    for tuned in report.tunings[-1].evaluations if report.tunings else ():
        first, now = (f"{one.perplexity:,.2f}" for one in (tuned.before, tuned.after))
        tiles.append((f"Perplexity now, {tuned.text}", now, f"{first} \u2192 {now}"))
    return tiles


def _perplexities(report: CompressionReport) -> list[list[str]]:
    rows = []
    for entry in report.evaluations:
        before, after = entry["before"], entry["after"]
        dense, rise = (f"{before['perplexity']:,.2f}", f"{entry['increase_nats']:+.3f}") if before else ("", "")
        rows.append([entry["text"], dense, f"{after['perplexity']:,.2f}", rise, f"{after['tokens']:,}"])
    return rows


def _charts(report: CompressionReport) -> dict[str, Any]:
    kinds = []
    for role in PROJECTIONS:
        if found := report.by_role(role):
            before, after = (sum(getattr(one, name) for one in found) for name in ("params_before", "params_after"))
            kinds.append((role, before, after, _percent(after / before)))
    rest = report.params_total_before - sum(before for _, before, _, _ in kinds)
    if rest > 0:
        kinds.append(("the rest", rest, rest, _percent(1.0)))
    about = "Outline: the dense model. The rest: embeddings, head and norms, which stay."
    seconds = _seconds(report)
    stages = [(stage, value, value, f"{value:,.1f} s") for stage, value in seconds.items()]
    return {
        "parameters": charts.bar_chart("parameters", "Kept by kind", about, kinds),
        "sizes": charts.size_charts(report),
        "errors": charts.error_charts(report),
        "spectra": charts.spectrum_charts(report),
        "seconds": charts.bar_chart(
            "seconds", "Seconds by stage", f"{sum(seconds.values()):,.1f} seconds in all.", stages
        ),
    }


def _tables(report: CompressionReport) -> dict[str, Table | None]:
    """The numbers of the charts, one row per layer."""
    header, rows = _by_layer(report, lambda one: "dense" if one.rank is None else f"{one.rank:,}")
    widths = {str(one.layer): f"{one.shape_after[0]:,}" for one in report.by_role("gate_proj")}
    stored = any(one.storage_error for one in report.projections)
    return {
        "sizes": (
            [header[0], *(f"{role} rank" for role in header[1:]), "FFN width"],
            [[*row, widths.get(row[0], "")] for row in rows],
        ),
        "errors": _by_layer(report, lambda one: f"{one.error:.4f}"),
        "storage": _by_layer(report, lambda one: f"{one.storage_error:.2g}") if stored else None,
        "spectra": _spectra(report),
        "costs": _costs(report),
    }


def _by_layer(report: CompressionReport, cell: Callable[[ProjectionReport], str]) -> Table:
    """One column per role that there is."""
    roles = [role for role in PROJECTIONS if report.by_role(role)]
    found = {(one.layer, one.role): cell(one) for one in report.projections}
    layers = sorted({one.layer for one in report.projections})
    return ["layer", *roles], [[str(layer), *(found.get((layer, role), "") for role in roles)] for layer in layers]


def _spectra(report: CompressionReport) -> Table:
    """One row per projection, one column per index; the last one known differs, and has a column of its own."""
    known = [(one, one.spectrum) for one in report.projections if one.spectrum is not None]
    columns = sorted({index for _, spectrum in known for index in spectrum.indices[:-1]})
    rows = []
    for one, spectrum in known:
        values = dict(zip(spectrum.indices, spectrum.values, strict=True))
        cells = [f"{values[index]:.4g}" if index in values else "" for index in columns]
        last = f"{spectrum.values[-1]:.4g} (number {spectrum.count:,})"
        rows.append([f"{one.layer} {one.role}", f"{one.rank:,}" if one.rank else "", *cells, last])
    return ["layer", "rank", *(f"{index:,}" for index in columns), "last known"], rows


def _seconds(report: CompressionReport) -> dict[str, float]:
    """As lorap_report.json has them, so that it makes the same page."""
    return {stage: round(value, 3) for stage, value in report.seconds.items()}


def _costs(report: CompressionReport) -> Table:
    seconds = _seconds(report)
    total = sum(seconds.values())
    rows = [[stage, f"{value:,.1f}", _percent(value / (total or 1))] for stage, value in seconds.items()]
    rows.append(["all", f"{total:,.1f}", ""])
    peaks = {"peak memory": report.peak_memory_bytes, "peak device memory": report.peak_device_memory_bytes}
    rows += [[name, f"{amount / 1e9:,.2f} GB", ""] for name, amount in peaks.items() if amount]
    return ["stage", "seconds", "share"], rows


def _options(config: CompressionConfig) -> tuple[list[list[str]], list[str]]:
    """All options, and which of them are not what the recipe, or the default of an option that recipes leave alone, says."""
    usual = CompressionConfig(recipe=config.recipe).to_dict()
    rows, changed = [], []
    for name, value in config.to_dict().items():
        source = f"recipe {config.recipe}" if name in RECIPES[config.recipe] else "default"
        if value != usual.get(name):
            changed.append(name)
            source = f"changed; {source}: {_plain(usual.get(name, 'none'))}"
        rows.append([name, _plain(value), source])
    return rows, changed


def _plain(value: object) -> str:
    """A value about as the command line has it."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _percent(share: float) -> str:
    return f"{share * 100:.1f} %"
