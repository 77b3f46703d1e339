"""``fedloom export`` and ``fedloom forget``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.commands.app import app, begin_loading, say
from fedloom.commands.early_checks import refuse_early
from fedloom.storage.output_paths import require_place


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
    """Write a model of a run, or a client's own, as a folder that transformers loads."""
    require_place(target, "--to")
    refuse_early(lambda: _check_export(run, client, target, reward))
    begin_loading(quiet=False)
    from fedloom.commands.terminal import make_console, working
    from fedloom.runs.export import export as write

    with working(make_console(), f"writing the model of {run}, and reading it again"):
        written = write(run, client, target, reward=reward)
    say(
        f"wrote {written.folder}; load it with transformers:\n  {written.loading}\n{written.verified}"
    )


def _check_export(run: Path, client: int | None, target: Path | None, reward: bool) -> None:
    from fedloom.runs.export import places_of

    places_of(run, client, target, reward=reward)


@app.command()
def forget(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    client: Annotated[int, typer.Option(help="Who leaves.", min=0)],
) -> None:
    """Delete a client's model and store from a run folder and its checkpoints.

    What the server itself keeps by client in a checkpoint's state stays, as the rounds that follow need
    it: of hilora how clients' B moved and their groups, of hetlora ranks, of fedmoe and fedamole which
    experts they have, and what these are assigned by.
    """
    from fedloom.storage.run_folder import RunFolder

    RunFolder.existing(run)
    begin_loading(quiet=False)
    from fedloom.runs.forget import forget_client

    count = forget_client(run, client)
    say(
        f"deleted from {count} places in {run}; a resumed run starts client {client} with an empty store"
    )
