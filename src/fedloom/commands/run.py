"""``fedloom run``, ``follow``, ``demo`` and ``init``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.commands.app import (
    SERVER_FOLDER,
    Assignments,
    Force,
    Quiet,
    ServerFolderOption,
    app,
    begin_loading,
    experiment_from,
    require_experiment,
    say,
    terminal_observer,
)
from fedloom.commands.early_checks import refuse_early
from fedloom.errors import SettingsError
from fedloom.runs.stopping import terminable
from fedloom.storage.output_paths import require_new_file, require_place

if TYPE_CHECKING:
    from fedloom.experiment.experiment import Experiment
    from fedloom.runs.workers import Workers


@app.command()
def run(
    experiment: Annotated[
        Path | None, typer.Argument(help="Experiment in TOML.", show_default=False)
    ] = None,
    assignments: Assignments = None,
    resume: Annotated[
        Path | None, typer.Option(help="Continue the run in this folder instead.")
    ] = None,
    from_round: Annotated[
        int | None, typer.Option(help="With --resume: go back to the checkpoint of this round.")
    ] = None,
    fresh_client: Annotated[
        list[int] | None,
        typer.Option(
            help="With --resume: this client starts with an empty store. May be repeated."
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(help="simulation: all clients in this process; flower: on other machines."),
    ] = "simulation",
    workers: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="Processes of this machine that work on clients; auto: as many as fit. The results are "
            "those of one process.",
        ),
    ] = "1",
    server_folder: ServerFolderOption = SERVER_FOLDER,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Leave a trace for Perfetto in the run folder."),
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Run an experiment, or continue one."""
    count = _workers(workers)
    if engine not in ("simulation", "flower"):
        raise typer.BadParameter(f"{engine!r} is not an engine; there are simulation and flower")
    if profile and engine == "flower":
        raise typer.BadParameter("--profile is of a simulation: clients elsewhere are not recorded")
    if engine == "flower":
        if count != 1:
            raise typer.BadParameter(
                "--workers is for clients of this machine, not --engine flower"
            )
        _run_between_machines(
            server_folder, experiment, assignments, resume, from_round, fresh_client, quiet=quiet
        )
        return
    if experiment is None and resume is None:
        raise typer.BadParameter("give an experiment file, or --resume FOLDER")
    if resume is None and (from_round is not None or fresh_client):
        raise typer.BadParameter("--from-round and --fresh-client go with --resume FOLDER")
    if experiment is not None:
        require_experiment(experiment)
    refuse_early(lambda: _check_run(experiment, assignments, resume))
    observer = begin_loading(quiet)
    from fedloom.runs.run import resume_run, run_experiment

    with terminable():
        if resume is not None:
            result = resume_run(
                resume,
                experiment,
                assignments or [],
                from_round=from_round,
                fresh_clients=fresh_client or [],
                observer=observer,
                profile=profile,
                workers=count,
            )
        else:
            assert experiment is not None
            result = run_experiment(
                _read_run(experiment, assignments),
                observer=observer,
                profile=profile,
                workers=count,
            )
    say(result.summary_text)


def _workers(text: str) -> Workers:
    """Read ``--workers``."""
    if text == "auto":
        return "auto"
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise typer.BadParameter(f"--workers {text!r}: give a number from 1, or auto")


def _check_run(experiment: Path | None, assignments: list[str] | None, resume: Path | None) -> None:
    """Raise mistakes in a run that can be found without a model."""
    if resume is not None:
        from fedloom.experiment.experiment import Experiment
        from fedloom.storage.run_folder import EXPERIMENT, RunFolder

        Experiment.from_toml(RunFolder.existing(resume).path / EXPERIMENT)
        if experiment is not None:
            experiment_from(experiment, assignments)
        elif assignments:
            raise SettingsError(["--set cannot change a run that is resumed"], "the command")
        return
    from fedloom.runs.new_folder import require_startable

    assert experiment is not None
    require_startable(_read_run(experiment, assignments))


def _read_run(path: Path, assignments: list[str] | None) -> Experiment:
    """Read an experiment; check that its output folder can be created."""
    experiment = experiment_from(path, assignments)
    if experiment.output.folder:
        require_place(Path(experiment.output.folder), "output.folder")
    return experiment


def _run_between_machines(
    server_folder: Path,
    experiment: Path | None,
    assignments: list[str] | None,
    resume: Path | None,
    from_round: int | None,
    fresh_clients: list[int] | None,
    *,
    quiet: bool,
) -> None:
    from fedloom.deployment.submit import ask_for_run, before_it, follow, require_sound

    if (experiment is None) == (resume is None):
        raise typer.BadParameter("give either an experiment file or --resume FOLDER")
    asked = ask_for_run(
        server_folder,
        experiment,
        assignments or [],
        resume=resume,
        from_round=from_round,
        fresh_clients=fresh_clients or [],
    )
    if waits := before_it(asked):
        say(waits)
        require_sound(server_folder, asked)
    say(follow(server_folder, asked, terminal_observer(quiet)))


@app.command("follow")
def follow_run(
    run: Annotated[
        str | None,
        typer.Argument(help="Name, or first letters of the id (default: the one under way)."),
    ] = None,
    server_folder: ServerFolderOption = SERVER_FOLDER,
    quiet: Quiet = False,
) -> None:
    """Show a run between machines, from its start; stopping this does not stop the run."""
    from fedloom.deployment.submit import find_run, follow

    say(follow(server_folder, find_run(server_folder, run), terminal_observer(quiet)))


@app.command()
def demo(
    assignments: Assignments = None,
    quiet: Quiet = False,
) -> None:
    """Run a demonstration on built-in rows and write its report. Needs no network and no files."""
    from fedloom.commands.starter_experiment import starting_file

    if assignments:
        refuse_early(lambda: _check_run(starting_file(), assignments, None))
    observer = begin_loading(quiet)
    from fedloom.experiment.experiment import Experiment
    from fedloom.reports.run_page import write_report
    from fedloom.runs.run import run_experiment

    with terminable():
        experiment = Experiment.from_toml(starting_file(), assignments or [], name="demo")
        if experiment.output.folder:
            require_place(Path(experiment.output.folder), "output.folder")
        result = run_experiment(experiment, observer=observer)
    page = write_report([result.folder])
    say(result.summary_text)
    say(f"report: {page}  (open it in a browser)")


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("experiment.toml"),
    force: Force = False,
) -> None:
    """Write a commented starting file."""
    from fedloom.commands.starter_experiment import write_starting_file

    write_starting_file(require_new_file(path, "fedloom init FILE", force=force))
    say(f"wrote {path}; try: fedloom partition {path}; fedloom run {path}")
