"""Where commands write what a user names: over nothing that is there, into no folder that is not.

A path whose folder is not there is more often a typing mistake than a wish, and a page or picture of the
same name is more often wanted than not. Names of fedloom's own choice get a number where they are taken,
folders of its own choice (``runs``, ``evaluations``, ``comparisons``) are made, and pages within the
folders that they are about are made anew.
"""

from __future__ import annotations

from pathlib import Path

from fedloom.errors import OutputError


def require_new_file(path: Path, option: str, *, force: bool = False) -> Path:
    """Return a file that may be written.

    Args:
        path: The file.
        option: By which another is named.
        force: Whether one that is there may be written over.

    Raises:
        OutputError: It is there, it is a folder, or its folder is not there.
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
    """Check that what would hold a file or folder is there, if one was named.

    Raises:
        OutputError: It is not.
    """
    if path is not None and not path.parent.is_dir():
        raise OutputError(
            f"there is no folder {path.parent} to hold {path.name}: make it, or mend the path after "
            f"{option}"
        )


def require_folder(path: Path, option: str) -> None:
    """Check that a folder is there, or can be made in one that is.

    Raises:
        OutputError: It is a file, or what would hold it is not there.
    """
    require_place(path, option)
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file: name a folder with {option}")


def free_file(path: Path, *, force: bool = False) -> Path:
    """Return a file of fedloom's own choice: the path, or one with a number while that is there."""
    number, free = 2, path
    while free.exists() and not force:
        free, number = path.with_name(f"{path.stem}-{number}{path.suffix}"), number + 1
    return free
