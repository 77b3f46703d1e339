"""``fedloom audit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.commands.app import audit_app, say


@audit_app.command()
def verify(
    run: Annotated[Path, typer.Argument(help="Run folder, or its audit log.", show_default=False)],
) -> None:
    """Check that the audit log was not changed."""
    from fedloom.security.audit_log import verify as check

    found = check(run)
    say(
        f"{found.lines} lines are intact: {found.clients} clients, {found.refused} messages refused; "
        f"the last hash is {found.last}"
    )
    if found.earlier:
        say(f"{found.earlier} lines before these are in files that are not here")
    if found.unequal:
        round, action = found.unequal[0]
        say(
            f"in {len(found.unequal)} of {found.exchanges} exchanges not all clients were sent the same, "
            f"first in round {round} ({action})"
        )
    elif found.exchanges:
        say(f"in all {found.exchanges} exchanges all clients were sent the same")


@audit_app.command("match")
def match_logs(
    run: Annotated[Path, typer.Argument(help="Run folder, or its log.", show_default=False)],
    client: Annotated[
        Path, typer.Argument(help="A client's folder, or its log.", show_default=False)
    ],
) -> None:
    """Check that a run's log and a client's own log agree about the client's messages."""
    from fedloom.security.audit_log import match

    found = match(run, client)
    lost = f"; {found.lost} answers did not arrive" if found.lost else ""
    say(
        f"run {found.run[:8]}: {found.asked} messages to the client and {found.answered} answers are the "
        f"same in both logs{lost}"
    )
