"""Tables in documents: each between two markers, so that the command that makes it can make it again."""

from __future__ import annotations

from pathlib import Path

from lorap.reports.run import markdown_table as markdown  # noqa: F401 - all tables of benchmarks are written by it


def between(document: str, name: str, text: str) -> str:
    """``text`` between the markers ``name`` of ``document``, in place of what was there.

    Raises:
        ValueError: a marker is missing or there twice, or they are in the wrong order.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if document.count(begin) != 1 or document.count(end) != 1 or document.index(begin) > document.index(end):
        raise ValueError(f"the document needs one line {begin} and after it one line {end}")
    before, rest = document.split(begin)
    return f"{before}{begin}\n\n{text.strip()}\n\n{end}{rest.split(end)[1]}"


def insert(path: Path, name: str, text: str) -> None:
    """The same in a file."""
    path.write_text(between(path.read_text("utf-8"), name, text), "utf-8")
