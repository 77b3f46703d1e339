"""``fedloom certs`` and ``fedloom keys``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.commands.app import SERVER_FOLDER, ServerFolderOption, app, keys_app, say
from fedloom.storage.output_paths import require_folder, require_place


@app.command()
def certs(
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name or address by which clients reach the server. May be repeated."),
    ] = None,
    server_folder: ServerFolderOption = SERVER_FOLDER,
    days: Annotated[int, typer.Option(help="The certificate is good for.", min=1, max=36500)] = 365,
) -> None:
    """Make the federation's authority, unless it is there, and a new certificate of the server."""
    from fedloom.security.certificates import CA, CERTIFICATE, make_authority

    require_folder(server_folder, "--home")
    hosts = list(dict.fromkeys([*(host or []), "localhost", "127.0.0.1"]))
    make_authority(server_folder, hosts, days)
    say(
        f"wrote {server_folder / CERTIFICATE} for {', '.join(hosts)}, valid for {days} days; give every "
        f"client {server_folder / CA}"
    )


@keys_app.command("new")
def new_key(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("client.key"),
) -> None:
    """Make a client's key; its public half is what the coordinator needs."""
    from fedloom.security.keys import make_key
    from fedloom.security.signing_keys import fingerprint

    require_place(path, "fedloom keys new FILE")
    public = make_key(path)
    say(f"wrote {path}, which stays here; send the coordinator {public}")
    say(f"its fingerprint, for other members: {fingerprint(public.read_text())}")
