"""What all pictures have in common. matplotlib is the extra ``plot``; nothing else imports it before something is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# The salt gives elements of an SVG the same names in every run.
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "lorap",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
DPI = 150


def save(figure: Any, picture: Path) -> None:
    """Write a PNG or an SVG, by its name; an SVG without the date, so that the same picture is the same file."""
    figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None, dpi=DPI)
