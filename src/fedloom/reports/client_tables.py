"""Tables with a row a client: whole while they are short, else drawn by the page as they are searched.

Ten thousand rows of HTML take a browser seconds to lay out, and nobody reads them. Of a long table the
page holds the cells as data, shows the first rows, and those that a search finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedloom.display.untrusted_text import visible
from fedloom.reports.run_data import MANY

MOST = 200
"""Rows of a table that is in the page as it is."""

FIRST = 50
"""Rows of a longer one that are shown at a time."""


@dataclass(frozen=True)
class ClientTable:
    """A table with a row a client, whose first cell is its number.

    Attributes:
        columns: Titles.
        rows: Cells, as they are read.
        lists: Whether the last cell is a list, which is read from its left edge.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    lists: bool = False

    @property
    def searched(self) -> bool:
        """Whether it can be searched."""
        return len(self.rows) > MANY

    @property
    def long(self) -> bool:
        """Whether only some rows are in the page as HTML."""
        return len(self.rows) > MOST

    @property
    def first(self) -> Sequence[Sequence[str]]:
        """Rows that are in the page as HTML."""
        return self.rows[:FIRST] if self.long else self.rows

    @property
    def data(self) -> list[list[str]]:
        """All cells with what would not be seen made visible, for the page's script."""
        return [[visible(cell) for cell in row] for row in self.rows]


def quantiles(values: Sequence[float]) -> list[float]:
    """Return the least, the lower tenth, the median, the upper tenth and the most of some values."""
    return [float(own) for own in np.quantile(values, [0, 0.1, 0.5, 0.9, 1])]
