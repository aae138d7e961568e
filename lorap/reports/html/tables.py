"""What the report page is put together from besides charts: tables, figures, and what is folded away."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape


def table(
    label: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    changed: Collection[str] = (),
    total: Collection[str] = (),
    words: bool = False,
) -> str:
    """A table in a box of its own, which scrolls sideways where the page is too narrow for it.

    Args:
        label: what it is, for screen readers.
        header: of the columns.
        rows: texts, the first of each being what the row is called.
        changed, total: names of rows that are set apart.
        words: whether the cells are words, which may wrap, and not numbers. Names also wrap behind an underscore.
    """
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in header)
    lines = []
    for name, *cells in rows:
        kind = "changed" if name in changed else "total" if name in total else ""
        told = "".join(f"<td>{_cell(cell, words)}</td>" for cell in cells)
        start = f'<tr class="{kind}">' if kind else "<tr>"
        lines.append(f'{start}<th scope="row">{_cell(name, words)}</th>{told}</tr>')
    body = "\n".join(lines)
    box = f'class="scroll{" words" if words else ""}" role="region" aria-label="{escape(label)}" tabindex="0"'
    return f"<div {box}><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"


def card(content: str) -> str:
    """Content in a box of its own."""
    return f'<div class="card">{content}</div>'


def figure(title: str, about: str, *drawings: str) -> str:
    """Drawings under a title and one sentence."""
    return (
        f"<figure><figcaption><h3>{escape(title)}</h3><p>{escape(about)}</p></figcaption>{''.join(drawings)}</figure>"
    )


def figures(*found: str) -> str:
    """Figures side by side where there is room."""
    return f'<div class="charts">{"".join(found)}</div>'


def pair(left: str, right: str) -> str:
    """A small thing and a wide one, side by side where there is room."""
    return f'<div class="pair">{left}{right}</div>'


def details(label: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that is shown on demand."""
    return f"<details><summary>{escape(label)}</summary>{card(table(label, header, rows))}</details>"


def _cell(text: str, words: bool) -> str:
    return escape(text).replace("_", "_<wbr>") if words else escape(text)
