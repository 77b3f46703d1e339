"""``fedloom report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.commands.app import Force, app, doubt, say
from fedloom.storage.output_paths import free_file, require_new_file


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Run folders; several are compared.")],
    target: Annotated[Path | None, typer.Option("--to", help="File to write.")] = None,
    force: Force = False,
) -> None:
    """Turn run folders, or the folder of a comparison or evaluation, into one self-contained page."""
    from fedloom.reports.choose import write_page_of

    if target is not None:
        require_new_file(target, "--to", force=force)
    elif len(folders) > 1:
        target = free_file(Path("comparison.html"), force=force)
    page = write_page_of(folders, target, doubt)
    say(f"report: {page}")
