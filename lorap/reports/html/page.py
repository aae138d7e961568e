"""``report.html``: what a compression run did, as one page that needs nothing but itself.

The page is made from the :class:`~lorap.reports.run.CompressionReport` alone, so ``lorap report`` can write it anew at any
time. It holds no script and loads nothing, which its content security policy enforces. Every chart has its numbers in a table
beside or below it. Equal reports make equal pages.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

from lorap.architectures import PROJECTIONS
from lorap.config import RECIPES, CompressionConfig
from lorap.files import replacing
from lorap.reports.html.charts import bar_chart
from lorap.reports.html.layers import errors, sizes
from lorap.reports.html.spectra import spectra
from lorap.reports.html.style import style_sheet
from lorap.reports.html.tables import card, figure, pair, table
from lorap.reports.model_card import method_text, said_as_tuned
from lorap.reports.records import TUNED_HEADER
from lorap.reports.run import KIND_HEADER, PAGE, CompressionReport, correction_lines

# Bytes of a number, by the name of its dtype.
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_page(report: CompressionReport, folder: Path) -> Path:
    """Write ``report.html`` into a folder, in place of an older one, and return where it is."""
    with replacing(folder / PAGE) as draft:
        draft.write_text(compression_page(report), "utf-8")
    return folder / PAGE


def compression_page(report: CompressionReport) -> str:
    """The page, as text of an HTML file."""
    sections = {
        "Tuned after compression": _tunings(report),
        "Quality before tuning" if report.tunings else "Quality": _quality(report),
        "Parameters by kind": _parameters(report),
        "Ranks and widths by layer": sizes(report),
        "Errors by layer": errors(report),
        "Singular values": spectra(report),
        "Time and memory": _costs(report),
        "Calibration": _calibration(report),
        "Options": _options(report.config),
        "Environment": _environment(report),
        "Command": _command(report),
    }
    body = "\n".join(f"<section>\n<h2>{title}</h2>\n{told}\n</section>" for title, told in sections.items() if told)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(report.model)}, compressed by lorap{" and tuned" if report.tunings else ""}</title>
<style>
{style_sheet()}</style>
</head>
<body>
<main>
{_headline(report)}
{body}
<footer>The same for programs: lorap_report.json. <code>lorap report FOLDER</code> writes this page anew from it.</footer>
</main>
</body>
</html>
"""


def _headline(report: CompressionReport) -> str:
    """Model, method, and the numbers to know first."""
    config = report.config
    method = re.sub(r"\[([^]]+)\]\((https://[^)]+)\)", r'<a href="\2">\1</a>', escape(_method(report)))
    tiles = [
        ("Recipe", config.recipe, ""),
        ("Sparsity asked for", f"{config.sparsity:g}", f"of {' and '.join(config.sublayers)}"),
        ("Kept of these", f"{report.param_ratio:.4f}", _change(report.params_before, report.params_after)),
        _whole_model(report),
    ]
    for entry in report.evaluations:
        before, after = entry["before"], entry["after"]
        more = (
            f"{_change(before['perplexity'], after['perplexity'])}, {entry['increase_nats']:+.3f} nats"
            if before
            else ""
        )
        when = " before tuning" if report.tunings else ""
        tiles.append((f"Perplexity{when}, {entry['text']}", f"{after['perplexity']:,.2f}", more))
    for tuned in report.tunings[-1].evaluations if report.tunings else ():
        more = _change(tuned.before.perplexity, tuned.after.perplexity)
        tiles.append((f"Perplexity now, {tuned.text}", f"{tuned.after.perplexity:,.2f}", more))
    shown = "\n".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<span>{escape(more)}</span></dd></div>"
        for name, value, more in tiles
    )
    return f"""<header>
<p class="kicker">Compression report{", tuned since" if report.tunings else ""}</p>
<h1>{escape(report.model)}</h1>
<p>{method}</p>
<dl class="tiles">
{shown}
</dl>
</header>"""


def _method(report: CompressionReport) -> str:
    text = method_text(report.config, report.correction)
    return said_as_tuned(text) if report.tunings else text


def _tunings(report: CompressionReport) -> str:
    """Each training after the compression: what it was, and the loss before and after."""
    parts = []
    for tuning in report.tunings:
        parts.append(f"<p>{escape(tuning.summary)} It was made from {escape(tuning.model)}.</p>")
        if tuning.evaluations:
            rows = [entry.row() for entry in tuning.evaluations]
            parts.append(card(table("Loss before and after tuning", TUNED_HEADER, rows)))
    return "\n".join(parts)


def _whole_model(report: CompressionReport) -> tuple[str, str, str]:
    """Kept share of the whole model, its parameters, and about how many bytes they take."""
    before, after = report.params_total_before, report.params_saved
    dtype = str(report.environment.get("dtype"))
    size = f", about {after * ITEM_BYTES[dtype] / 1e6:,.1f} MB in {dtype}" if dtype in ITEM_BYTES else ""
    return "Kept of the whole model", f"{after / before:.4f}" if before else "unknown", _change(before, after) + size


def _quality(report: CompressionReport) -> str:
    corrected = "".join(
        f"<p>{escape(f'{line[:1].upper()}{line[1:]}.')}</p>" for line in correction_lines(report.correction)
    )
    if not report.evaluations:
        return f"<p>Perplexity was not measured. <code>lorap eval FOLDER --text FILE</code> measures it.</p>{corrected}"
    rows = []
    for entry in report.evaluations:
        before, after = entry["before"], entry["after"]
        dense, rise = (f"{before['perplexity']:,.2f}", f"{entry['increase_nats']:+.3f}") if before else ("", "")
        rows.append([entry["text"], dense, f"{after['perplexity']:,.2f}", rise, f"{after['tokens']:,}"])
    lengths = sorted({entry["after"]["seq_len"] for entry in report.evaluations})
    about = (
        f"Perplexity in windows of {' or '.join(map(str, lengths))} tokens, and the rise of the loss in nats per token."
    )
    header = ["text", "dense", "compressed", "nats", "tokens"]
    return f"<p>{about}</p>{card(table('Perplexity', header, rows))}{corrected}"


def _parameters(report: CompressionReport) -> str:
    bars = []
    for role in PROJECTIONS:
        if found := report.by_role(role):
            before, after = (sum(getattr(one, name) for one in found) for name in ("params_before", "params_after"))
            bars.append((role, before, after, _percent(after / before)))
    rest = report.params_total_before - sum(before for _, before, _, _ in bars)
    if rest > 0:
        bars.append(("the rest", rest, rest, _percent(1.0)))
    about = "Outline: the dense model. The rest: embeddings, head and norms, which stay."
    said = f"Kept: {'; '.join(f'{role} {share}' for role, _, _, share in bars)}."
    chart = bar_chart("parameters", "Parameters kept by kind", said, bars)
    header = ["", "before", *KIND_HEADER[2:]]
    numbers = table("Parameters by kind", header, report.kind_rows(), total=("compressed", "whole model"))
    return pair(figure("Kept by kind", about, chart), card(numbers))


def _costs(report: CompressionReport) -> str:
    seconds = {stage: round(value, 3) for stage, value in report.seconds.items()}  # as lorap_report.json has them
    total = sum(seconds.values())
    peaks = {"peak memory": report.peak_memory_bytes, "peak device memory": report.peak_device_memory_bytes}
    memory = [[name, f"{amount / 1e9:,.2f} GB"] for name, amount in peaks.items() if amount]
    about = f"{', '.join([f'{total:,.1f} seconds in all', *map(' '.join, memory)])}."
    bars = [(stage, value, value, f"{value:,.1f} s") for stage, value in seconds.items()]
    chart = bar_chart("seconds", "Seconds by stage", about, bars)
    rows = [[stage, f"{value:,.1f}", _percent(value / (total or 1))] for stage, value in seconds.items()]
    rows += [["all", f"{total:,.1f}", ""], *([*told, ""] for told in memory)]
    numbers = table("Time and memory", ["stage", "seconds", "share"], rows, total=("all",))
    return pair(figure("Seconds by stage", about, chart), card(numbers))


def _calibration(report: CompressionReport) -> str:
    found = report.calibration
    about = (
        f"{found['windows']:,} windows of {found['seq_len']:,} tokens from {found['name']}: {found['tokens']:,} tokens, "
        f"sha256 of the ids {found['sha256'][:16]}."
    )
    rows = [[one["name"], f"{one['weight']:.3g}", f"{one['windows']:,}"] for one in found.get("sources", ())]
    listed = card(table("Calibration sources", ["source", "weight", "windows"], rows)) if rows else ""
    return f"<p>{escape(about)}</p>{listed}"


def _options(config: CompressionConfig) -> str:
    """All options, those marked that are not what the recipe, or the default of an option that recipes leave alone, says."""
    usual = CompressionConfig(recipe=config.recipe).to_dict()
    rows, changed = [], []
    for name, value in config.to_dict().items():
        source = f"recipe {config.recipe}" if name in RECIPES[config.recipe] else "default"
        if value != usual[name]:
            changed.append(name)
            source = f"changed; {source}: {_plain(usual[name])}"
        rows.append([name, _plain(value), source])
    about = f"Changed: {', '.join(changed)}." if changed else "Nothing differs from the recipe and the defaults."
    listed = table("Options", ["option", "value", "from"], rows, changed=changed, words=True)
    return f"<p>{about}</p>{card(listed)}"


def _environment(report: CompressionReport) -> str:
    rows = [[name, str(value)] for name, value in report.environment.items()]
    return card(table("Environment", ["", "version or value"], rows, words=True)) if rows else ""


def _command(report: CompressionReport) -> str:
    if not report.command:
        return ""
    return f'<p class="soft">One click selects all of it.</p>{card(f"<pre>{escape(report.command)}</pre>")}'


def _change(before: float, after: float) -> str:
    """Two parameter counts, or two perplexities."""
    first, second = (f"{value:,}" if isinstance(value, int) else f"{value:,.2f}" for value in (before, after))
    return f"{first} \u2192 {second}"


def _plain(value: object) -> str:
    """A value about as the command line has it."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _percent(share: float) -> str:
    return f"{share * 100:.1f} %"
