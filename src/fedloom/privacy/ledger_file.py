"""Files of ledgers: lines that are on the disk once they are appended, and none that is half one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedloom.errors import OutputError, PrivacyError

FIRST = "0" * 64
"""What the first line of a chain names as the hash of the line before."""


def append_line(path: Path, line: str) -> None:
    """Append a line, and return once it is on the disk, the name of a new file too.

    Raises:
        OutputError: It cannot be written whole.
    """
    new = not path.exists()
    try:
        mode = 0o644 & path.parent.stat().st_mode  # a private folder has private files
        _write(path, f"{line}\n".encode(), os.O_WRONLY | os.O_CREAT | os.O_APPEND, mode | 0o600)
        if new:
            _write(path.parent, b"", os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def whole_lines(path: Path, *, repair: bool = True) -> list[bytes]:
    """Return all lines but an unfinished last one, whose noise was not drawn.

    Args:
        path: The file; one that is not there has none.
        repair: Cut off the unfinished line: for the process that writes, as another may be about to.

    Raises:
        OutputError: It cannot be read.
    """
    try:
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if repair and len(whole) < len(data):
            os.truncate(path, len(whole))
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror}") from error
    return whole.splitlines()


def append_entry(path: Path, before: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Append an entry as JSON, with a hash over it and the line before; return it with that.

    Raises:
        OutputError: It cannot be written whole.
    """
    found = {**entry, "hash": _hash(before, entry)}
    append_line(path, json.dumps(found, sort_keys=True))
    return found


def entries(
    path: Path, advice: str = "start a new run", *, repair: bool = True
) -> list[dict[str, Any]]:
    """Return what :func:`append_entry` wrote, each with its hash.

    Args:
        path: The file; one that is not there has none.
        advice: What can be done where it was changed.
        repair: As of :func:`whole_lines`.

    Raises:
        PrivacyError: A line is not what was written.
        OutputError: It cannot be read.
    """
    found: list[dict[str, Any]] = []
    before = FIRST
    for number, line in enumerate(whole_lines(path, repair=repair), 1):
        try:
            entry = dict(json.loads(line))
            right = entry["hash"] == _hash(before, entry)
        except (ValueError, KeyError, TypeError, RecursionError):
            right = False
        if not right:
            raise PrivacyError(
                f"{path}: line {number} is not what was written: what was spent is not known; "
                f"{advice}"
            )
        before = entry["hash"]
        found.append(entry)
    return found


def _hash(before: str, entry: Mapping[str, Any]) -> str:
    content = {key: value for key, value in entry.items() if key != "hash"}
    return hashlib.sha256(f"{before}{json.dumps(content, sort_keys=True)}".encode()).hexdigest()


def _write(path: Path, data: bytes, flags: int, mode: int = 0o600) -> None:
    """Write to a file, or nothing to a folder, and have it be on the disk."""
    file = os.open(path, flags, mode)
    try:
        if data and os.write(file, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file)
    finally:
        os.close(file)
