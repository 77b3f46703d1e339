"""Shared parts of commands: groups, options, reading an experiment, output.

Slow imports happen only when they are needed.
"""

from __future__ import annotations

import gc
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.accounting.garbage import without_collection
from fedloom.display.untrusted_text import message, visible
from fedloom.errors import OutputError, SettingsError

if TYPE_CHECKING:
    from fedloom.experiment.experiment import Experiment
    from fedloom.runs.observers import RunObserver

app = typer.Typer(
    help="Fine-tune and align language models across parties whose data must not leave them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

server_app = typer.Typer(help="The server of a federation between machines.", no_args_is_help=True)
app.add_typer(server_app, name="server")
client_app = typer.Typer(help="A client of a federation between machines.", no_args_is_help=True)
app.add_typer(client_app, name="client")
keys_app = typer.Typer(help="The key of a client.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
members_app = typer.Typer(help="The members of a federation.", no_args_is_help=True)
app.add_typer(members_app, name="members")
data_app = typer.Typer(help="The rows of an experiment.", no_args_is_help=True)
app.add_typer(data_app, name="data")
audit_app = typer.Typer(
    help="The audit log: who sent what, and whether it was accepted; and attacks on privacy.",
    no_args_is_help=True,
)
app.add_typer(audit_app, name="audit")

ExperimentFile = Annotated[Path, typer.Argument(help="Experiment in TOML.", show_default=False)]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting: section.key=value. May be repeated."),
]
ServerFolderOption = Annotated[Path, typer.Option("--home", help="The server's folder.")]
ClientFolderOption = Annotated[Path, typer.Option("--home", help="The client's folder.")]
MemberName = Annotated[str, typer.Argument(help="Of the member.", show_default=False)]
SERVER_FOLDER, CLIENT_FOLDER = Path("fedloom-server"), Path("fedloom-client")
Force = Annotated[bool, typer.Option("--force", help="Write over a file that is there.")]
Live = Annotated[
    bool,
    typer.Option("--live", help="Show the run on a page of this machine while it goes on."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print warnings and the result only.")]


def _show_version(asked: bool) -> None:
    if asked:
        from fedloom import __version__

        say(f"fedloom {__version__}")
        raise typer.Exit


@app.callback()
def fedloom(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    """Fine-tune and align language models across parties whose data must not leave them."""


def require_experiment(path: Path) -> None:
    """Fail at once, with advice, where no experiment can be read.

    Raises:
        SettingsError: It is a folder, or missing.
    """
    if not path.is_dir():
        if not path.exists():
            from fedloom.settings.toml import read_toml

            read_toml(path)
        return
    from fedloom.storage.run_folder import EXPERIMENT, RUN

    problem = f"{path} is a folder, and an experiment is a file in TOML"
    if (path / RUN).is_file():
        problem = (
            f"{path} is the folder of a run: fedloom run --resume {path} goes on with it, fedloom report "
            f"{path} shows it, fedloom run {path / EXPERIMENT} runs it again"
        )
    elif found := sorted(path.glob("*.toml")):
        problem += f": {', '.join(str(own) for own in found[:3])}"
    raise SettingsError([problem], "the command")


def require_data_folder(folder: Path, of: str = "server") -> None:
    """Check that a data folder exists, before it is read or written.

    Raises:
        OutputError: It is not.
    """
    if not folder.is_dir():
        raise OutputError(f"there is no {of}'s folder {folder}: give it with --home")


def say(text: str) -> None:
    """Print text that may hold untrusted names, paths and messages."""
    typer.echo(visible(text))


def doubt(text: str) -> None:
    """Print on standard error, on one line, a doubt about the figures of a page."""
    typer.secho(message(f"warning: {text}"), fg=typer.colors.YELLOW, err=True)


def check_rows(path: Path, assignments: list[str] | None) -> None:
    """Raise mistakes in an experiment and its files that can be found without a model."""
    require_experiment(path)
    from fedloom.data.reader import require_files

    require_files(experiment_from(path, assignments).data)


def begin_loading(quiet: bool) -> RunObserver:
    """Return the observer, after printing what takes the first seconds."""
    observer = terminal_observer(quiet)
    if "torch" not in sys.modules:
        observer.stage("loading torch, transformers and peft")
        _import_what_computes()
    return observer


def _import_what_computes() -> None:
    with without_collection():
        importlib.import_module("fedloom.models")
        gc.freeze()  # nor is any of it looked at again


def experiment_from(path: Path, assignments: list[str] | None) -> Experiment:
    """Read an experiment with the settings given on the command line."""
    from fedloom.experiment.experiment import Experiment

    return Experiment.from_toml(path, assignments or [])


def terminal_observer(quiet: bool) -> RunObserver:
    """Return the observer that shows a run on this terminal."""
    from fedloom.commands.terminal import make_console, make_observer

    return make_observer(make_console(), quiet=quiet)
