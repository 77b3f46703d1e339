"""The command line: parse, call, print. No logic, and nothing heavy imported before it is needed."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from fedloom.early import refuse_early
from fedloom.errors import FedloomError, OutputError, SettingsError
from fedloom.shown import message, visible
from fedloom.stopping import terminable
from fedloom.targets import free_file, require_folder, require_new_file, require_place

if TYPE_CHECKING:
    from fedloom.experiment import Experiment
    from fedloom.progress import RunObserver

app = typer.Typer(
    help="Fine-tune and align language models across parties whose data must not leave them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

server_app = typer.Typer(help="The server of a federation between machines.", no_args_is_help=True)
app.add_typer(server_app, name="server")
client_app = typer.Typer(help="A client of a federation between machines.", no_args_is_help=True)
app.add_typer(client_app, name="client")
keys_app = typer.Typer(help="The key of a client.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
members_app = typer.Typer(help="Who is let in to a federation.", no_args_is_help=True)
app.add_typer(members_app, name="members")
data_app = typer.Typer(help="The rows of an experiment.", no_args_is_help=True)
app.add_typer(data_app, name="data")
audit_app = typer.Typer(
    help="The log of who sent what, and what became of it.", no_args_is_help=True
)
app.add_typer(audit_app, name="audit")

ExperimentFile = Annotated[Path, typer.Argument(help="Experiment in TOML.", show_default=False)]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting: section.key=value. May be repeated."),
]
HomeOfServer = Annotated[Path, typer.Option("--home", help="The server's folder.")]
HomeOfClient = Annotated[Path, typer.Option("--home", help="The client's folder.")]
MemberName = Annotated[str, typer.Argument(help="Of the member.", show_default=False)]
SERVER_HOME, CLIENT_HOME = Path("fedloom-server"), Path("fedloom-client")
Force = Annotated[bool, typer.Option("--force", help="Write over a file that is there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print warnings and the result only.")]


def _show_version(asked: bool) -> None:
    if asked:
        from fedloom import __version__

        _say(f"fedloom {__version__}")
        raise typer.Exit


@app.callback()
def fedloom(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    """Fine-tune and align language models across parties whose data must not leave them."""


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
        typer.Option(help="With --resume: this client starts afresh. May be repeated."),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(help="simulation: all clients in this process; flower: on other machines."),
    ] = "simulation",
    home: HomeOfServer = SERVER_HOME,
    quiet: Quiet = False,
) -> None:
    """Run an experiment, or continue one."""
    if engine not in ("simulation", "flower"):
        raise typer.BadParameter(f"{engine!r} is no engine; there are simulation and flower")
    if engine == "flower":
        _run_between_machines(
            home, experiment, assignments, resume, from_round, fresh_client, quiet=quiet
        )
        return
    if experiment is None and resume is None:
        raise typer.BadParameter("give an experiment file, or --resume FOLDER")
    if resume is None and (from_round is not None or fresh_client):
        raise typer.BadParameter("--from-round and --fresh-client go with --resume FOLDER")
    if experiment is not None:
        _require_experiment(experiment)
    refuse_early(lambda: _check_run(experiment, assignments, resume))
    observer = _loading(quiet)
    from fedloom.runner import resume_run, run_experiment

    with terminable():
        if resume is not None:
            result = resume_run(
                resume,
                experiment,
                assignments or [],
                from_round=from_round,
                fresh_clients=fresh_client or [],
                observer=observer,
            )
        else:
            assert experiment is not None
            result = run_experiment(_read_run(experiment, assignments), observer=observer)
    _say(result.summary_text)


def _check_run(experiment: Path | None, assignments: list[str] | None, resume: Path | None) -> None:
    """Raise what can be told of a run without a model."""
    if resume is not None:
        from fedloom.experiment import Experiment
        from fedloom.report.run_folder import EXPERIMENT, RunFolder

        Experiment.from_toml(RunFolder.existing(resume).path / EXPERIMENT)
        if experiment is not None:
            _read(experiment, assignments)
        elif assignments:
            raise SettingsError(["--set cannot change a run that is resumed"], "the command")
        return
    from fedloom.runner import require_startable

    assert experiment is not None
    require_startable(_read_run(experiment, assignments))


def _read_run(path: Path, assignments: list[str] | None) -> Experiment:
    """Read an experiment whose folder, if it names one, can be made."""
    experiment = _read(path, assignments)
    if experiment.output.folder:
        require_place(Path(experiment.output.folder), "output.folder")
    return experiment


def _require_experiment(path: Path) -> None:
    """Say at once, and what to do, where no experiment can be read.

    Raises:
        SettingsError: It is a folder, or not there.
    """
    if not path.is_dir():
        if not path.exists():
            from fedloom.settings import read_toml

            read_toml(path)
        return
    from fedloom.report.run_folder import EXPERIMENT, RUN

    problem = f"{path} is a folder, and an experiment is a file in TOML"
    if (path / RUN).is_file():
        problem = (
            f"{path} is the folder of a run: fedloom run --resume {path} goes on with it, fedloom report "
            f"{path} shows it, fedloom run {path / EXPERIMENT} plays it again"
        )
    elif found := sorted(path.glob("*.toml")):
        problem += f": {', '.join(str(own) for own in found[:3])}"
    raise SettingsError([problem], "the command")


def _run_between_machines(
    home: Path,
    experiment: Path | None,
    assignments: list[str] | None,
    resume: Path | None,
    from_round: int | None,
    fresh_clients: list[int] | None,
    *,
    quiet: bool,
) -> None:
    from fedloom.deployment.running import ask_for_run, before_it, follow, require_sound

    if (experiment is None) == (resume is None):
        raise typer.BadParameter("give either an experiment file or --resume FOLDER")
    asked = ask_for_run(
        home,
        experiment,
        assignments or [],
        resume=resume,
        from_round=from_round,
        fresh_clients=fresh_clients or [],
    )
    if waits := before_it(asked):
        _say(waits)
        require_sound(home, asked)
    _say(follow(home, asked, _observer(quiet)))


@app.command("follow")
def follow_run(
    run: Annotated[
        str | None,
        typer.Argument(help="Name, or first letters of the id (default: the one under way)."),
    ] = None,
    home: HomeOfServer = SERVER_HOME,
    quiet: Quiet = False,
) -> None:
    """Watch a run between machines, from its beginning; to end this ends nothing else."""
    from fedloom.deployment.running import find_run, follow

    _say(follow(home, find_run(home, run), _observer(quiet)))


@app.command()
def demo(
    assignments: Assignments = None,
    quiet: Quiet = False,
) -> None:
    """Run the main job on embedded defaults and write its report. Needs no network and no files."""
    from fedloom.starting import starting_file

    if assignments:
        refuse_early(lambda: _check_run(starting_file(), assignments, None))
    observer = _loading(quiet)
    from fedloom.experiment import Experiment
    from fedloom.report.page import write_report
    from fedloom.runner import run_experiment

    with terminable():
        experiment = Experiment.from_toml(starting_file(), assignments or [], name="demo")
        if experiment.output.folder:
            require_place(Path(experiment.output.folder), "output.folder")
        result = run_experiment(experiment, observer=observer)
    page = write_report([result.folder])
    _say(result.summary_text)
    _say(f"report: {page}  (open it in a browser)")


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("experiment.toml"),
    force: Force = False,
) -> None:
    """Write a commented starting file."""
    from fedloom.starting import write_starting_file

    write_starting_file(require_new_file(path, "fedloom init FILE", force=force))
    _say(f"wrote {path}; try: fedloom partition {path}; fedloom run {path}")


@app.command()
def partition(
    experiment: ExperimentFile,
    assignments: Assignments = None,
    picture: Annotated[
        Path | None, typer.Option(help="Where the picture goes (default: NAME-partition.svg).")
    ] = None,
    force: Force = False,
) -> None:
    """Show which client holds what, before anything is trained."""
    if picture is not None:
        require_new_file(picture, "--picture", force=force)
    refuse_early(lambda: _check_rows(experiment, assignments))
    _loading(quiet=False)
    from fedloom.runner import show_partition
    from fedloom.terminal import make_console, working

    settings, console = _read(experiment, assignments), make_console()
    target = picture or free_file(Path(f"{settings.name}-partition.svg"), force=force)
    with working(console, "reading the rows and dealing them to clients"):
        shown = show_partition(settings, target)
    console.print(shown.tables)
    for text in shown.warnings:
        _observer(quiet=True).warning(text)
    _say(f"picture: {target}")


@data_app.command("show")
def show_data(
    experiment: ExperimentFile,
    row: Annotated[int, typer.Option(help="Which training example, from 0 on.")] = 0,
    assignments: Assignments = None,
) -> None:
    """Show a row as the tokens that are trained on, before and after truncation."""
    refuse_early(lambda: _check_rows(experiment, assignments))
    _loading(quiet=False)
    from fedloom.inspecting import show_row
    from fedloom.terminal import make_console, working

    settings, console = _read(experiment, assignments), make_console()
    with working(console, "reading the rows"):
        shown = show_row(settings, row)
    console.print(shown)


@app.command()
def evaluate(
    what: Annotated[
        list[Path] | None,
        typer.Argument(
            help='Run folders, an experiment in TOML, or adapters: PEFT folders, "base".',
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            help='With an experiment or a run folder: a PEFT folder, a run folder, or "base".'
        ),
    ] = None,
    benchmark: Annotated[
        str | None, typer.Option(help="mt-bench-1, vicuna, advbench, or a file of questions.")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help="Where a named benchmark's questions lie.")
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(help="refusal, reference, longest, a model's folder, or http://HOST/v1."),
    ] = None,
    judge_audit: Annotated[
        Path | None, typer.Option(help="Measure the judges on pairs that people judged, instead.")
    ] = None,
    lm_eval: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval, by name or YAML file: mmlu,arc_easy.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="First questions only.", min=1)] = None,
    target: Annotated[
        Path | None, typer.Option("--to", help="Folder (default: evaluations/NAME).")
    ] = None,
    assignments: Assignments = None,
) -> None:
    """Score adapters: on held-out rows, on a benchmark with judges, or with lm-eval.

    Run folders and experiments are scored on their global held-out sets. A judge's key is read from the
    environment variable FEDLOOM_JUDGE_KEY.
    """
    given = what or []
    chosen = sum(option is not None for option in (benchmark, judge_audit, lm_eval))
    if chosen > 1:
        raise typer.BadParameter("give one of --benchmark, --judge-audit and --lm-eval")
    if not given and judge_audit is None:
        raise typer.BadParameter(
            "give a run folder or an experiment in TOML, or adapters with --benchmark or --lm-eval, or "
            "--judge-audit"
        )
    if adapter is not None and chosen:
        raise typer.BadParameter(
            "--adapter goes with an experiment or run folder alone; name adapters before --benchmark"
        )
    tasks = lm_eval.split(",") if lm_eval is not None else []
    require_place(target, "--to")
    if judge_audit is None:
        refuse_early(
            lambda: _check_evaluation(
                given, assignments, adapter, benchmark, questions, judge, tasks, target
            )
        )
    else:
        refuse_early(lambda: _check_audit(judge_audit, judge, assignments))
    _loading(quiet=False)
    from fedloom import evaluating

    if judge_audit is not None:
        evaluating.show_audit(judge_audit, judge or [], assignments or [], limit)
    elif benchmark is not None:
        evaluating.show_benchmark(
            given, benchmark, questions, judge or [], assignments or [], limit, target
        )
    elif lm_eval is not None:
        evaluating.show_harness(given, tasks, assignments or [], limit)
    else:
        evaluating.show_held_out(given, adapter, assignments or [], target)


def _check_evaluation(
    given: list[Path],
    assignments: list[str] | None,
    adapter: Path | None,
    benchmark: str | None,
    questions: Path | None,
    judges: list[str] | None,
    tasks: list[str],
    target: Path | None,
) -> None:
    """Raise what can be told of an evaluation without a model."""
    from fedloom import evaluating

    evaluating.check(
        given,
        assignments or [],
        adapter=adapter,
        benchmark=benchmark,
        questions=questions,
        judges=judges or [],
        tasks=tasks,
        target=target,
    )


def _check_audit(path: Path, judges: list[str] | None, assignments: list[str] | None) -> None:
    from fedloom import evaluating

    evaluating.check_audit(path, judges or [], assignments or [])


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
    """Run a grid of objectives or scenarios, methods and seeds; goes on where it was stopped."""
    _require_experiment(comparison)
    require_place(target, "--to")
    refuse_early(lambda: _check_comparison(comparison, assignments))
    _loading(quiet)
    from fedloom import comparison as grid
    from fedloom.report.choose import write_page_of
    from fedloom.terminal import ComparisonTerminal, make_console, results_table

    plan = grid.read_comparison(comparison, assignments or [])
    console = make_console()
    observer = ComparisonTerminal(console, silent=quiet)
    with terminable():
        folder = grid.compare(plan, target, workers=workers, observer=observer)
    page = write_page_of([folder], None, _doubt)
    console.print(results_table(folder))
    _say(f"report: {page}  (open it in a browser)")


def _check_comparison(path: Path, assignments: list[str] | None) -> None:
    """Raise what can be told of a comparison without a model."""
    from fedloom.comparison import read_comparison, require_readable

    require_readable(read_comparison(path, assignments or []))


@app.command()
def advise(
    experiment: ExperimentFile,
    uplink: Annotated[str, typer.Option(help="From a client, a second.")] = "20Mbit",
    downlink: Annotated[str, typer.Option(help="To a client, a second.")] = "100Mbit",
    latency: Annotated[str, typer.Option(help="Of a message there and back.")] = "30ms",
    client_memory: Annotated[str, typer.Option(help="That a client has for training.")] = "8GB",
    speed: Annotated[
        str, typer.Option(help="That a client's device really does a second.")
    ] = "1TFLOP",
    assignments: Assignments = None,
) -> None:
    """Say what each framework would cost a client in a round, which fit, which to try; trains nothing."""
    from fedloom.accounting.network import Link, parse_quantity

    try:
        link = Link(
            parse_quantity(uplink, "bit"),
            parse_quantity(downlink, "bit"),
            parse_quantity(latency, "s"),
            parse_quantity(speed, "FLOP"),
        )
        memory = parse_quantity(client_memory, "B")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    refuse_early(lambda: _check_rows(experiment, assignments))
    _loading(quiet=False)
    from fedloom.advice import advise as count
    from fedloom.advice import recommend
    from fedloom.terminal import advice_table, make_console, working

    settings, console = _read(experiment, assignments), make_console()
    with working(console, "reading the rows") as stage:
        options = count(settings, link, memory, stage=stage)
    console.print(advice_table(options))
    for framework, problem in dict.fromkeys((o.framework, o.problem) for o in options if o.problem):
        console.print(
            f"{framework} cannot be used here: {problem}", style="yellow", highlight=False
        )
    console.print(recommend(options), highlight=False, soft_wrap=True)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    client: Annotated[
        int | None, typer.Option(help="Whose model (default: the global one).", min=0)
    ] = None,
    reward: Annotated[
        bool,
        typer.Option("--reward", help="The explicit reward head, as a model that scores texts."),
    ] = False,
    target: Annotated[
        Path | None, typer.Option("--to", help="Folder (default: in the run folder).")
    ] = None,
) -> None:
    """Write a model of a run, or a client's own, as a folder that transformers loads by itself."""
    require_place(target, "--to")
    refuse_early(lambda: _check_export(run, client, target, reward))
    _loading(quiet=False)
    from fedloom.exporting import export as write
    from fedloom.terminal import make_console, working

    with working(make_console(), f"writing the model of {run}, and reading it again"):
        written = write(run, client, target, reward=reward)
    _say(
        f"wrote {written.folder}; load it with transformers:\n  {written.loading}\n{written.verified}"
    )


def _check_export(run: Path, client: int | None, target: Path | None, reward: bool) -> None:
    from fedloom.exporting import places_of

    places_of(run, client, target, reward=reward)


@app.command()
def forget(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    client: Annotated[int, typer.Option(help="Who leaves.", min=0)],
) -> None:
    """Delete what a run folder holds of a client's own: its model, and its store in checkpoints."""
    from fedloom.report.run_folder import RunFolder

    RunFolder.existing(run)
    _loading(quiet=False)
    from fedloom.runner import forget_client

    count = forget_client(run, client)
    _say(f"deleted from {count} places in {run}; a resumed run starts client {client} afresh")


@app.command()
def certs(
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name or address by which clients reach the server. May be repeated."),
    ] = None,
    home: HomeOfServer = SERVER_HOME,
    days: Annotated[int, typer.Option(help="The certificate is good for.", min=1, max=36500)] = 365,
) -> None:
    """Make the federation's authority, unless it is there, and a new certificate of the server."""
    from fedloom.identity import CA, CERTIFICATE, make_authority

    require_folder(home, "--home")
    hosts = list(dict.fromkeys([*(host or []), "localhost", "127.0.0.1"]))
    make_authority(home, hosts, days)
    _say(
        f"wrote {home / CERTIFICATE} for {', '.join(hosts)}, good for {days} days; give every client "
        f"{home / CA}"
    )


@keys_app.command("new")
def new_key(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("client.key"),
) -> None:
    """Make a client's key; its public half is what the coordinator needs."""
    from fedloom.identity import make_key

    require_place(path, "fedloom keys new FILE")
    _say(f"wrote {path}, which stays here; send the coordinator {make_key(path)}")


@members_app.command("allow")
def allow_member(
    name: Annotated[str | None, typer.Argument(help="Of the member.", show_default=False)] = None,
    public: Annotated[
        Path | None, typer.Argument(help="Its public key.", show_default=False)
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Let in all whose keys are here as NAME.pub.")
    ] = None,
    home: HomeOfServer = SERVER_HOME,
) -> None:
    """Let a member in, or let it in again; or all of a folder at once."""
    if (name is None or public is None) if folder is None else name is not None:
        raise typer.BadParameter("give either NAME and its public key, or --folder")
    _require_home(home)
    from fedloom.deployment.homes import ServerHome
    from fedloom.members import keys_in, read_public

    members = ServerHome(home).members()
    if folder is not None:
        entries = keys_in(folder)
        members.allow_all(entries)
        _say(f"{len(entries)} members are let in: {', '.join(n for n, _ in entries[:5])}, ...")
    elif name is not None and public is not None:
        _say(f"{name} is member {members.allow(name, read_public(public))}; it is let in")


@members_app.command("revoke")
def revoke_member(name: MemberName, home: HomeOfServer = SERVER_HOME) -> None:
    """Let a member in no longer; its name and number stay its own."""
    _require_home(home)
    from fedloom.deployment.homes import ServerHome

    member = ServerHome(home).members().revoke(name)
    _say(
        f"{name}, member {member.number}, is let in no longer; `fedloom members allow` lets it in again"
    )


@members_app.command("rename")
def rename_member(
    name: MemberName,
    new: Annotated[str, typer.Argument(help="The new name.", show_default=False)],
    home: HomeOfServer = SERVER_HOME,
) -> None:
    """Give a member another name."""
    _require_home(home)
    from fedloom.deployment.homes import ServerHome

    member = ServerHome(home).members().rename(name, new)
    _say(f"{name}, member {member.number}, is called {new}")


@members_app.command("rotate")
def rotate_member(
    name: MemberName,
    public: Annotated[Path, typer.Argument(help="Its new public key.", show_default=False)],
    home: HomeOfServer = SERVER_HOME,
) -> None:
    """Give a member another key; the one before opens nothing from now on."""
    _require_home(home)
    from fedloom.deployment.homes import ServerHome
    from fedloom.members import read_public

    member = ServerHome(home).members().rotate(name, read_public(public))
    _say(f"{name}, member {member.number}, has this key from now on; it joins again with it")


@members_app.command("withdraw")
def withdraw_member(
    name: MemberName,
    again: Annotated[
        bool,
        typer.Option("--again", help="Play those runs again without it."),
    ] = False,
    home: HomeOfServer = SERVER_HOME,
) -> None:
    """Let a member in no longer, and say which runs and adapters hold its work."""
    _require_home(home)
    from fedloom.deployment.homes import ServerHome
    from fedloom.deployment.running import play_again
    from fedloom.deployment.withdrawal import works_of

    own = ServerHome(home)
    member = own.members().withdraw(name)
    works = works_of(own, member)
    _say(f"{name}, member {member.number}, is let in no longer; {len(works)} runs hold its work")
    for work in works:
        _say(work.text())
        if again and (work.checkpoint is not None or work.others):
            asked = play_again(home, work)
            _say(f"  in the queue as {asked['id'][:8]}")


@members_app.command("remove")
def remove_member(name: MemberName, home: HomeOfServer = SERVER_HOME) -> None:
    """Forget a member that is let in no longer; its name, key and number may be another's then."""
    _require_home(home)
    from fedloom.deployment.homes import ServerHome

    member = ServerHome(home).members().remove(name)
    _say(f"{name} is no member any more; number {member.number} is free")


@members_app.command("list")
def list_members(home: HomeOfServer = SERVER_HOME) -> None:
    """Show the members: number, name, whether they are let in, and the end of their keys."""
    _require_home(home)
    from fedloom.deployment.homes import ServerHome

    for member in ServerHome(home).members().members:
        state = "" if member.state == "allowed" else f"  {member.state}"
        _say(f"{member.number:4}  {member.name:24}  ...{member.key[-16:]}{state}")


@server_app.command("start")
def start_server(
    home: HomeOfServer = SERVER_HOME,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "0.0.0.0",
    port: Annotated[
        int, typer.Option(help="The one port that clients connect to.", min=1, max=65535)
    ] = 9092,
    insecure: Annotated[bool, typer.Option(help="No TLS: everybody can read along.")] = False,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="HOST:PORT, at a private address, of /metrics for Prometheus, /healthz, /readyz.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Start the server; it runs until it is stopped."""
    from fedloom.deployment.server import serve_federation

    serve_federation(home, host, port, insecure=insecure, metrics=metrics, say=_say)


@server_app.command("stop")
def stop_server(home: HomeOfServer = SERVER_HOME) -> None:
    """Stop the server; runs under way can be resumed."""
    from fedloom.deployment.server import stop_server as stop

    _say(f"told process {stop(home)} to stop")


Passphrase = Annotated[
    Path | None,
    typer.Option("--passphrase-file", help="File with the passphrase.", show_default=False),
]


@server_app.command("backup")
def back_up_server(
    target: Annotated[Path, typer.Argument(help="File to write.", show_default=False)],
    home: HomeOfServer = SERVER_HOME,
    runs: Annotated[
        bool, typer.Option("--runs", help="The run folders too, with their checkpoints.")
    ] = False,
    encrypt: Annotated[bool, typer.Option("--encrypt", help="Ask for a passphrase.")] = False,
    passphrase_file: Passphrase = None,
) -> None:
    """Write members, certificates, keys, settings and logs into one file; the server may run."""
    from fedloom.deployment.backup import back_up, read_passphrase, size_text
    from fedloom.deployment.homes import ServerHome

    require_place(target, "fedloom server backup FILE")
    secret = None
    if passphrase_file is not None:
        secret = read_passphrase(passphrase_file)
    elif encrypt:
        secret = typer.prompt("passphrase", hide_input=True, confirmation_prompt=True)
    found = back_up(ServerHome(home), target, runs=runs, passphrase=secret)
    _say(f"wrote {target}: {size_text(found, target)}")
    if secret is None:
        _say("it holds the private keys of the authority and the server: keep it as safe as those")


@server_app.command("restore")
def restore_server(
    source: Annotated[Path, typer.Argument(help="A backup.", show_default=False)],
    home: HomeOfServer = SERVER_HOME,
    passphrase_file: Passphrase = None,
) -> None:
    """Make a server's folder from a backup."""
    from fedloom.deployment.backup import is_encrypted, read_passphrase, restore, restored_text
    from fedloom.deployment.homes import ServerHome

    require_folder(home, "--home")
    secret = None
    if passphrase_file is not None:
        secret = read_passphrase(passphrase_file)
    elif is_encrypted(source):
        secret = typer.prompt("passphrase", hide_input=True)
    _say(restored_text(home, restore(source, ServerHome(home), secret)))


@client_app.command("join")
def join_federation(
    server: Annotated[
        str, typer.Option(help="HOST:PORT of the server's gateway.", show_default=False)
    ],
    data: Annotated[
        Path | None, typer.Option(help="This client's file: its rows, where the model lies.")
    ] = None,
    key: Annotated[Path, typer.Option(help="This client's private key.", readable=False)] = Path(
        "client.key"
    ),
    ca: Annotated[Path, typer.Option(help="The federation's authority.", readable=False)] = Path(
        "ca.pem"
    ),
    home: HomeOfClient = CLIENT_HOME,
    insecure: Annotated[bool, typer.Option(help="No TLS: everybody can read along.")] = False,
) -> None:
    """Take part in a federation; runs until it is stopped."""
    # typer would refuse a key or authority that may not be read before we can say whose it is.
    from fedloom.deployment.client import take_part

    require_folder(home, "--home")
    take_part(home, server, key, None if insecure else ca, data, say=_say)


@client_app.command("check")
def check_client(
    data: Annotated[Path, typer.Argument(help="This client's file.", show_default=False)],
    experiment: Annotated[
        Path | None, typer.Argument(help="An experiment in TOML.", show_default=False)
    ] = None,
    client: Annotated[int, typer.Option(help="This client's number.", min=0)] = 0,
) -> None:
    """Say what a server would learn and may ask for, on which rows, and what would be refused."""
    from fedloom.deployment.homes import OwnFile

    OwnFile.read(data)  # a mistake in it is told before what reads rows is loaded
    _loading(quiet=False)
    from fedloom.deployment.checking import check
    from fedloom.terminal import make_console, working

    console = make_console()
    with working(console, "reading the rows"):
        look = check(data, experiment, client)
    console.print(look.shown, highlight=False)
    raise typer.Exit(0 if look.sound else 1)


@client_app.command("approve")
def approve_run(
    run: Annotated[
        str | None, typer.Argument(help="First letters of its id (default: list what waits).")
    ] = None,
    home: HomeOfClient = CLIENT_HOME,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Let a run in that waits for a person, once it is clear what it is."""
    _require_home(home, "client")
    from fedloom.deployment.consent import Approvals
    from fedloom.deployment.homes import ClientHome

    own = ClientHome(home)
    if run is not None:
        Approvals(own).find(run)
    _loading(quiet=False)
    from fedloom.deployment.checking import waiting_run, waiting_table
    from fedloom.terminal import make_console, working

    console = make_console()
    if run is None:
        console.print(waiting_table(own), highlight=False)
        return
    approvals = Approvals(own)
    waiting = approvals.find(run)
    with working(console, "reading the rows"):
        look = waiting_run(own, waiting)
    console.print(look.shown, highlight=False)
    if not look.sound:
        raise typer.Exit(1)
    if not yes and not typer.confirm(f"let run {waiting.run[:8]} in?"):
        _say("it goes on waiting")
        return
    approvals.approve(waiting)
    _say(f"run {waiting.run[:8]} is let in; the server asks again within half a minute")


@client_app.command("leave")
def leave_federation(home: HomeOfClient = CLIENT_HOME) -> None:
    """Stop taking part; what this client keeps stays on its disk."""
    from fedloom.deployment.client import leave

    _say(f"told process {leave(home)} to stop")


@app.command()
def status(
    home: HomeOfServer = SERVER_HOME,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Show the server, its members, and the runs under way and waiting."""
    from fedloom.deployment.control import ask
    from fedloom.deployment.homes import ServerHome

    found = ask(ServerHome(home), "status")
    if as_json:
        import json

        _say(json.dumps(found, indent=2))
        return
    from fedloom.deployment.status import shown
    from fedloom.terminal import make_console

    make_console().print(shown(found), highlight=False)


@app.command()
def stop(
    run: Annotated[
        str | None, typer.Argument(help="First letters of its id (default: all runs).")
    ] = None,
    home: HomeOfServer = SERVER_HOME,
) -> None:
    """Stop the run under way and those that wait; finished rounds are saved, and it can be resumed."""
    from fedloom.deployment.running import find_run, stop_runs

    stopped = stop_runs(home, run)
    if run is not None and not stopped:
        find_run(home, run)  # says which there are
    _say(f"stopped {len(stopped)} run{'s' if len(stopped) != 1 else ''}")


@audit_app.command()
def verify(
    run: Annotated[Path, typer.Argument(help="Run folder, or its audit log.", show_default=False)],
) -> None:
    """Check that the log of who sent what, and what became of it, was not changed."""
    from fedloom.audit import verify as check

    found = check(run)
    _say(
        f"{found.lines} lines hold together: {found.clients} clients, {found.refused} messages refused; "
        f"the last hash is {found.last}"
    )
    if found.earlier:
        _say(f"{found.earlier} lines before these are in files that are not here")
    if found.unequal:
        round, action = found.unequal[0]
        _say(
            f"in {len(found.unequal)} of {found.exchanges} exchanges not all clients were sent the same, "
            f"first in round {round} ({action})"
        )
    elif found.exchanges:
        _say(f"in all {found.exchanges} exchanges all clients were sent the same")


@audit_app.command("match")
def match_logs(
    run: Annotated[Path, typer.Argument(help="Run folder, or its log.", show_default=False)],
    client: Annotated[
        Path, typer.Argument(help="A client's folder, or its log.", show_default=False)
    ],
) -> None:
    """Check that a run's log says of a client's messages what the client's own log says."""
    from fedloom.audit import match

    found = match(run, client)
    lost = f"; {found.lost} answers did not arrive" if found.lost else ""
    _say(
        f"run {found.run[:8]}: {found.asked} messages to the client and {found.answered} answers are the "
        f"same in both logs{lost}"
    )


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Run folders; several are compared.")],
    target: Annotated[Path | None, typer.Option("--to", help="File to write.")] = None,
    force: Force = False,
) -> None:
    """Turn run folders, or the folder of a comparison or evaluation, into one self-contained page."""
    from fedloom.report.choose import write_page_of

    if target is not None:
        require_new_file(target, "--to", force=force)
    elif len(folders) > 1:
        target = free_file(Path("comparison.html"), force=force)
    page = write_page_of(folders, target, _doubt)
    _say(f"report: {page}")


def main() -> NoReturn:
    """Run the command line; a fedloom error is one message and its exit code, never a traceback."""
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # what a terminal's encoding has not is shown as an escape
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(standalone_mode=False)
    except FedloomError as error:
        typer.secho(message(f"fedloom: {error}"), fg=typer.colors.RED, err=True)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in ("flwr", "cryptography", "uvicorn"):
            raise
        text = f"fedloom: {error.name} is missing: federations between machines are an extra"
        typer.secho(f"{text}; pip install 'fedloom[flower]'", fg=typer.colors.RED, err=True)
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        typer.secho("fedloom: stopped; nothing was begun that could go on", err=True)
        sys.exit(130)
    except Exception as error:
        if told := _out_of_memory(error):
            typer.secho(message(f"fedloom: {told}"), fg=typer.colors.RED, err=True)
            sys.exit(1)
        _usage_error(error)
    sys.exit(code or 0)  # of typer.Exit


def _require_home(home: Path, of: str = "server") -> None:
    """Check that a folder is there, before anything is looked for in it or written to it.

    Raises:
        OutputError: It is not.
    """
    if not home.is_dir():
        raise OutputError(f"there is no {of}'s folder {home}: give it with --home")


def _say(text: str) -> None:
    """Print text in which names, paths and words of others may stand."""
    typer.echo(visible(text))


def _doubt(text: str) -> None:
    """Print on standard error, on one line, why a page's figures are doubted."""
    typer.secho(message(f"warning: {text}"), fg=typer.colors.YELLOW, err=True)


def _usage_error(error: Exception) -> NoReturn:
    """Print a mistake in the command line as typer would; let anything else through."""
    show = getattr(error, "show", None)
    if show is None:
        raise error
    show()
    sys.exit(int(getattr(error, "exit_code", 2)))


def _out_of_memory(error: Exception) -> str:
    """Return what to say where memory does not suffice, empty for any other error."""
    if not isinstance(error, MemoryError | RuntimeError):
        return ""
    from fedloom.training.memory import asked_for, is_out_of_memory

    if not is_out_of_memory(error):
        return ""
    return (
        f"memory does not suffice{asked_for(error)}: set a smaller training.batch_size (or "
        "training.tokens_per_pass, with the same results), evaluation.batch_size or data.max_length, or "
        "take a smaller model; of a run, the rounds that were over are saved: fedloom run --resume FOLDER"
    )


def _check_rows(path: Path, assignments: list[str] | None) -> None:
    """Raise what can be told of an experiment and its files without a model."""
    _require_experiment(path)
    from fedloom.data.reader import require_files

    require_files(_read(path, assignments).data)


def _loading(quiet: bool) -> RunObserver:
    """Return who watches, after saying what takes the first seconds."""
    observer = _observer(quiet)
    if "torch" not in sys.modules:
        observer.stage("loading torch, transformers and peft")
    return observer


def _read(path: Path, assignments: list[str] | None) -> Experiment:
    from fedloom.experiment import Experiment

    return Experiment.from_toml(path, assignments or [])


def _observer(quiet: bool) -> RunObserver:
    from fedloom.terminal import make_console, make_observer

    return make_observer(make_console(), quiet=quiet)
