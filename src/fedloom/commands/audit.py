"""``fedloom audit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.commands.app import (
    Assignments,
    Quiet,
    audit_app,
    begin_loading,
    experiment_from,
    require_experiment,
    say,
)
from fedloom.commands.early_checks import refuse_early
from fedloom.errors import DataError, SettingsError


@audit_app.command()
def verify(
    run: Annotated[Path, typer.Argument(help="Run folder, or its audit log.", show_default=False)],
) -> None:
    """Check that the audit log was not changed."""
    from fedloom.security.audit_log import verify as check
    from fedloom.storage.run_folder import require_released

    require_released(run)
    found = check(run)
    say(
        f"{found.lines} lines are intact: {found.clients} clients, {found.refused} messages refused; "
        f"the last hash is {found.last}"
    )
    if found.earlier:
        say(f"{found.earlier} lines before these are in files that are not here")
    if found.unequal:
        round, action = found.unequal[0]
        say(
            f"in {len(found.unequal)} of {found.exchanges} exchanges not all clients were sent the same, "
            f"first in round {round} ({action})"
        )
    elif found.exchanges:
        say(f"in all {found.exchanges} exchanges all clients were sent the same")


@audit_app.command("match")
def match_logs(
    run: Annotated[Path, typer.Argument(help="Run folder, or its log.", show_default=False)],
    client: Annotated[
        Path, typer.Argument(help="A client's folder, or its log.", show_default=False)
    ],
) -> None:
    """Check that a run's log and a client's own log agree about the client's messages."""
    from fedloom.security.audit_log import match
    from fedloom.storage.run_folder import require_released

    require_released(run)
    found = match(run, client)
    lost = f"; {found.lost} answers did not arrive" if found.lost else ""
    say(
        f"run {found.run[:8]}: {found.asked} messages to the client and {found.answered} answers are the "
        f"same in both logs{lost}"
    )


@audit_app.command()
def privacy(
    what: Annotated[
        Path,
        typer.Argument(help="An experiment in TOML, or a run folder.", show_default=False),
    ],
    rows: Annotated[
        Path | None,
        typer.Option(
            help="With a run folder: JSONL of the rows' owner, with member = true or false in each."
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(help="With an experiment: rounds at most. [default: all]", min=1),
    ] = None,
    canaries: Annotated[
        int, typer.Option(help="With an experiment: planted rows of each kind.", min=0, max=10_000)
    ] = 60,
    inversions: Annotated[
        int,
        typer.Option(
            help="With an experiment: updates, the last ones, of which rows are looked for by gradient "
            "inversion; each takes a minute or more.",
            min=0,
            max=100,
        ),
    ] = 0,
    assignments: Assignments = None,
    quiet: Quiet = False,
) -> None:
    """Attack what clients send and what is released: tokens, rows, membership, canaries.

    Of an experiment a run is made with planted rows. Of a run folder the released adapter is attacked,
    with rows that their owner names.
    """
    refuse_early(lambda: _check_privacy(what, rows, assignments))
    observer = begin_loading(quiet)
    from fedloom.reports.privacy_audit_page import summary, write_privacy_audit
    from fedloom.runs.privacy_audit.audit import audit_experiment, audit_run
    from fedloom.storage.run_folder import AUDIT

    _check_privacy(what, rows, assignments)
    if rows is not None:
        folder = audit_run(what, rows, observer)
    else:
        experiment = experiment_from(what, assignments)
        folder = audit_experiment(
            experiment,
            rounds=rounds,
            canaries=canaries,
            observer=observer,
            inversions=inversions,
        )
    for line in summary(folder.read_record(AUDIT) or {}):
        say(line)
    say(f"audit: {write_privacy_audit(folder.path)}  (open it in a browser)")


def _check_privacy(what: Path, rows: Path | None, assignments: list[str] | None) -> None:
    """Raise mistakes in an audit that can be found without a model."""
    if rows is not None or what.is_dir():
        from fedloom.experiment.experiment import Experiment
        from fedloom.storage.run_folder import EXPERIMENT, RunFolder

        RunFolder.existing(what)
        Experiment.from_toml(what / EXPERIMENT)
        if rows is None:
            raise SettingsError(
                [
                    f"{what} is a run: its released adapter is attacked with rows that their owner "
                    'names: give --rows FILE.jsonl, with "member": true for rows that were trained on '
                    "and false for others; or attack what clients send: fedloom audit privacy "
                    f"{what}/experiment.toml"
                ],
                "the command",
            )
        if assignments:
            raise SettingsError(["--set goes with an experiment, not with a run"], "the command")
        if not rows.is_file():
            raise DataError(
                f"there are no rows at {rows}: --rows names a JSONL file of their owner"
            )
        from fedloom.runs.adapter_paths import adapter_folder

        adapter_folder(what)
        return
    from fedloom.runs.new_folder import require_startable

    require_experiment(what)
    require_startable(experiment_from(what, assignments))
