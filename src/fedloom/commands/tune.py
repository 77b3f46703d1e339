"""``fedloom tune``."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.commands.app import (
    Assignments,
    ExperimentFile,
    app,
    begin_loading,
    check_rows,
    experiment_from,
    say,
)
from fedloom.commands.early_checks import refuse_early
from fedloom.errors import OutputError

if TYPE_CHECKING:
    from fedloom.runs.tuning import Tuning


@app.command()
def tune(
    experiment: ExperimentFile,
    assignments: Assignments = None,
    limit: Annotated[
        float, typer.Option(min=1, help="Seconds that the timings take at most.")
    ] = 120.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what is the fastest; write nothing.")
    ] = False,
) -> None:
    """Time settings that change speed alone, and write the fastest into the file."""
    if not math.isfinite(limit):
        raise typer.BadParameter(f"--limit {limit} is no number of seconds")
    refuse_early(lambda: _check(experiment, assignments, dry_run=dry_run))
    begin_loading(quiet=False)
    from fedloom.commands.terminal import make_console, tuning_table, working
    from fedloom.runs.tuning import tune as measure

    settings, console = experiment_from(experiment, assignments), make_console()
    with working(console, "reading data") as stage:
        found = measure(settings, limit, stage=stage)
    say(found.headline)
    for trial in found.trials:
        console.print(tuning_table(trial))
    for line in _outcome(experiment, found, dry_run=dry_run):
        say(line)


def _check(path: Path, assignments: list[str] | None, *, dry_run: bool) -> None:
    """Raise what can be told before anything is timed, also that the file could not be written."""
    from fedloom.runs.new_folder import require_rows

    check_rows(path, assignments)
    require_rows(experiment_from(path, assignments), None)
    if not dry_run:
        _changed(
            path, {"training.tokens_per_pass": 1, "training.threads": 1, "simulation.cohort": 1}
        )
        folder = path.resolve().parent
        if not os.access(folder, os.W_OK):
            raise OutputError(f"cannot write {path}: {folder} is not writable; give --dry-run")


def _outcome(path: Path, found: Tuning, *, dry_run: bool) -> list[str]:
    """Write what is worth it, and return what to say of each setting."""
    lines = []
    for trial in found.trials:
        first, best = trial.candidates[0], trial.best
        within = f"two timings of one value differ by {trial.noise:.1%}"
        if best is None:
            other = max(trial.candidates, key=lambda own: own.ratio)
            than = f"the best other, {other.value}, is {other.ratio:.2f} times as fast"
            why = "no other is faster" if other is first else than
            lines.append(f"{first.name}: {first.value} stays ({why}; {within}); not written")
            continue
        lines.append(
            f"{best.name}: {best.value} is {best.ratio:.2f} times as fast as {first.value} "
            f"({min(best.ratios):.2f} to {max(best.ratios):.2f}; {within}); "
            f"{'not written (--dry-run)' if dry_run else f'written into {path}'}"
        )
    if not found.trials:
        lines.append("training.tokens_per_pass: all values lay out these rows alike; not written")
    lines += [f"{name}: {why}; not timed" for name, why in found.untried.items()]
    if found.changes and not dry_run:
        _write(path, found.changes)
    return lines


def _write(path: Path, changes: dict[str, int]) -> None:
    """Set numbers in a file, which keeps its comments, layout and rights.

    Raises:
        SettingsError: A section is not written line by line.
        OutputError: The file cannot be written.
    """
    from fedloom.storage.files import write_atomically

    target = path.resolve()  # a link stays one
    write_atomically(target, _changed(path, changes).encode(), target.stat().st_mode & 0o777)


def _changed(path: Path, changes: dict[str, int]) -> str:
    """Return the text of a file with numbers set.

    Raises:
        SettingsError: A section is not written line by line.
    """
    from fedloom.settings.toml import set_key

    text = path.read_bytes().decode()
    for name, value in changes.items():
        section, key = name.split(".")
        text = set_key(text, section, key, value, str(path))
    return text
