"""Words of others as they are shown: on a terminal, on a page, in a figure, in a message.

Rows, columns, classes, file names and answers hold whatever somebody wrote. What would move a cursor,
colour a terminal, turn a line round, break a file or hide itself is shown as the escape that Python
would write for it; nothing is left out.
"""

from __future__ import annotations

import re

HIDDEN = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and newline: ESC, BEL, NUL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks and overrides of direction
    "\u2028\u2029"  # ends of lines that few programs take for such
    "\u200b\u2060-\u2065\ufeff"  # blanks without width; joiners (U+200C, U+200D) are part of scripts
    "\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e007f"  # no text, or text that nobody sees
    "\ud800-\udfff"  # halves of a pair, which no encoding writes
    "]"
)
"""What is not shown as it is."""

LONGEST_LINE = 1000
"""Characters of a line of a message; of a longer one the beginning is shown, and how many are left."""

MOST_LINES = 60
"""Lines of a message."""

LONGEST_LABEL = 60
"""Characters of a label in a figure."""


def visible(text: str) -> str:
    r"""Return a text with what cannot be seen, or does something else, as an escape such as ``\x1b``.

    Newlines and tabs stay, and ``\r\n`` is a newline.
    """
    return HIDDEN.sub(_escape, text.replace("\r\n", "\n"))


def named(name: object) -> str:
    """Return a name, of a file or a column, on one line with all that is in it visible."""
    return visible(str(name)).replace("\n", "\\n").replace("\t", "\\t")


def quoted(value: object, longest: int) -> str:
    """Return a value as Python writes it, of at most so many characters."""
    text = repr(value)
    return text if len(text) <= longest else text[: longest - 3] + "..."


def placed(name: object, row: int) -> str:
    """Return where a row stands, as :meth:`fedloom.runs.partitioning.Division.place` says it."""
    return f"{named(name)} row {row}"


def short(text: str, longest: int) -> str:
    """Return a text of one line of at most so many characters, all of them visible."""
    line = " ".join(visible(text[: 4 * longest]).split())
    return line if len(line) <= longest and len(text) <= 4 * longest else f"{line[: longest - 1]}…"


def message(text: str) -> str:
    """Return a message as it is printed: visible, and neither too many nor too long lines."""
    lines = text.replace("\r\n", "\n").split("\n")
    shown = [_bounded(line) for line in lines[:MOST_LINES]]
    if len(lines) > MOST_LINES:
        shown.append(f"... and {len(lines) - MOST_LINES:,} more lines")
    return "\n".join(shown)


def label(text: object) -> str:
    """Return a text as a label in a figure: short, on one line, and never hidden from a legend."""
    shown = short(str(text), LONGEST_LABEL)
    return f" {shown}" if shown.startswith("_") else shown  # matplotlib leaves out "_names"


def _bounded(line: str) -> str:
    more = len(line) - LONGEST_LINE
    return visible(line) if more <= 0 else f"{visible(line[:LONGEST_LINE])}... ({more:,} more)"


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
