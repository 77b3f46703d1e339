"""Files of ledgers: lines that are on the disk once they are appended, and none that is half one."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from fedloom.errors import OutputError


def append_line(path: Path, line: str) -> None:
    """Append a line, and return once it is on the disk, the name of a new file too.

    Raises:
        OutputError: It cannot be written whole.
    """
    new = not path.exists()
    try:
        _write(path, f"{line}\n".encode(), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        if new:
            _write(path.parent, b"", os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def whole_lines(path: Path) -> list[bytes]:
    """Return all lines; cut off an unfinished last one, whose noise was not drawn.

    Raises:
        OutputError: It cannot be read.
    """
    try:
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(path, len(whole))
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror}") from error
    return whole.splitlines()


def _write(path: Path, data: bytes, flags: int) -> None:
    """Write to a file, or nothing to a folder, and have it be on the disk."""
    file = os.open(path, flags, 0o644)
    try:
        if data and os.write(file, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file)
    finally:
        os.close(file)
