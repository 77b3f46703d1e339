"""Atomic files, and lock files that a process holds as long as it lives."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TextIO

from fedloom.errors import OutputError

TRIES, PAUSE = 5, 0.05
"""Attempts to take a lock, and seconds between them: a process that only reads the owner holds it for a
moment."""


@contextlib.contextmanager
def written_atomically(path: Path, mode: int = 0o600) -> Iterator[IO[bytes]]:
    """Yield a file that appears at ``path`` once it is complete, for its owner alone by default.

    Until then it stands beside it, under the number that the system gives this thread, so that neither
    another process nor another thread writes there.

    Raises:
        OutputError: It cannot be written; the earlier content is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{threading.get_native_id()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a file atomically, readable by its owner alone unless ``mode`` says otherwise.

    Raises:
        OutputError: It cannot be written; the earlier content is unchanged.
    """
    with written_atomically(path, mode) as file:
        file.write(content)


def make_private(folder: Path) -> bool:
    """Make a folder readable by its owner alone; return whether others could read it before.

    Raises:
        OutputError: It cannot be made, or is another user's.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        open_to_others = bool(folder.stat().st_mode & 0o077)
        if open_to_others:
            folder.chmod(0o700)
    except OSError as error:
        raise OutputError(f"cannot make {folder} private: {error.strerror}") from error
    return open_to_others


def remove_temporary(folder: Path, name: str = "*") -> None:
    """Delete temporary files (``.NAME.NUMBER``) that killed writers have left in a folder."""
    for path in folder.glob(f".{name}.*"):
        if path.suffix[1:].isdecimal():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def lock(path: Path, note: str = "") -> TextIO | None:
    """Return a lock that no other process has while the file is open, or ``None`` where another has it.

    The number of this process is in the file. The system releases the lock when the process ends, however
    it ends; the number alone would not be enough, since another process may have it by then.

    Args:
        path: The file.
        note: Further content of the file, from the second line on.

    Raises:
        OutputError: The file cannot be written, or not locked.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = path.open("a+")
        for _ in range(TRIES):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(PAUSE)
        else:
            file.close()
            return None
        file.truncate(0)
        file.write(f"{os.getpid()}\n{note}" if note else str(os.getpid()))
        file.flush()
    except OSError as error:
        raise OutputError(f"cannot lock {path}: {error.strerror}") from error
    return file


def lock_owner(path: Path) -> int | None:
    """Return the process that has the lock at ``path``, or ``None`` where none has."""
    with contextlib.suppress(OSError, ValueError), path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(file.readline())
    return None
