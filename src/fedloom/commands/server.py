"""``fedloom server``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.commands.app import SERVER_FOLDER, ServerFolderOption, say, server_app
from fedloom.storage.output_paths import require_folder, require_place


@server_app.command("start")
def start_server(
    server_folder: ServerFolderOption = SERVER_FOLDER,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",
    port: Annotated[
        int, typer.Option(help="The one port that clients connect to.", min=1, max=65535)
    ] = 9092,
    insecure: Annotated[bool, typer.Option(help="No TLS: everybody can read the traffic.")] = False,
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

    serve_federation(server_folder, host, port, insecure=insecure, metrics=metrics, say=say)


@server_app.command("stop")
def stop_server(server_folder: ServerFolderOption = SERVER_FOLDER) -> None:
    """Stop the server; runs under way can be resumed."""
    from fedloom.deployment.server import stop_server as stop

    say(f"asked process {stop(server_folder)} to stop")


Passphrase = Annotated[
    Path | None,
    typer.Option("--passphrase-file", help="File with the passphrase.", show_default=False),
]


@server_app.command("backup")
def back_up_server(
    target: Annotated[Path, typer.Argument(help="File to write.", show_default=False)],
    server_folder: ServerFolderOption = SERVER_FOLDER,
    runs: Annotated[
        bool, typer.Option("--runs", help="The run folders too, with their checkpoints.")
    ] = False,
    encrypt: Annotated[bool, typer.Option("--encrypt", help="Ask for a passphrase.")] = False,
    passphrase_file: Passphrase = None,
) -> None:
    """Write members, certificates, keys, settings and logs into one file; the server may run."""
    from fedloom.deployment.backup import back_up, read_passphrase, size_text
    from fedloom.deployment.folders import ServerFolder

    require_place(target, "fedloom server backup FILE")
    secret = None
    if passphrase_file is not None:
        secret = read_passphrase(passphrase_file)
    elif encrypt:
        secret = typer.prompt("passphrase", hide_input=True, confirmation_prompt=True)
    found = back_up(ServerFolder(server_folder), target, runs=runs, passphrase=secret)
    say(f"wrote {target}: {size_text(found, target)}")
    if secret is None:
        say("it holds the private keys of the authority and the server: keep it as safe as those")


@server_app.command("restore")
def restore_server(
    source: Annotated[Path, typer.Argument(help="A backup.", show_default=False)],
    server_folder: ServerFolderOption = SERVER_FOLDER,
    passphrase_file: Passphrase = None,
) -> None:
    """Make a server's folder from a backup."""
    from fedloom.deployment.backup import is_encrypted, read_passphrase, restore, restored_text
    from fedloom.deployment.folders import ServerFolder

    require_folder(server_folder, "--home")
    secret = None
    if passphrase_file is not None:
        secret = read_passphrase(passphrase_file)
    elif is_encrypted(source):
        secret = typer.prompt("passphrase", hide_input=True)
    say(restored_text(server_folder, restore(source, ServerFolder(server_folder), secret)))
