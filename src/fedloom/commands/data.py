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
    require_experiment,
    say,
    terminal_observer,
)
from fedloom.commands.early_checks import refuse_early
from fedloom.errors import OutputError, SettingsError
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


@data_app.command("stats")
def data_stats(
    experiment: ExperimentFile,
    html: Annotated[
        Path | None, typer.Option(help="Also write a page with pictures to this file.")
    ] = None,
    assignments: Assignments = None,
    force: Force = False,
) -> None:
    """Show what the rows are like: lengths in tokens, truncation, overlaps, scripts, labels."""
    if html is not None:
        require_new_file(html, "--html", force=force)
    refuse_early(lambda: check_rows(experiment, assignments))
    begin_loading(quiet=False)
    from fedloom.commands.data_view import statistics_view
    from fedloom.commands.terminal import make_console, working
    from fedloom.reports.data_page import write_data_page
    from fedloom.runs.data_statistics import data_statistics

    settings, console = experiment_from(experiment, assignments), make_console()
    with working(console, "reading the rows"):
        record = data_statistics(settings)
    console.print(statistics_view(record))
    if html is not None:
        say(f"page: {write_data_page(record, html)}")


@data_app.command("check")
def check_all(experiment: ExperimentFile, assignments: Assignments = None) -> None:
    """Check every source and every client's rows; exits 1 with all faults that there are."""
    refuse_early(lambda: _readable(experiment, assignments))
    begin_loading(quiet=False)
    from fedloom.commands.data_view import check_view
    from fedloom.commands.terminal import make_console, working
    from fedloom.runs.data_check import check_data

    settings, console = experiment_from(experiment, assignments), make_console()
    with working(console, "reading the rows"):
        found = check_data(settings)
    console.print(check_view(found), highlight=False)
    raise typer.Exit(1 if any(own.state == "fault" for own in found) else 0)


def _readable(experiment: Path, assignments: list[str] | None) -> None:
    """Raise mistakes in an experiment; faults of its files are found together, later."""
    require_experiment(experiment)
    experiment_from(experiment, assignments)


@data_app.command("fingerprint")
def fingerprint_rows(
    own: Annotated[
        Path, typer.Argument(help="A client's own file in TOML, with [data].", show_default=False)
    ],
    key: Annotated[Path, typer.Option(help="The key that all clients share.", show_default=False)],
    output: Annotated[
        Path, typer.Option(help="File to write, for the one who compares.", show_default=False)
    ],
    new_key: Annotated[
        bool, typer.Option("--new-key", help="Make the key: one client does, and tells the others.")
    ] = False,
    force: Force = False,
) -> None:
    """Write fingerprints of a client's rows, by which somebody without the key counts what is shared."""
    require_new_file(output, "--output", force=force)
    if output.resolve() == key.resolve():
        raise OutputError(f"{output} is the key, too: name another file with --output")
    if new_key:
        require_new_file(key, "--key")
    from fedloom.data.fingerprints import fingerprints, make_key, read_key, write_fingerprints
    from fedloom.deployment.client_file import OwnFile

    data = OwnFile.read(own).data
    if data is None:
        raise SettingsError([f"{own} has no [data]: it names no rows"], "the command")
    if data.share == "experiment":
        raise SettingsError(
            [
                'data.share = "experiment" has the rows of all clients in one source: use fedloom data '
                "stats with the experiment's file, which counts what clients have in common"
            ],
            "the command",
        )
    if not new_key:
        read_key(key)
    begin_loading(quiet=False)
    from fedloom.deployment.own_rows import own_rows

    rows = own_rows(data)
    if new_key:
        make_key(key)
        say(f"wrote {key}: give it to the other clients, and not to the one who compares")
    found = fingerprints(rows, read_key(key))
    write_fingerprints(found, output)
    say(
        f"wrote {output}: {len(found.rows)} different rows; give it to the one who compares, and to no "
        "other client"
    )


@data_app.command("overlap")
def show_overlap(
    files: Annotated[
        list[Path],
        typer.Argument(help="Files of fedloom data fingerprint, one a client.", show_default=False),
    ],
) -> None:
    """Show how many rows clients have in common, from their fingerprints: sizes of sets, no rows."""
    from fedloom.commands.overlap_view import overlap_view
    from fedloom.commands.terminal import make_console
    from fedloom.data.fingerprints import compare

    make_console().print(overlap_view([str(path) for path in files], compare(files)))
