"""Charts of the report page: which there are, where lines, bars and markers stand, how they are told, and their colours."""

from __future__ import annotations

import math
import re

import pytest
from made_reports import KEY, made_report
from page_reader import page_of

from lorap.architectures import ATTENTION, PROJECTIONS
from lorap.config import RECIPES
from lorap.reports.html.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, index_axis, linear_axis, log_axis
from lorap.reports.html.spectra import FAINT, value_at
from lorap.reports.html.style import DARK, LIGHT, SERIES

# ----------------------------------------------------------------------------------------------------------------------
# Charts


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_its_charts(recipe):
    page = page_of(made_report(5, recipe=recipe))
    charts = {one["attrs"]["id"] for one in page.all("svg", _class="chart")}
    factors = {"best": ATTENTION, "lorap": ATTENTION, "svd-llm": PROJECTIONS, "flap": ()}[recipe]
    wanted = {"parameters", "errors-attention", "errors-FFN", "seconds"} | {f"spectrum-{role}" for role in factors}
    wanted |= {"ranks-attention"} if factors else set()
    assert charts == wanted | {"ranks-FFN" if len(factors) == 7 else "widths"}


def test_lines_have_a_point_for_every_layer_and_dense_ones_are_hollow():
    report = made_report(30)
    page = page_of(report)
    lines = page.lines("ranks-attention")
    assert {style: len(points) for style, points in lines.items()} == {"a0": 30, "a1": 30, "a2": 30, "a3": 30}
    assert {style: len(points) for style, points in page.lines("errors-FFN").items()} == {"f0": 30, "f1": 30, "f2": 30}
    hollow = [
        one["attrs"]["class"]
        for one in page.within(page.chart("ranks-attention"), "path")
        if "hollow" in str(one["attrs"])
    ]
    assert hollow == ["mark a2 hollow"] * 8  # v_proj of layers 1, 5, ..., 29
    says = {one["text"] for one in page.within(page.chart("ranks-attention"), "title")}
    assert "v_proj, 1: 192" in says
    assert f"q_proj, 3: {min(576, 576) // 6}" in says


def test_extremes_stand_where_the_axes_say():
    """Ranks on a scale from 0 at the bottom to the round number at the top; layers from the left to the right."""
    report = made_report(30)
    page = page_of(report)
    texts = [one for one in page.within(page.chart("ranks-attention"), "text") if one["attrs"]["text-anchor"] == "end"]
    scale = {float(one["text"]): float(one["attrs"]["y"]) for one in texts if one["text"] != "layer"}
    assert scale == {
        0: HEIGHT - BOTTOM,
        50: pytest.approx(135, abs=0.1),
        100: 98,
        150: pytest.approx(61, abs=0.1),
        200: TOP,
    }
    for role, style in (("q_proj", "a0"), ("k_proj", "a1")):
        ranks = {one.layer: one.rank for one in report.by_role(role)}
        for layer, (x, y) in enumerate(page.lines("ranks-attention")[style]):
            assert x == pytest.approx(LEFT + (layer + 0.5) / 30 * (WIDTH - LEFT - RIGHT), abs=0.06)
            assert y == pytest.approx(HEIGHT - BOTTOM - ranks[layer] / 200 * (HEIGHT - BOTTOM - TOP), abs=0.06)
    dense = page.lines("ranks-attention")["a2"][1][1]
    assert dense == pytest.approx(HEIGHT - BOTTOM - KEY / 200 * (HEIGHT - BOTTOM - TOP), abs=0.06)


def test_bars_are_as_long_as_the_numbers():
    report = made_report(3)
    page = page_of(report)
    rects = page.within(page.chart("parameters"), "rect")
    outlines, bars = (
        [float(one["attrs"]["width"]) for one in rects if one["attrs"]["class"] == kind] for kind in ("outline", "bar")
    )
    totals = [
        (sum(one.params_before for one in found), sum(one.params_after for one in found))
        for found in map(report.by_role, PROJECTIONS)
    ]
    totals.append((28_346_688, 28_346_688))
    longest = max(before for before, _ in totals)
    for (before, after), outline, bar in zip(totals, outlines, bars, strict=True):
        assert outline / max(outlines) == pytest.approx(before / longest, abs=1e-3)
        assert bar / max(outlines) == pytest.approx(after / longest, abs=1e-3)
    texts = [one["text"] for one in page.within(page.chart("parameters"), "text")]
    assert texts[-2:] == ["the rest", "100.0 %"]
    assert texts[:2] == ["q_proj", f"{totals[0][1] / totals[0][0] * 100:.1f} %"]


def test_a_spectrum_is_cut_at_the_rank():
    report = made_report(1)
    page = page_of(report)
    (points,) = page.lines("spectrum-q_proj").values()
    (one,) = report.by_role("q_proj")
    (mark,) = [path for path in page.within(page.chart("spectrum-q_proj"), "path") if "mark" in path["attrs"]["class"]]
    x, y = map(float, re.findall(r"[\d.]+", mark["attrs"]["transform"]))
    assert one.rank == 192
    assert x == pytest.approx(LEFT + math.log(192) / math.log(576) * (WIDTH - LEFT - RIGHT), abs=0.06)
    share = 1 + math.log10(192**-0.8) / 3  # three powers of ten from 0.001 to 1
    assert y == pytest.approx(HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP), abs=0.1)
    assert points[0] == (LEFT, TOP)
    assert [across for across, _ in points] == sorted(across for across, _ in points)


def test_value_between_known_ones_lies_on_a_line_of_a_logarithmic_chart():
    points = {1.0: 1.0, 4.0: 0.25, 16.0: 0.01}
    assert value_at(points, 2.0) == pytest.approx(0.5)
    assert value_at(points, 8.0) == pytest.approx(0.05)
    assert [value_at(points, x) for x in (0.5, 4.0, 99.0)] == [1.0, 0.25, 0.01]
    assert value_at({1.0: 1.0, 4.0: 0.0}, 2.0) == 1.0
    assert 0 < FAINT < 0.1


@pytest.mark.parametrize("top", [1e-7, 0.3066, 0.8, 1.0, 7.0, 24.9, 192.0, 1536.0, 99_999.0])
@pytest.mark.parametrize("whole", [False, True])
def test_linear_axis_is_round_and_not_too_tall(top, whole):
    axis = linear_axis([math.nan, -3.0, top, math.inf], "x", whole=whole)
    steps = {
        round((b - a) / (axis.ticks[1] - axis.ticks[0]), 9) for a, b in zip(axis.ticks, axis.ticks[1:], strict=False)
    }
    assert axis.ticks[0] == axis.low == 0
    assert axis.high == axis.ticks[-1] >= top * (1 - 1e-9)
    assert steps == {1}
    assert 2 <= len(axis.ticks) <= 6
    assert whole or axis.high < 2 * top
    assert not whole or axis.ticks[1] == int(axis.ticks[1])


def test_other_axes():
    assert index_axis(1, "layer").ticks == (0,)
    assert index_axis(30, "layer").ticks == (0, 5, 10, 15, 20, 25)
    assert index_axis(126, "layer").ticks == (0, 20, 40, 60, 80, 100, 120)
    assert [index_axis(4, "layer").share(layer) for layer in (0, 3)] == [0.125, 0.875]
    assert log_axis(1.0, 576.0, "x").ticks == (1, 10, 100)
    assert log_axis(1.0, 1.0, "x").ticks == (1, 10)
    assert log_axis(0.001, 1.0, "x").share(0.01) == pytest.approx(1 / 3)
    assert log_axis(0.001, 1.0, "x").share(0.0) == 0.0


def test_charts_can_be_heard():
    """Each has a title and a description, unique ids, and its numbers in a table; what is drawn beside them is hidden."""
    page = page_of(made_report(5, recipe="svd-llm"))
    ids = [one["attrs"]["id"] for one in page.elements if "id" in one["attrs"]]
    assert len(ids) == len(set(ids))
    for svg in page.all("svg"):
        if svg["attrs"].get("aria-hidden") == "true":
            continue
        named = {one["attrs"].get("id"): one["text"] for one in page.within(svg, "title") + page.within(svg, "desc")}
        assert svg["attrs"]["role"] == "img"
        assert len(named[svg["attrs"]["aria-labelledby"]]) > 8
        assert len(named[svg["attrs"]["aria-describedby"]]) > 20
    for box in page.all("div", _class="scroll"):
        assert box["attrs"]["role"] == "region"
        assert box["attrs"]["tabindex"] == "0"
        assert box["attrs"]["aria-label"]
    assert [one["attrs"]["lang"] for one in page.all("html")] == ["en"]


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


def test_contrast_is_computed_as_the_standard_does():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_texts_and_lines_stand_out(colours):
    for ink in ("ink", "soft", "link"):
        for ground in ("paper", "card"):
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    assert contrast(colours["ink"], colours["mark"]) >= 4.5
    for line in (*SERIES, "bar"):
        assert contrast(colours[line], colours["card"]) >= 3, line
    assert LIGHT.keys() == DARK.keys()
