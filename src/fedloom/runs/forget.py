"""Deletes what a run folder keeps of a client: its model, its store, and its entries in checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

from fedloom.errors import OutputError
from fedloom.runs.initial_adapter import FOLDER as START
from fedloom.storage import checkpoint
from fedloom.storage.run_folder import RunFolder


def forget_client(path: Path, client: int) -> int:
    """Delete a client's model, and from checkpoints its store and what is named by its id.

    A run that is resumed treats it as a client that comes for the first time. What it gave to means stays
    in them, and records of past rounds stay as they are.

    Args:
        path: A run folder.
        client: Its id.

    Returns:
        The number of places it was deleted from.

    Raises:
        OutputError: It is not a run folder, its run is under way, it holds nothing of the client, or a
            file cannot be deleted.
    """
    folder = RunFolder.existing(path, server=True)
    if not folder.is_begun:
        raise OutputError(
            f"{path} holds no store or model of client {client}: no run was begun there"
        )
    with folder.locked():
        found = checkpoint.forget(folder.checkpoints, client)
        begun = folder.path / START / folder.client(client).relative_to(folder.path)
        exported = folder.path / "exported" / f"client-{client:04d}"
        for own in (folder.client(client), exported, begun):
            for place in (own, own.with_name(f"{own.name}-reward")):
                if place.is_dir():
                    try:
                        shutil.rmtree(place)
                    except OSError as error:
                        raise OutputError(f"cannot delete {place}: {error.strerror}") from error
                    found += 1
    if not found:
        raise OutputError(f"{path} holds no store or model of client {client}")
    return found
