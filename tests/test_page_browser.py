"""The report page as a browser lays it out: nothing cut, nothing overlapping, nothing loaded, on a phone and on a desk.

Needs Chromium or Chrome on PATH (Debian: ``apt-get install chromium``); skipped where there is none. The four screenshots of a
run are left in the test's folder, for people to look at: ``pytest tests/test_page_browser.py --basetemp FOLDER``.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import NAMES, Browser, find_browser, open_browser
from made_reports import HOSTILE, made_report

from lorap.reports.html.page import compression_page, write_page

EXECUTABLE = find_browser()
pytestmark = [
    pytest.mark.skipif(EXECUTABLE is None, reason=f"no browser: none of {', '.join(NAMES)} is on PATH"),
    pytest.mark.usefixtures("drawings"),
]

LONG = "an/unusually-" + "long" * 40
REPORTS: dict[str, dict[str, Any]] = {
    "best": {},
    "hostile-names": {
        "layers": 3,
        "model": HOSTILE,
        "texts": (HOSTILE, LONG),
        "command": f"lorap compress '{LONG}' {LONG}",
    },
    "long-names": {"layers": 2, "model": LONG, "environment": {LONG: LONG}, "seconds": {LONG: 123_456.7}},
    "eighty-layers": {"layers": 80, "hidden": 8192},
    "svd-llm": {"layers": 32, "recipe": "svd-llm"},
    "flap": {"layers": 9, "recipe": "flap", "sparsity": 0.35},
    "one-layer": {"layers": 1, "texts": (), "environment": {}, "seconds": {}, "command": ""},
}

# What is wrong with the layout, as a list of sentences.
FAULTS = """(() => {
  document.querySelectorAll('details').forEach(one => { one.open = true; });
  const faults = [], root = document.documentElement;
  const name = one => `${one.tagName}.${one.getAttribute('class')} ${one.textContent.slice(0, 30)}`;
  if (root.scrollWidth > innerWidth) faults.push(`the page is ${root.scrollWidth} wide in a window of ${innerWidth}`);
  for (const one of document.querySelectorAll('main *')) {
    if (one.closest('svg') !== null && one.tagName !== 'svg') continue;
    const box = one.getBoundingClientRect();
    if (!one.parentElement.closest('.scroll') && (box.left < 0 || box.right > innerWidth + 0.5))
      faults.push(`${name(one)} is cut: ${box.left} to ${box.right}`);
    const scrolls = getComputedStyle(one).overflowX === 'auto';
    if (one.tagName !== 'svg' && !scrolls && one.clientWidth > 0 && one.scrollWidth > one.clientWidth + 1)
      faults.push(`${name(one)} holds ${one.scrollWidth} in ${one.clientWidth}`);
  }
  for (const svg of document.querySelectorAll('svg.chart')) {
    const outer = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll('text')].map(one => [one, one.getBoundingClientRect()]);
    for (const one of svg.querySelectorAll('text, path, use')) {
      if (one.closest('defs, clipPath')) continue;
      const box = one.getBoundingClientRect();
      const beyond = [outer.left - box.left, box.right - outer.right, outer.top - box.top, box.bottom - outer.bottom];
      if (Math.max(...beyond) > 0.5)
        faults.push(`${svg.id}: ${name(one)} reaches out of the chart`);
    }
    texts.forEach(([one, a], i) => {
      if (a.height < 10) faults.push(`${svg.id}: ${name(one)} is ${a.height} pixels high`);
      for (const [other, b] of texts.slice(i + 1))
        if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom)
          faults.push(`${svg.id}: ${name(one)} and ${name(other)} overlap`);
    });
  }
  return faults;
})()"""
COUNTS = """({charts: document.querySelectorAll('svg.chart').length, texts: document.querySelectorAll('svg.chart text').length,
  ground: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.querySelector('h1')).color,
  text: getComputedStyle(document.querySelector('svg.chart text')).fill})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert EXECUTABLE is not None
    with open_browser(EXECUTABLE, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages by name, each made once."""
    return tmp_path_factory.mktemp("pages")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 390, 1280])
@pytest.mark.parametrize("name", REPORTS)
def test_nothing_is_cut_and_nothing_overlaps(name, width, dark, browser, folder):
    page = folder / f"{name}.html"
    if not page.exists():
        page.write_text(compression_page(made_report(**REPORTS[name])), "utf-8")
    browser.open(page, width=width, dark=dark)
    assert browser.run("innerWidth") == width
    assert browser.run(FAULTS) == []
    assert browser.run(COUNTS)["charts"] >= 3


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_colours_follow_the_system(dark, browser, tmp_path):
    browser.open(write_page(made_report(4), tmp_path), width=390, dark=dark)
    found = browser.run(COUNTS)
    light = {name: sum(map(int, re.findall(r"\d+", found[name]))) / 765 for name in ("ground", "ink", "text")}
    assert light["ink"] < light["text"] < 0.4 < 0.9 < light["ground"] or (
        dark and light["ground"] < 0.1 < 0.6 < light["text"] < light["ink"]
    )
    assert found["charts"] == 10
    assert found["texts"] > 60


def test_nothing_is_loaded_and_nothing_is_complained_about(browser, tmp_path):
    page = write_page(made_report(2, model=HOSTILE, texts=(HOSTILE,)), tmp_path)
    browser.open(page, width=1280)
    asked = [
        event["params"]["request"]["url"] for event in browser.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert asked == [page.as_uri()]
    assert [event for event in browser.events if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")] == []


def test_a_table_too_wide_scrolls_in_its_own_box(browser, tmp_path):
    browser.open(write_page(made_report(4), tmp_path), width=390)
    box = "document.querySelector('[aria-label=\"Parameters by kind\"]')"
    assert browser.run(f"{box}.scrollWidth > {box}.clientWidth")
    assert browser.run(f"{box}.scrollLeft = 50, {box}.scrollLeft") == 50
    assert browser.run("scrollTo(50, 0), scrollX") == 0


def test_one_click_selects_the_command(browser, tmp_path):
    browser.open(write_page(made_report(1, command="lorap compress './a  b' out"), tmp_path), width=390)
    browser.run("document.querySelector('pre').scrollIntoView()")
    x, y = browser.run("(b => [b.left + 30, b.top + 8])(document.querySelector('pre').getBoundingClientRect())")
    for kind in ("mousePressed", "mouseReleased"):
        browser.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    assert browser.run("String(getSelection())") == "lorap compress './a  b' out"


@pytest.mark.parametrize(
    ("what", "instead", "fault"),
    [
        (".scroll { overflow-x: auto;", ".scroll {", "SECTION.null"),
        (">k_proj</text>", ">k_proj and a name as long as that</text>", "overlap"),
        (">layer</text>", f">layer{', and more' * 12}</text>", "reaches out of the chart"),
    ],
    ids=["no-scrolling", "labels-overlap", "label-cut"],
)
def test_faults_are_found(what, instead, fault, browser, tmp_path):
    text = compression_page(made_report(4))
    assert what in text
    page = tmp_path / "broken.html"
    page.write_text(text.replace(what, instead), "utf-8")
    browser.open(page, width=390)
    assert any(fault in told for told in browser.run(FAULTS))


def test_screenshots(browser, tmp_path):
    """The whole page is on the picture, in the size of the window, and light and dark differ."""
    page = write_page(made_report(30), tmp_path)
    pictures = {}
    for width in (390, 1280):
        for dark in (False, True):
            browser.open(page, width=width, dark=dark)
            path = tmp_path / f"{width}-{'dark' if dark else 'light'}.png"
            browser.screenshot(path)
            pictures[width, dark] = path.read_bytes()
            size = struct.unpack(">II", pictures[width, dark][16:24])
            assert size == (width, browser.run("document.documentElement.scrollHeight"))
            assert size[1] > 3000
    assert len(set(pictures.values())) == 4
    assert len([path for path in Path(tmp_path).iterdir() if path.suffix == ".png"]) == 4
