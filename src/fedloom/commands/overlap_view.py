"""What ``fedloom data overlap`` prints, without what computes."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fedloom.accounting.quantities import human_count
from fedloom.data.text_statistics import Shared, matrix_of
from fedloom.display.untrusted_text import label


def overlap_view(names: Sequence[str], found: Shared) -> Group:
    """Return how many rows parties have in common, in numbers alone."""
    table = Table(title="rows in common", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in names:
        table.add_column(Text(label(name)), justify="right", overflow="fold")
    for name, row in zip(names, matrix_of(found, range(len(names))), strict=True):
        table.add_row(Text(label(name)), *(human_count(count) for count in row))
    lines = [
        Text(f"{human_count(count)} rows are with {number} of {len(names)} parties")
        for number, count in found.holders.items()
    ]
    return Group(table, Text(), *lines)
