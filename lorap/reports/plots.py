"""The look of all pictures: of the report page, of ``lorap inspect``, of ``lorap compare``, and of benchmarks/quality.

Colours stand out from white and from dark grey alike (tests/test_page_charts.py computes it), and an SVG has no ground, so that
one drawing serves light and dark pages. Lines also differ in marker, for colour-blind readers. matplotlib is the extra ``plot``;
nothing imports it before something is drawn.
"""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorap.architectures import ATTENTION, MLP

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

INK, GROUND = "#747d88", "#fefefe"
SERIES = ("#3b82d6", "#c9701c", "#2a9461", "#a465c8", "#1f8fa5", "#dd4b6e", "#8a8512")
MARKERS = ("o", "s", "^", "D", "P", "X", "v")
ROLE_LOOKS: dict[str, Any] = {
    role: {"color": colour, "marker": marker, "linestyle": "-" if role in ATTENTION else "--"}
    for role, colour, marker in zip(ATTENTION + MLP, SERIES, MARKERS, strict=True)
}
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "lorap",  # elements have the same names in every run
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with dollars in it is a name
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "figure.titlesize": 10,
    "grid.alpha": 0.3,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "axes.edgecolor", "grid.color"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
}
DPI = 150
# The names of an SVG's parts, and of what refers to them.
_NAMES = re.compile(r'(\bid="|href="#|"url\(#)')


def depth_colours() -> Colormap:
    """From the first decoder layer to the last."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("depth", ["#3b82d6", "#8a6fd8", "#c255b8", "#dd4b6e", "#c9601c"])


def save(figure: Figure, picture: Path) -> None:
    """Write a PNG, on white, or an SVG, by its name; the same figure is the same file."""
    if picture.suffix == ".svg":
        figure.savefig(picture, metadata={"Date": None}, transparent=True)
    else:
        figure.savefig(picture, dpi=DPI)


def page_svg(figure: Figure, name: str) -> str:
    """The drawing as an element of an HTML page, as wide as it is let be, grey as the page's style sheet has it.

    Args:
        figure: a unit of its size is a 72nd of an inch.
        name: unique on the page; begins the names of all its parts.
    """
    with StringIO() as drawn:
        figure.savefig(drawn, format="svg", metadata={"Date": None}, transparent=True)
        text = drawn.getvalue()
    inner = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL).partition(">")[2]
    colours = {INK: "var(--soft)", GROUND: "var(--card)"}

    def changed(tag: re.Match[str]) -> str:
        found = _NAMES.sub(rf"\1{name}-", tag[0])
        return re.sub("|".join(colours), lambda colour: colours[colour[0]], found)

    width, height = 72 * figure.get_size_inches()
    head = (
        f'<svg class="chart" id="{name}" viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="{name}-title" '
    )
    return f'{head}aria-describedby="{name}-about">{re.sub("<[^<>]+>", changed, inner)}'
