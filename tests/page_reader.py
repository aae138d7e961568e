"""The report page as a test reads it: elements, and tables by their labels."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from lorap.reports.html.page import compression_page
from lorap.reports.run import CompressionReport

VOID = {"meta", "wbr", "img", "br", "link", "input"}


class Page(HTMLParser):
    """The page as elements: (tag, attributes, text inside, ancestors), and a check that every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[dict[str, Any]] = []
        self._open: list[dict[str, Any]] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = {"tag": tag, "attrs": dict(attrs), "text": "", "inside": list(self._open)}
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append({"tag": tag, "attrs": dict(attrs), "text": "", "inside": list(self._open)})

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()["tag"] == tag

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element["text"] += data

    def all(self, tag: str, **attrs: str) -> list[dict[str, Any]]:
        """Elements of a kind; an attribute ``class`` need only contain what is asked for."""
        return [
            element
            for element in self.elements
            if element["tag"] == tag
            and all(value in (element["attrs"].get(name.strip("_")) or "").split() for name, value in attrs.items())
        ]

    def within(self, element: dict[str, Any], tag: str) -> list[dict[str, Any]]:
        return [one for one in self.all(tag) if any(above is element for above in one["inside"])]

    def rows(self, label: str) -> dict[str, list[str]]:
        """A table by the first cells of its rows, the header under ``header``."""
        (box,) = [one for one in self.all("div", _class="scroll") if one["attrs"]["aria-label"] == label]
        rows = {}
        for row in self.within(box, "tr"):
            cells = [one["text"] for one in self.elements if row in one["inside"] and one["tag"] in ("th", "td")]
            rows["header" if self.within(row, "th")[0]["attrs"]["scope"] == "col" else cells[0]] = cells
        return rows


def page_of(report: CompressionReport) -> Page:
    return Page(compression_page(report))
