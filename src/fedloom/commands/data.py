"""``fedloom partition`` and ``fedloom data``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.commands.app import (
    Assignments,
    ExperimentFile,
    Force,
    app,
    begin_loading,
    check_rows,
    data_app,
    experiment_from,
    say,
    terminal_observer,
)
from fedloom.commands.early_checks import refuse_early
from fedloom.storage.output_paths import free_file, require_new_file


@app.command()
def partition(
    experiment: ExperimentFile,
    assignments: Assignments = None,
    picture: Annotated[
        Path | None, typer.Option(help="Where the picture goes (default: NAME-partition.svg).")
    ] = None,
    force: Force = False,
) -> None:
    """Show the rows of each client, before anything is trained."""
    if picture is not None:
        require_new_file(picture, "--picture", force=force)
    refuse_early(lambda: check_rows(experiment, assignments))
    begin_loading(quiet=False)
    from fedloom.commands.terminal import make_console, working
    from fedloom.runs.partition_table import show_partition

    settings, console = experiment_from(experiment, assignments), make_console()
    target = picture or free_file(Path(f"{settings.name}-partition.svg"), force=force)
    with working(console, "reading the rows and partitioning them"):
        shown = show_partition(settings, target)
    console.print(shown.tables)
    for text in shown.warnings:
        terminal_observer(quiet=True).warning(text)
    say(f"picture: {target}")


@data_app.command("show")
def show_data(
    experiment: ExperimentFile,
    row: Annotated[int, typer.Option(help="Which training example, from 0 on.")] = 0,
    assignments: Assignments = None,
) -> None:
    """Show a row as the tokens that are trained on, before and after truncation."""
    refuse_early(lambda: check_rows(experiment, assignments))
    begin_loading(quiet=False)
    from fedloom.commands.row_view import show_row
    from fedloom.commands.terminal import make_console, working

    settings, console = experiment_from(experiment, assignments), make_console()
    with working(console, "reading the rows"):
        shown = show_row(settings, row)
    console.print(shown)
