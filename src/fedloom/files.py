"""Files that are there whole or not at all, and a log that outlives whoever writes it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fedloom.errors import OutputError


def write_whole(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a file at once, for its owner alone unless ``mode`` says otherwise.

    Raises:
        OutputError: It cannot be written; what was there before still is.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def sweep(folder: Path, name: str = "*") -> None:
    """Delete what writers of such a name that were killed have left in a folder: ``.NAME.PROCESS``."""
    for path in folder.glob(f".{name}.*"):
        if path.suffix[1:].isdecimal():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
