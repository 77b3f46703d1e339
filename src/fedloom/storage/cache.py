"""The cache folder of the tiny model and of tokenised data."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the cache folder: FEDLOOM_CACHE, or ``fedloom`` in the user's cache folder."""
    chosen = os.environ.get("FEDLOOM_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(base) / "fedloom"
