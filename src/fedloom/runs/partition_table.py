"""Tables of the rows of each client, before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from fedloom.data.loading import DataSource
from fedloom.display.untrusted_text import named
from fedloom.errors import OutputError
from fedloom.experiment.experiment import Experiment
from fedloom.runs.partitioning import partition_data
from fedloom.runs.records import account_tables, partition_record, partition_table


@dataclass(frozen=True)
class Shown:
    """The tables of a partition, and warnings."""

    record: dict[str, Any]
    tables: RenderableType
    warnings: tuple[str, ...]


def show_partition(
    experiment: Experiment, picture: Path | None, source: DataSource | None = None
) -> Shown:
    """Return what each client holds and what became of every row.

    Args:
        experiment: The settings.
        picture: Where a picture of the former is written, if it is wanted.
        source: A user's own source of examples instead of the one in the settings.

    Raises:
        DataError: The rows cannot be read or dealt.
        OutputError: The picture cannot be written.
    """
    from fedloom.reports.figures import partition_svg

    division = partition_data(experiment, source)
    record = partition_record(experiment, division)
    if picture is not None:
        try:
            picture.write_text(partition_svg(record, standalone=True), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write {picture}: {error.strerror}") from error
    lines = [Text(named(text), style="dim") for text in division.loaded.layouts]
    accounts = account_tables(division.accounts.to_record())
    tables = Group(*lines, partition_table(record), accounts)
    return Shown(record, tables, division.accounts.warnings)
