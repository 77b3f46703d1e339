"""``fedloom export`` and ``fedloom forget``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.commands.app import app, begin_loading, say
from fedloom.commands.early_checks import refuse_early
from fedloom.settings.suggestions import did_you_mean
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
    format: Annotated[
        str,
        typer.Option(
            help="merged: for transformers, vLLM; adapter: for PEFT, vLLM; gguf: for llama.cpp."
        ),
    ] = "merged",
    out_type: Annotated[
        str, typer.Option("--outtype", help="Numbers of a GGUF file: f32, f16, bf16, q8_0.")
    ] = "f16",
    hub: Annotated[
        str | None, typer.Option(help="Upload it as OWNER/NAME to the Hugging Face Hub, private.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Let anybody read it on the Hub.")
    ] = False,
) -> None:
    """Write a model of a run, or a client's own, as a folder that other programs load."""
    _require_known(format, out_type, hub, public)
    require_place(target, "--to")
    refuse_early(lambda: _check_export(run, client, target, reward, format, hub))
    begin_loading(quiet=False)
    from fedloom.commands.terminal import make_console, working
    from fedloom.models.gguf_export import require_gguf
    from fedloom.runs.export import export as write
    from fedloom.runs.publishing import HubRepository

    if format == "gguf":
        require_gguf()
    repository = HubRepository(hub, public=public) if hub is not None else None
    with working(make_console(), f"writing the model of {run}, and reading it again"):
        written = write(
            run, client, target, reward=reward, published=hub is not None,
            format=format, out_type=out_type,  # type: ignore[arg-type]
        )  # fmt: skip
    say(f"wrote {written.folder}; load it:\n  {written.loading}")
    if written.verified:
        say(written.verified)
    if repository is not None:
        with working(make_console(), f"uploading {written.folder} as {hub}"):
            address = repository.upload(written.folder)
        say(f"uploaded to {address} ({_readers(public=repository.is_public, asked=public)})")


def _readers(*, public: bool, asked: bool) -> str:
    """Return who can read a repository, by what it is and what was asked for."""
    if asked and not public:
        return "private, as it was before; its settings on the Hub make it public"
    return "public" if public else "private"


FORMATS, OUT_TYPES = ("merged", "adapter", "gguf"), ("f32", "f16", "bf16", "q8_0")


def _require_known(format: str, out_type: str, hub: str | None, public: bool) -> None:
    """Refuse options that there are not, or that do nothing."""
    if format not in FORMATS:
        raise typer.BadParameter(
            f"--format {format}: {did_you_mean(format, FORMATS)}it is one of {', '.join(FORMATS)}"
        )
    if out_type not in OUT_TYPES:
        hint = did_you_mean(out_type, OUT_TYPES)
        raise typer.BadParameter(f"--outtype {out_type}: {hint}it is one of {', '.join(OUT_TYPES)}")
    if out_type != "f16" and format != "gguf":
        raise typer.BadParameter(f"--outtype {out_type} is of --format gguf")
    if public and hub is None:
        raise typer.BadParameter("--public is of --hub OWNER/NAME")


def _check_export(
    run: Path, client: int | None, target: Path | None, reward: bool, format: str, hub: str | None
) -> None:
    from fedloom.runs.export import places_of
    from fedloom.runs.publishing import require_online, require_repository_name

    if hub is not None:
        require_repository_name(hub)
        require_online()
    places_of(run, client, target, reward=reward, format=format)  # type: ignore[arg-type]


@app.command()
def forget(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    client: Annotated[int, typer.Option(help="Who leaves.", min=0)],
) -> None:
    """Delete a client's model and store from a run folder, and what its checkpoints keep of it.

    With the store goes what the server's state keeps by the client's id: how its B moved and its group
    (hilora), its rank (hetlora), its experts and what they are assigned by (fedmoe, fedamole), its weight
    (fedawa), and so on. A run that is resumed treats it as a client that comes for the first time. What
    it gave to means stays in them, and records of past rounds stay as they are.
    """
    from fedloom.storage.run_folder import RunFolder

    RunFolder.existing(run)
    begin_loading(quiet=False)
    from fedloom.runs.forget import forget_client

    count = forget_client(run, client)
    say(
        f"deleted from {count} places in {run}; a resumed run starts client {client} with an empty store"
    )
