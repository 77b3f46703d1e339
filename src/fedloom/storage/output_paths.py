"""Paths that a user names for output: nothing is overwritten, no parent folder is created.

A path whose folder is not there is more often a typing mistake than intended, and a page or picture of
the same name is often still needed. Names that fedloom chooses get a number where they are taken, folders
that it chooses (``runs``, ``evaluations``, ``comparisons``) are created, and pages inside the folder that
they describe are overwritten.
"""

from __future__ import annotations

from pathlib import Path

from fedloom.errors import OutputError


def require_new_file(path: Path, option: str, *, force: bool = False) -> Path:
    """Return a file that may be written.

    Args:
        path: The file.
        option: The option that names another path.
        force: Whether one that is there may be written over.

    Raises:
        OutputError: It exists, it is a folder, or its parent folder does not exist.
    """
    require_place(path, option)
    if path.is_dir():
        raise OutputError(f"{path} is a folder: name a file in it with {option}")
    if path.exists() and not force:
        raise OutputError(
            f"{path} is there already: give another name with {option}, or --force to write over it"
        )
    return path


def require_place(path: Path | None, option: str) -> None:
    """Check that the parent folder of a named file or folder exists.

    Raises:
        OutputError: It is not.
    """
    if path is not None and not path.parent.is_dir():
        raise OutputError(
            f"there is no folder {path.parent} to hold {path.name}: create it, or correct the path after "
            f"{option}"
        )


def require_folder(path: Path, option: str) -> None:
    """Check that a folder is there, or can be made in one that is.

    Raises:
        OutputError: It is a file, or its parent folder does not exist.
    """
    require_place(path, option)
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file: name a folder with {option}")


def free_file(path: Path, *, force: bool = False) -> Path:
    """Return a file name that fedloom chooses: the path, or the path with a number while that exists."""
    number, free = 2, path
    while free.exists() and not force:
        free, number = path.with_name(f"{path.stem}-{number}{path.suffix}"), number + 1
    return free
