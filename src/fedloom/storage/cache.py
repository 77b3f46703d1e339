"""The cache folder of the tiny model and of tokenised data."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the cache folder: FEDLOOM_CACHE, or ``fedloom`` in the user's cache folder."""
    chosen = os.environ.get("FEDLOOM_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(base) / "fedloom"


def make_room(folder: Path, most: int, last: Path) -> None:
    """Delete files of a folder until they are ``most`` bytes together, oldest first, ``last`` last.

    What is mapped or open stays readable by who has it.
    """
    with contextlib.suppress(OSError):
        there = [file for file in folder.iterdir() if not file.name.startswith(".")]
        files = sorted(there, key=lambda file: file.stat().st_mtime)  # not what is being written
        used = sum(file.stat().st_size for file in files)
        for file in [
            *(own for own in files if own != last),
            *(own for own in files if own == last),
        ]:
            if used <= most:
                return
            used -= file.stat().st_size
            file.unlink(missing_ok=True)


def touch(file: Path) -> None:
    """Note that a file was read now."""
    with contextlib.suppress(OSError):
        os.utime(file)
