"""Tables as notebooks show them: HTML in which all text is escaped, and nothing is fetched or run."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from fedloom.display.untrusted_text import short

LONGEST_CELL = 200
"""Characters of a cell, and of a heading."""


def shown(text: object) -> str:
    """Return a text as HTML: visible, on one line, of at most so many characters, escaped."""
    return html.escape(short(str(text), LONGEST_CELL))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table with a heading as HTML.

    Args:
        title: Stands above it.
        columns: Their headings.
        rows: One cell a column each.
    """
    head = "".join(f'<th style="text-align:left">{shown(name)}</th>' for name in columns)
    body = "".join(
        "<tr>" + "".join(f'<td style="text-align:left">{shown(c)}</td>' for c in row) + "</tr>"
        for row in rows
    )
    return (
        f"<table><caption>{shown(title)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )
