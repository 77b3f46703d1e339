"""Who holds which rows, shown before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from fedloom.data.loading import LoadedData
from fedloom.display.untrusted_text import named
from fedloom.errors import OutputError
from fedloom.experiment.experiment import Experiment
from fedloom.runs.division import partition_data
from fedloom.runs.observers import RunObserver
from fedloom.runs.records import account_tables, partition_record, partition_table


@dataclass(frozen=True)
class Shown:
    """What is shown of a division: tables, and what a user should know of it."""

    tables: RenderableType
    warnings: tuple[str, ...]


def show_partition(experiment: Experiment, picture: Path) -> Shown:
    """Return what each client holds and what became of every row, and write the picture of the former."""
    from fedloom.reports.figures import partition_svg

    division = partition_data(experiment)
    record = partition_record(experiment, division)
    try:
        picture.write_text(partition_svg(record, standalone=True), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {picture}: {error.strerror}") from error
    lines = [Text(named(text), style="dim") for text in division.loaded.layouts]
    accounts = account_tables(division.accounts.to_record())
    return Shown(Group(*lines, partition_table(record), accounts), division.accounts.warnings)


def say_layouts(loaded: LoadedData, observer: RunObserver) -> None:
    """Say by which layout each file was read."""
    for text in loaded.layouts:
        observer.stage(named(text))
