"""``fedloom compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.commands.app import (
    Assignments,
    Quiet,
    app,
    begin_loading,
    doubt,
    require_experiment,
    say,
)
from fedloom.commands.early_checks import refuse_early
from fedloom.runs.stopping import terminable
from fedloom.storage.output_paths import require_place


@app.command()
def compare(
    comparison: Annotated[
        Path,
        typer.Argument(help="Experiment in TOML with a section [compare].", show_default=False),
    ],
    assignments: Assignments = None,
    target: Annotated[
        Path | None, typer.Option("--to", help="Folder (default: comparisons/NAME).")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Runs side by side (default: one a core).", min=1)
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Run a grid of objectives or scenarios, methods and seeds; continues where it was stopped."""
    require_experiment(comparison)
    require_place(target, "--to")
    refuse_early(lambda: _check_comparison(comparison, assignments))
    begin_loading(quiet)
    from fedloom.commands.terminal import ComparisonTerminal, make_console, results_table
    from fedloom.reports.choose import write_page_of
    from fedloom.runs import comparison as grid

    plan = grid.read_comparison(comparison, assignments or [])
    console = make_console()
    observer = ComparisonTerminal(console, silent=quiet)
    with terminable():
        folder = grid.compare(plan, target, workers=workers, observer=observer)
    page = write_page_of([folder], None, doubt)
    console.print(results_table(folder))
    say(f"report: {page}  (open it in a browser)")


def _check_comparison(path: Path, assignments: list[str] | None) -> None:
    """Raise mistakes in a comparison that can be found without a model."""
    from fedloom.runs.comparison import read_comparison, require_readable

    require_readable(read_comparison(path, assignments or []))
