"""``fedloom members``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.commands.app import (
    SERVER_FOLDER,
    MemberName,
    ServerFolderOption,
    members_app,
    require_data_folder,
    say,
)


@members_app.command("allow")
def allow_member(
    name: Annotated[str | None, typer.Argument(help="Of the member.", show_default=False)] = None,
    public: Annotated[
        Path | None, typer.Argument(help="Its public key.", show_default=False)
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Allow all members whose keys are here as NAME.pub.")
    ] = None,
    server_folder: ServerFolderOption = SERVER_FOLDER,
) -> None:
    """Allow a member, again after a revocation, or all members of a folder."""
    if (name is None or public is None) if folder is None else name is not None:
        raise typer.BadParameter("give either NAME and its public key, or --folder")
    require_data_folder(server_folder)
    from fedloom.deployment.folders import ServerFolder
    from fedloom.security.client_registry import keys_in, read_public

    members = ServerFolder(server_folder).members()
    if folder is not None:
        entries = keys_in(folder)
        members.allow_all(entries)
        say(f"{len(entries)} members are allowed: {', '.join(n for n, _ in entries[:5])}, ...")
    elif name is not None and public is not None:
        say(f"{name} is member {members.allow(name, read_public(public))}; it is allowed")


@members_app.command("revoke")
def revoke_member(name: MemberName, server_folder: ServerFolderOption = SERVER_FOLDER) -> None:
    """Revoke a member; its name and number stay reserved for it."""
    require_data_folder(server_folder)
    from fedloom.deployment.folders import ServerFolder

    member = ServerFolder(server_folder).members().revoke(name)
    say(
        f"{name}, member {member.number}, is no longer allowed; `fedloom members allow` allows it again"
    )


@members_app.command("rename")
def rename_member(
    name: MemberName,
    new: Annotated[str, typer.Argument(help="The new name.", show_default=False)],
    server_folder: ServerFolderOption = SERVER_FOLDER,
) -> None:
    """Rename a member."""
    require_data_folder(server_folder)
    from fedloom.deployment.folders import ServerFolder

    member = ServerFolder(server_folder).members().rename(name, new)
    say(f"{name}, member {member.number}, is called {new}")


@members_app.command("rotate")
def rotate_member(
    name: MemberName,
    public: Annotated[Path, typer.Argument(help="Its new public key.", show_default=False)],
    server_folder: ServerFolderOption = SERVER_FOLDER,
) -> None:
    """Replace a member's key; the earlier key is refused from now on."""
    require_data_folder(server_folder)
    from fedloom.deployment.folders import ServerFolder
    from fedloom.security.client_registry import read_public

    member = ServerFolder(server_folder).members().rotate(name, read_public(public))
    say(f"{name}, member {member.number}, has this key from now on; it joins again with it")


@members_app.command("withdraw")
def withdraw_member(
    name: MemberName,
    again: Annotated[
        bool,
        typer.Option("--again", help="Run those runs again without it."),
    ] = False,
    server_folder: ServerFolderOption = SERVER_FOLDER,
) -> None:
    """Revoke a member, and list the runs and adapters that contain its contributions."""
    require_data_folder(server_folder)
    from fedloom.deployment.folders import ServerFolder
    from fedloom.deployment.submit import run_again
    from fedloom.deployment.withdrawal import works_of

    own = ServerFolder(server_folder)
    member = own.members().withdraw(name)
    works = works_of(own, member)
    say(
        f"{name}, member {member.number}, is no longer allowed; {len(works)} runs contain its "
        "contributions"
    )
    for work in works:
        say(work.text())
        if again and (work.checkpoint is not None or work.others):
            asked = run_again(server_folder, work)
            say(f"  in the queue as {asked['id'][:8]}")


@members_app.command("remove")
def remove_member(name: MemberName, server_folder: ServerFolderOption = SERVER_FOLDER) -> None:
    """Remove a revoked member; its name, key and number become free."""
    require_data_folder(server_folder)
    from fedloom.deployment.folders import ServerFolder

    member = ServerFolder(server_folder).members().remove(name)
    say(f"{name} is no longer a member; number {member.number} is free")


@members_app.command("list")
def list_members(server_folder: ServerFolderOption = SERVER_FOLDER) -> None:
    """Show the members: number, name, state, and the end of their keys."""
    require_data_folder(server_folder)
    from fedloom.deployment.folders import ServerFolder

    for member in ServerFolder(server_folder).members().members:
        state = "" if member.state == "allowed" else f"  {member.state}"
        say(f"{member.number:4}  {member.name:24}  ...{member.key[-16:]}{state}")
