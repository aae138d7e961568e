"""A comparison as a picture: quality against size, and quality against speed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorap.errors import ConfigError
from lorap.evaluation.comparison.contender import DECODE, Contender
from lorap.reports.plots import INK, SERIES, STYLE, save

SUFFIXES = (".png", ".svg")


def check_plot(picture: Path) -> None:
    """Say before any work that a picture cannot be made.

    Raises:
        ConfigError: neither PNG nor SVG, no such folder, or matplotlib is not installed.
    """
    if picture.suffix not in SUFFIXES:
        raise ConfigError(f"cannot draw {picture.name}: its name must end with {' or '.join(SUFFIXES)}")
    if not picture.absolute().parent.is_dir():
        raise ConfigError(f"cannot write {picture}: there is no folder {picture.parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("drawing needs matplotlib: pip install 'lorap[plot]'; or leave out --plot") from None


def draw(contenders: Sequence[Contender], picture: Path) -> list[str]:
    """Write ``picture``; the first contender is the one that others are compared with.

    Returns:
        Labels of contenders that lack a number and are in no panel.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    panels: Any = (
        ("weights on disk, MB", lambda one: one.bytes and one.bytes / 1e6, lambda _: None),
        (
            "decoding, tokens/s: median and range of rounds",
            lambda one: one.rate(DECODE),
            lambda one: one.rate_range(DECODE),
        ),
    )
    shown = set()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 3.6), layout="constrained")
        for axis, (title, value, reach) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
            points: list[Any] = [(one.label, value(one), one.nats(), reach(one)) for one in contenders]
            complete = [point for point in points if None not in point[:3]]
            _panel(axis, complete, title, dense=contenders[0].label)
            shown |= {label for label, *_ in complete}
        figure.axes[0].set_ylabel("nats per token, mean over texts\n(lower is better)")
        save(figure, picture)
    return [one.label for one in contenders if one.label not in shown]


def _panel(axis: Any, points: Sequence[Any], title: str, *, dense: str) -> None:
    axis.set_xlabel(title)
    axis.margins(0.25, 0.2)
    places = [across for _, across, *_ in points]
    low, width = min(places, default=0), max(places, default=0) - min(places, default=0)
    for label, across, nats, reach in points:
        first = label == dense
        colour = INK if first else SERIES[0]
        axis.plot(across, nats, marker="D" if first else "o", color=colour, linestyle="none", gid=label)
        if reach is not None:
            axis.hlines(nats, *reach, color=colour, linewidth=1.2)
        # Labels grow towards the middle, where there is room; below the dense model, which loses least, there is no other.
        side = (across - low) / width if width else 0.5
        along = "right" if side > 0.6 else "left" if side < 0.4 else "center"
        height = {"xytext": (0, -7), "va": "top"} if first else {"xytext": (0, 7)}
        text = f"{label} (dense)" if first else label
        axis.annotate(text, (across, nats), color=colour, textcoords="offset points", ha=along, **height)
        if first:
            axis.axvline(across, color=colour, linewidth=0.8, linestyle=":")
            axis.axhline(nats, color=colour, linewidth=0.8, linestyle=":")
