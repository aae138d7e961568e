"""Charts of the report page: which there are, that lines and bars are the report's numbers, how they are told, and colours."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import replace
from typing import Any

import pytest
from made_reports import HOSTILE, KEY, made_report
from page_reader import page_of

from lorap.architectures import ATTENTION, MLP, PROJECTIONS
from lorap.config import RECIPES
from lorap.reports import plots
from lorap.reports.html import charts
from lorap.reports.html.page import compression_page

mpl = pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("drawings")


def drawn(chart: charts.Chart) -> Any:
    """The axes that a chart is drawn on."""
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    chart.draw(axes)
    return axes


def points(chart: charts.Chart, name: str) -> list[tuple[float, float]]:
    (line,) = [line for line in drawn(chart).get_lines() if line.get_gid() == name]
    return list(zip(*line.get_data(), strict=True))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_its_charts(recipe):
    page = page_of(made_report(2, recipe=recipe))
    factors = {"best": ATTENTION, "lorap": ATTENTION, "svd-llm": PROJECTIONS, "aa-svd": PROJECTIONS, "flap": ()}[recipe]
    wanted = ["parameters", *(["ranks-attention"] if factors else []), "ranks-FFN" if len(factors) == 7 else "widths"]
    wanted += ["errors-attention", "errors-FFN", *(f"spectrum-{role}" for role in factors), "seconds"]
    assert [one["attrs"]["id"] for one in page.all("svg", _class="chart")] == wanted


def test_lines_are_the_numbers_of_every_layer_and_what_stayed_is_hollow():
    report = made_report(30)
    ranks, widths = charts.size_charts(report)
    errors = dict(zip(("attention", "FFN"), charts.error_charts(report), strict=True))
    for role in ATTENTION:
        wanted = [(one.layer, one.rank or KEY) for one in report.by_role(role)]
        assert points(ranks, role) == wanted
        dense = [(one.layer, KEY) for one in report.by_role(role) if one.rank is None]
        assert points(ranks, f"{role}-hollow") == dense
        assert len(dense) == (8 if role == "v_proj" else 0)
    assert points(widths, "gate_proj") == [(one.layer, one.shape_after[0]) for one in report.by_role("gate_proj")]
    for group, roles in (("attention", ATTENTION), ("FFN", MLP)):
        for role in roles:
            assert points(errors[group], role) == [(one.layer, one.error) for one in report.by_role(role)]
    assert [point[0] for point in points(errors["attention"], "v_proj-hollow")] == list(range(1, 30, 4))
    assert drawn(ranks).get_ylim()[0] == drawn(errors["FFN"]).get_ylim()[0] == 0
    assert [text.get_text() for text in drawn(ranks).get_legend().get_texts()] == list(ATTENTION)


def test_extremes_are_told_in_words():
    report = made_report(30)
    ranks, widths = charts.size_charts(report)
    known = {one.rank for role in ATTENTION for one in report.by_role(role) if one.rank}
    told = [
        (int(rank), int(layer), role) for rank, layer, role in re.findall(r"(\d+) \(layer (\d+), (\w+)\)", ranks.about)
    ]
    assert [rank for rank, _, _ in told] == [min(known), max(known)]
    ranks_of = {(one.layer, one.role): one.rank for one in report.projections}
    assert all(ranks_of[layer, role] == rank for rank, layer, role in told)
    assert "hollow" in ranks.about
    assert "hollow" not in widths.about
    assert "1,536" in widths.title
    same = [replace(one, rank=None, error=0.0, shape_after=one.shape_before) for one in report.projections]
    assert all("Nothing changed" in chart.about for chart in charts.error_charts(replace(report, projections=same)))


def test_bars_are_as_long_as_the_numbers():
    chart = charts.bar_chart(
        "x", "X", "about", [("q_proj", 8.0, 2.0, "25 %"), ("a_long_name_of_a_part", 4.0, 1.0, "25 %")]
    )
    axes = drawn(chart)
    filled, outlines = ([bar.get_width() for bar in bars] for bars in axes.containers)
    assert (filled, outlines) == ([2, 1], [8, 4])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["q_proj", "a_long_na\u2026"]
    assert axes.get_ylim() == (1.5, -0.5), "the first on top"


def test_a_spectrum_is_cut_at_the_rank():
    report = made_report(1)
    chart = charts.spectrum_charts(report)[0]
    (one,) = report.by_role("q_proj")
    line, mark = drawn(chart).get_lines()
    assert list(line.get_xdata()) == list(one.spectrum.indices)
    assert list(line.get_ydata()) == pytest.approx(one.spectrum.values, abs=charts.FAINT)
    assert one.rank == 192
    (cut,) = mark.get_ydata()
    assert (list(mark.get_xdata()), cut) == ([192], pytest.approx(192**-0.8, rel=1e-3))
    assert f"{cut:.2g} (layer 0)" in chart.about
    # Between known values 96 and 128, on a line of a logarithmic chart.
    between = charts.spectrum_charts(replace(report, projections=[replace(one, rank=100)]))[0]
    assert drawn(between).get_lines()[1].get_ydata() == pytest.approx([100**-0.8], rel=1e-3)


@pytest.mark.parametrize("evil", [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e308, 5e-324])
def test_whatever_the_numbers_are_there_is_a_drawing(evil):
    report = made_report(2, seconds={HOSTILE: evil, "$\\frac$ \u6a21": 1.0})
    report.projections = [
        replace(
            one, error=evil, spectrum=one.spectrum and replace(one.spectrum, values=(evil,) * len(one.spectrum.values))
        )
        for one in report.projections
        if one.role in ("q_proj", "gate_proj")
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = page_of(report)
    assert len(page.all("svg", _class="chart")) == 7
    texts = [one["text"].strip() for one in page.all("text")]
    assert HOSTILE[:9] + "\u2026" in texts
    assert "$\\frac$ \u6a21" in texts


def test_charts_can_be_heard():
    """Each has a title and a description, ids are unique, and refer to what is there."""
    page = page_of(made_report(2, recipe="svd-llm"))
    ids = [one["attrs"]["id"] for one in page.elements if "id" in one["attrs"]]
    assert len(ids) == len(set(ids))
    by_id = {one["attrs"]["id"]: one["text"] for one in page.elements if "id" in one["attrs"]}
    for svg in page.all("svg"):
        assert svg["attrs"]["role"] == "img"
        assert len(by_id[svg["attrs"]["aria-labelledby"]]) > 5
        assert len(by_id[svg["attrs"]["aria-describedby"]]) > 20
    for element in page.elements:
        for name in ("xlink:href", "clip-path"):
            if name in element["attrs"]:
                assert element["attrs"][name].removeprefix("url(").strip("#)") in by_id
    for box in page.all("div", _class="scroll"):
        assert (box["attrs"]["role"], box["attrs"]["tabindex"]) == ("region", "0")
        assert box["attrs"]["aria-label"]
    assert [one["attrs"]["lang"] for one in page.all("html")] == ["en"]


def test_without_matplotlib_there_are_the_tables_and_the_way_to_charts(monkeypatch):
    report = made_report(3)
    whole = page_of(report)
    monkeypatch.setattr(charts, "has_matplotlib", lambda: False)
    bare = page_of(report)
    assert not bare.all("svg")
    assert "pip install 'lorap[plot]'" in [one["text"] for one in bare.all("code")]
    assert "lorap report FOLDER" in [one["text"] for one in bare.all("code")]
    assert [one["text"] for one in bare.all("table")] == [one["text"] for one in whole.all("table")]
    assert [one["text"] for one in bare.all("figcaption")] == [one["text"] for one in whole.all("figcaption")]


# ----------------------------------------------------------------------------------------------------------------------
# Colours


def contrast(first: str, second: str) -> float:
    """As WCAG 2 defines it, from 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted(map(luminance, (first, second)))
    return (high + 0.05) / (low + 0.05)


def schemes(page: str) -> list[dict[str, str]]:
    """The colours of the style sheet by name: light, then dark."""
    light, dark = re.findall(r":root \{([^}]*)\}", page)
    assert page.index("prefers-color-scheme: dark") < page.index(dark)
    return [dict(re.findall(r"--(\w+): (#\w{6})", found)) for found in (light, dark)]


def test_texts_and_lines_stand_out_in_both_schemes():
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)
    depths = [mpl.colors.to_hex(plots.depth_colours()(share / 20)) for share in range(21)]
    for colours in schemes(compression_page(made_report(1))):
        for ink in ("ink", "soft", "link"):
            for ground in ("paper", "card"):
                assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
        assert contrast(colours["ink"], colours["mark"]) >= 4.5
        for line in (*plots.SERIES, *depths, plots.INK):
            assert contrast(line, colours["card"]) >= 3, line


def test_drawings_have_no_grey_and_no_ground_of_their_own():
    text = compression_page(made_report(2))
    drawings = text[text.index("<svg") :]
    assert plots.INK not in drawings
    assert plots.GROUND not in drawings
    assert "var(--soft)" in drawings
