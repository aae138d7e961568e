"""The style sheet of the report page: light, and dark where the reader's system is.

Colours are variables, one set for each. Texts have a contrast of 4.5 against what they stand on, lines and markers of 3
(tests/test_page.py computes it).
"""

LIGHT = {
    "paper": "#f6f7f9",
    "card": "#ffffff",
    "edge": "#d5dae1",
    "grid": "#e3e7ec",
    "ink": "#1a2029",
    "soft": "#545e6b",
    "link": "#1a5fb4",
    "mark": "#fdf3d7",
    "bar": "#2f6db5",
    # Attention: q, k, v, o. FFN: gate, up, down. Then from the first to the last layer.
    "a0": "#1f6fd0",
    "a1": "#bd540a",
    "a2": "#0b7d56",
    "a3": "#8a3fb0",
    "f0": "#08788a",
    "f1": "#c0264b",
    "f2": "#6f6a00",
    "d0": "#2f7fd6",
    "d1": "#6a5fd0",
    "d2": "#9b45b8",
    "d3": "#bf3a7c",
    "d4": "#c2402a",
}
DARK = {
    "paper": "#12151a",
    "card": "#1b2027",
    "edge": "#38414d",
    "grid": "#2b323b",
    "ink": "#e8ebef",
    "soft": "#a6b0bc",
    "link": "#84b8f5",
    "mark": "#3a3320",
    "bar": "#5f9be0",
    "a0": "#6aa9ff",
    "a1": "#ff9d57",
    "a2": "#45c796",
    "a3": "#cf97f2",
    "f0": "#4fc3d6",
    "f1": "#ff7d97",
    "f2": "#c9c04a",
    "d0": "#62aef7",
    "d1": "#9a93f5",
    "d2": "#c987e6",
    "d3": "#ee7fb0",
    "d4": "#ff8f75",
}
SERIES = tuple(name for name in LIGHT if name[1:].isdigit())

_RULES = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 24px 16px 48px; }
h1, h2, h3, p, li, td, th, dt, dd { overflow-wrap: anywhere; }
h1 { margin: 0 0 8px; font-size: 1.75rem; line-height: 1.2; }
h2 { margin: 40px 0 12px; font-size: 1.25rem; }
h3 { margin: 0 0 4px; font-size: 1rem; }
p { margin: 0 0 12px; max-width: 75ch; }
a { color: var(--link); }
.soft, .tiles dt, figcaption p { color: var(--soft); }
.kicker { margin: 0; color: var(--soft); font-size: 0.875rem; }
.tiles { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 12px; margin: 20px 0 0; }
.tiles div, figure, .card { padding: 12px 16px; background: var(--card); border: 1px solid var(--edge); border-radius: 8px; }
.tiles dt { font-size: 0.8125rem; }
.tiles dd { margin: 0; font-size: 1.375rem; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tiles dd span { display: block; font-size: 0.8125rem; font-weight: 400; color: var(--soft); }
.charts { display: grid; grid-template-columns: minmax(0, 1fr); gap: 12px; margin: 0 0 12px; }
.charts > *, .pair > * { min-width: 0; margin: 0; }
.pair { display: grid; grid-template-columns: minmax(0, 1fr); gap: 12px; align-items: start; }
figcaption p { margin: 0 0 8px; font-size: 0.8125rem; line-height: 1.4; }
.chart { display: block; width: 100%; max-width: 560px; height: auto; margin: 0 auto; overflow: hidden; }
.chart text { fill: var(--soft); font: 12px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
@media (min-width: 560px) { .charts .chart text { font-size: 9.5px; } }
@media (min-width: 860px) {
  .tiles { grid-template-columns: repeat(4, minmax(0, 1fr)); }
  .charts { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .pair { grid-template-columns: minmax(0, 310px) minmax(0, 1fr); }
  .pair .chart text { font-size: 12.5px; }
}
.grid { stroke: var(--grid); fill: none; }
.tick { stroke: var(--soft); fill: none; }
.line { fill: none; stroke-width: 1.5; stroke-linejoin: round; }
.mark { stroke-width: 1.2; }
.mark.hollow { fill: var(--card); }
.bar { fill: var(--bar); }
.outline { fill: none; stroke: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 0 0 4px; padding: 0; list-style: none; font-size: 0.8125rem; }
.legend li { display: inline-flex; align-items: center; gap: 6px; }
/* Where more of a table is hidden at a side, that side has a shadow; the card's colour moves with the table and covers it. */
.scroll {
  overflow-x: auto;
  background:
    linear-gradient(to right, var(--card) 40%, transparent) left / 32px 100% no-repeat local,
    linear-gradient(to left, var(--card) 40%, transparent) right / 32px 100% no-repeat local,
    linear-gradient(to right, var(--edge), transparent) left / 12px 100% no-repeat scroll,
    linear-gradient(to left, var(--edge), transparent) right / 12px 100% no-repeat scroll;
}
table { width: 100%; border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 8px 5px 0; border-bottom: 1px solid var(--grid); text-align: right; vertical-align: top; }
th:first-child, td:first-child, .words th, .words td { text-align: left; }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 400; }
.scroll th, .scroll td { white-space: nowrap; overflow-wrap: normal; }
.words th, .words td { white-space: normal; overflow-wrap: break-word; }
tr.changed th, tr.changed td { background: var(--mark); font-weight: 600; }
tr.total th, tr.total td { font-weight: 600; }
details { margin: 12px 0 0; }
summary { padding: 4px 0; cursor: pointer; color: var(--link); }
@media (max-width: 559px) {
  table { font-size: 0.8125rem; }
}
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; user-select: all; font: 0.875rem/1.5 ui-monospace, monospace; }
footer { margin: 40px 0 0; color: var(--soft); font-size: 0.875rem; }
@media print { details, .card, figure { break-inside: avoid; } }
"""


def style_sheet() -> str:
    """All of it."""
    series = "\n".join(f".{name} {{ stroke: var(--{name}); fill: var(--{name}); }}" for name in SERIES)
    dark = f"@media (prefers-color-scheme: dark) {{ {_variables(DARK)} }}"
    # The rules come last: a line has no fill, whatever its series.
    return f":root {{ color-scheme: light dark; }}\n{_variables(LIGHT)}\n{dark}\n{series}\n{_RULES.strip()}\n"


def _variables(colours: dict[str, str]) -> str:
    return f":root {{ {' '.join(f'--{name}: {value};' for name, value in colours.items())} }}"
