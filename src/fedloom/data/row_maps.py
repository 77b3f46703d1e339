"""``data.map`` and ``data.filter`` of a source: columns that are computed, and rows that are kept."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedloom.data.expressions import Expression, parse_expression
from fedloom.data.rows import RowError
from fedloom.data.sources import SourceSettings
from fedloom.errors import DataError

FILTERED = "data.filter is not true of it"
"""Why a sound row is left out."""


@dataclass(frozen=True)
class RowMap:
    """What is computed of a row before it is read.

    Attributes:
        computed: New column to its expression, in this order.
        kept_if: True of the rows that are kept; ``None`` where all are.
        section: Where the settings stand.
    """

    computed: Mapping[str, Expression]
    kept_if: Expression | None
    section: str = "data"

    @classmethod
    def of(cls, settings: SourceSettings, section: str) -> RowMap:
        """Read the expressions of a source's settings, which have been checked."""
        computed = {name: parse_expression(text) for name, text in settings.map.items()}
        return cls(
            computed, parse_expression(settings.filter) if settings.filter else None, section
        )

    def apply(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row with what is computed of it.

        Raises:
            RowError: An expression has no value, or the row is not among those that are kept.
        """
        whole = dict(row)
        for name, expression in self.computed.items():
            whole[name] = expression.of(whole)
        if self.kept_if is not None and not self.kept_if.of(whole):
            raise RowError(FILTERED, malformed=False)
        return whole

    def looked_at(self, name: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return a file's first rows as they will be read; those without a value as they are.

        Raises:
            DataError: None of them has a column that an expression names.
        """
        if not self.computed and self.kept_if is None:
            return list(rows)
        there = {column for row in rows for column in row}
        for setting, expression in self._by_setting():
            for column in expression.columns:
                if column not in there:
                    raise DataError(self._absent(name, setting, expression, column, there))
            if setting.startswith("map."):
                there.add(setting.removeprefix("map."))
        found = []
        for row in rows:
            whole = dict(row)
            try:
                for column, expression in self.computed.items():
                    whole[column] = expression.of(whole)
            except RowError:
                whole = dict(row)  # what is wrong with it is told where it is read
            found.append(whole)
        return found

    def _by_setting(self) -> list[tuple[str, Expression]]:
        several = [(f"map.{name}", own) for name, own in self.computed.items()]
        return several if self.kept_if is None else [*several, ("filter", self.kept_if)]

    def _absent(
        self, name: str, setting: str, expression: Expression, column: str, there: set[str]
    ) -> str:
        names = sorted(map(str, there))
        near = difflib.get_close_matches(column, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return (
            f"{name} has no column {column!r}, which {self.section}.{setting} = {expression.text!r} "
            f"names; {hint}it has: {', '.join(names)}. A text stands in quotes; a column that few rows "
            f'have is row.get("{column}")'
        )
