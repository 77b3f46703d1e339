"""``fedloom status`` and ``fedloom stop``."""

from __future__ import annotations

from typing import Annotated

import typer

from fedloom.commands.app import SERVER_FOLDER, ServerFolderOption, app, say


@app.command()
def status(
    server_folder: ServerFolderOption = SERVER_FOLDER,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Show the server, its members, and the runs under way and waiting."""
    from fedloom.deployment.administration import ask
    from fedloom.deployment.folders import ServerFolder

    found = ask(ServerFolder(server_folder), "status")
    if as_json:
        import json

        say(json.dumps(found, indent=2))
        return
    from fedloom.commands.terminal import make_console
    from fedloom.deployment.status import shown

    make_console().print(shown(found), highlight=False)


@app.command()
def stop(
    run: Annotated[
        str | None, typer.Argument(help="First letters of its id (default: all runs).")
    ] = None,
    server_folder: ServerFolderOption = SERVER_FOLDER,
) -> None:
    """Stop the run under way and those that wait; finished rounds are saved, and it can be resumed."""
    from fedloom.deployment.submit import find_run, stop_runs

    stopped = stop_runs(server_folder, run)
    if run is not None and not stopped:
        find_run(server_folder, run)  # says which there are
    say(f"stopped {len(stopped)} run{'s' if len(stopped) != 1 else ''}")
