"""``fedloom run``, ``follow``, ``demo`` and ``init``."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.commands.app import (
    SERVER_FOLDER,
    Assignments,
    Force,
    Live,
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
from fedloom.commands.watch import with_live_page
from fedloom.errors import SettingsError
from fedloom.runs.stopping import terminable
from fedloom.settings.suggestions import did_you_mean
from fedloom.storage.output_paths import require_new_file, require_place

if TYPE_CHECKING:
    from fedloom.experiment.experiment import Experiment
    from fedloom.runs.workers import Workers
    from fedloom.settings.schema import Table

ENGINES = ("simulation", "ray", "flower")


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
        typer.Option(
            help="simulation: all clients on this machine; ray: simulated by workers on Ray; flower: "
            "clients on other machines."
        ),
    ] = "simulation",
    workers: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Processes that work on clients; auto: as many as fit. The results are those of one "
            "process. [default: 1; auto with --engine ray]",
            show_default=False,
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="With --engine ray: address of the cluster, as ray start --head prints it. Without "
            "it Ray is started on this machine for this run alone.",
            show_default=False,
        ),
    ] = None,
    server_folder: ServerFolderOption = SERVER_FOLDER,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Leave a trace for Perfetto in the run folder."),
    ] = False,
    live: Live = False,
    quiet: Quiet = False,
) -> None:
    """Run an experiment, or continue one."""
    count = _workers(workers or ("auto" if engine == "ray" else "1"))
    _require_engine(engine, count, ray_address, profile=profile)
    what = _What(experiment, assignments or [], resume, from_round, fresh_client or [])
    if engine == "flower":
        _run_between_machines(server_folder, what, live=live, quiet=quiet)
    else:
        ray = (ray_address or "local") if engine == "ray" else None
        _run_here(what, count, ray, profile=profile, live=live, quiet=quiet)


@dataclass(frozen=True)
class _What:
    """What to run: an experiment with its assignments, or a run folder to continue."""

    experiment: Path | None
    assignments: list[str]
    resume: Path | None
    from_round: int | None
    fresh_clients: list[int]


def _require_engine(
    engine: str, workers: Workers, ray_address: str | None, *, profile: bool
) -> None:
    """Refuse an engine that is none or not installed, and what only others have."""
    if engine not in ENGINES:
        hint = did_you_mean(engine, ENGINES)
        raise typer.BadParameter(
            f"{engine!r} is not an engine; {hint}there are {', '.join(ENGINES)}"
        )
    if ray_address is not None and engine != "ray":
        raise typer.BadParameter("--ray-address goes with --engine ray")
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise typer.BadParameter('--engine ray: Ray is not installed; pip install "fedloom[ray]"')
    if engine != "flower":
        return
    if profile:
        raise typer.BadParameter("--profile is of a simulation: clients elsewhere are not recorded")
    if workers != 1:
        raise typer.BadParameter("--workers is for clients of this machine, not --engine flower")


def _run_here(
    what: _What, workers: Workers, ray: str | None, *, profile: bool, live: bool, quiet: bool
) -> None:
    """Run, or continue, with simulated clients, on this machine or on Ray."""
    if what.experiment is None and what.resume is None:
        raise typer.BadParameter("give an experiment file, or --resume FOLDER")
    if what.resume is None and (what.from_round is not None or what.fresh_clients):
        raise typer.BadParameter("--from-round and --fresh-client go with --resume FOLDER")
    if what.experiment is not None:
        require_experiment(what.experiment)
    check = partial(_check_run, what.experiment, what.assignments, what.resume, live=live)
    if not refuse_early(check) and live:  # which nothing else looks at
        check()
    shown = begin_loading(quiet)
    from fedloom.runs.run import resume_run, run_experiment

    with terminable(), with_live_page(shown, live) as observer:
        if what.resume is not None:
            result = resume_run(
                what.resume,
                what.experiment,
                what.assignments,
                from_round=what.from_round,
                fresh_clients=what.fresh_clients,
                observer=observer,
                profile=profile,
                workers=workers,
                ray=ray,
            )
        else:
            assert what.experiment is not None
            experiment = _read_run(what.experiment, what.assignments)
            result = run_experiment(
                experiment, observer=observer, profile=profile, workers=workers, ray=ray
            )
    say(result.summary_text)


def _workers(text: str) -> Workers:
    """Read ``--workers``."""
    if text == "auto":
        return "auto"
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise typer.BadParameter(f"--workers {text!r}: give a number from 1, or auto")


def _ray_address(address: str | None) -> str:
    """Check that Ray is there, and read ``--ray-address``; return what ``run_experiment`` takes."""
    if importlib.util.find_spec("ray") is None:
        raise typer.BadParameter('--engine ray: Ray is not installed; pip install "fedloom[ray]"')
    return address or "local"


def _check_run(
    experiment: Path | None,
    assignments: list[str] | None,
    resume: Path | None,
    *,
    live: bool = False,
) -> None:
    """Raise mistakes in a run that can be found without a model."""
    from fedloom.experiment.client_privacy import require_secret

    if resume is not None:
        from fedloom.experiment.experiment import Experiment
        from fedloom.storage.run_folder import EXPERIMENT, RunFolder

        own = Experiment.from_toml(RunFolder.existing(resume, server=True).path / EXPERIMENT)
        require_secret(own.privacy, {"live": live})
        if experiment is not None:
            experiment_from(experiment, assignments)
        elif assignments:
            raise SettingsError(["--set cannot change a run that is resumed"], "the command")
        return
    from fedloom.runs.new_folder import require_startable

    assert experiment is not None
    asked = _read_run(experiment, assignments)
    require_secret(asked.privacy, {"live": live})
    require_startable(asked)


def _read_run(path: Path, assignments: list[str] | None) -> Experiment:
    """Read an experiment; check that its output folder can be created."""
    experiment = experiment_from(path, assignments)
    if experiment.output.folder:
        require_place(Path(experiment.output.folder), "output.folder")
    return experiment


def _run_between_machines(server_folder: Path, what: _What, *, live: bool, quiet: bool) -> None:
    """Ask this machine's server to run, or continue, with clients on other machines; follow it."""
    from fedloom.deployment.submit import ask_for_run, before_it, follow, require_sound

    if (what.experiment is None) == (what.resume is None):
        raise typer.BadParameter("give either an experiment file or --resume FOLDER")
    asked = ask_for_run(
        server_folder,
        what.experiment,
        what.assignments,
        resume=what.resume,
        from_round=what.from_round,
        fresh_clients=what.fresh_clients,
    )
    if waits := before_it(asked):
        say(waits)
        require_sound(server_folder, asked)
    with with_live_page(terminal_observer(quiet), live) as observer:
        summary = follow(server_folder, asked, observer)
    say(summary)


@app.command("follow")
def follow_run(
    run: Annotated[
        str | None,
        typer.Argument(help="Name, or first letters of the id (default: the one under way)."),
    ] = None,
    server_folder: ServerFolderOption = SERVER_FOLDER,
    live: Live = False,
    quiet: Quiet = False,
) -> None:
    """Show a run between machines, from its start; stopping this does not stop the run."""
    from fedloom.deployment.submit import find_run, follow

    found = find_run(server_folder, run)
    with with_live_page(terminal_observer(quiet), live) as observer:
        summary = follow(server_folder, found, observer)
    say(summary)


@app.command()
def demo(
    assignments: Assignments = None,
    quiet: Quiet = False,
) -> None:
    """Run a demonstration on built-in rows and write its report. Needs no network and no files."""
    from fedloom.commands.starter_experiment import starting_file

    if assignments:
        refuse_early(lambda: _check_run(starting_file(), assignments, None))
    shown = begin_loading(quiet)
    from fedloom.experiment.experiment import Experiment
    from fedloom.reports.run_page import write_report
    from fedloom.runs.run import run_experiment

    with terminable(), with_live_page(shown, not quiet) as observer:
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
    from_flower: Annotated[
        Path | None,
        typer.Option("--from-flower", help="A FlowerTune app's pyproject.toml, or its folder."),
    ] = None,
    force: Force = False,
) -> None:
    """Write a commented starting file, or the settings of a Flower app as an experiment."""
    require_new_file(path, "fedloom init FILE", force=force)
    if from_flower is not None:
        _init_from_flower(from_flower, path)
        return
    from fedloom.commands.starter_experiment import write_starting_file

    write_starting_file(path)
    say(f"wrote {path}; try: fedloom partition {path}; fedloom run {path}")


def _init_from_flower(app_file: Path, path: Path) -> None:
    """Write an app's settings as an experiment, and say of every key what became of it."""
    from fedloom.commands.starter_experiment import write_starting_file
    from fedloom.experiment.flower_app import as_toml, translated

    found = translated(app_file)
    check = partial(_check_table, found.table, str(app_file))
    refuse_early(check)
    if "torch" in sys.modules:  # then nothing was checked
        check()
    write_starting_file(path, as_toml(found, str(app_file)))
    for note in found.notes:
        say(note)
    if found.unknown:
        say(f"unknown keys: {', '.join(found.unknown)}")
    say(f"wrote {path}; try: fedloom run {path}; docs/other_tools.md has what a name means here")


def _check_table(table: Table, source: str) -> None:
    from fedloom.experiment.experiment import Experiment

    Experiment.from_table(table, source=source)
