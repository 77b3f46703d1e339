"""``fedloom client``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.commands.app import (
    CLIENT_FOLDER,
    ClientFolderOption,
    begin_loading,
    client_app,
    require_data_folder,
    say,
)
from fedloom.storage.output_paths import require_folder


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
    client_folder: ClientFolderOption = CLIENT_FOLDER,
    insecure: Annotated[bool, typer.Option(help="No TLS: everybody can read the traffic.")] = False,
) -> None:
    """Take part in a federation; runs until it is stopped."""
    # Not checked by typer: our message for an unreadable key or authority names its owner.
    from fedloom.deployment.client import take_part

    require_folder(client_folder, "--home")
    take_part(client_folder, server, key, None if insecure else ca, data, say=say)


@client_app.command("check")
def check_client(
    data: Annotated[Path, typer.Argument(help="This client's file.", show_default=False)],
    experiment: Annotated[
        Path | None, typer.Argument(help="An experiment in TOML.", show_default=False)
    ] = None,
    client: Annotated[int, typer.Option(help="This client's number.", min=0)] = 0,
) -> None:
    """Show what a server could learn and may request, on which rows, and what would be refused."""
    from fedloom.deployment.client_file import OwnFile

    OwnFile.read(data)  # report mistakes in it before slow imports
    begin_loading(quiet=False)
    from fedloom.commands.terminal import make_console, working
    from fedloom.deployment.client_check import check

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
    client_folder: ClientFolderOption = CLIENT_FOLDER,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Approve a run that waits for approval, after showing what it is."""
    require_data_folder(client_folder, "client")
    from fedloom.deployment.consent import Approvals
    from fedloom.deployment.folders import ClientFolder

    own = ClientFolder(client_folder)
    if run is not None:
        Approvals(own).find(run)
    begin_loading(quiet=False)
    from fedloom.commands.terminal import make_console, working
    from fedloom.deployment.client_check import waiting_run, waiting_table

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
        say("it goes on waiting")
        return
    approvals.approve(waiting)
    say(f"run {waiting.run[:8]} is approved; the server asks again within half a minute")


@client_app.command("budget")
def show_budget(client_folder: ClientFolderOption = CLIENT_FOLDER) -> None:
    """Show what row-level privacy has spent of this client's rows, in all runs of all coordinators."""
    require_data_folder(client_folder, "client")
    from fedloom.deployment.folders import ClientFolder
    from fedloom.deployment.privacy_budget import budget_lines

    for line in budget_lines(ClientFolder(client_folder)):
        say(line)


@client_app.command("leave")
def leave_federation(client_folder: ClientFolderOption = CLIENT_FOLDER) -> None:
    """Stop taking part; the client's files stay on its disk."""
    from fedloom.deployment.client import leave

    say(f"asked process {leave(client_folder)} to stop")
