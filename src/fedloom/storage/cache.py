"""Where the tiny model and tokenised data are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return where the tiny model and tokenised data are kept: FEDLOOM_CACHE or the user's cache."""
    chosen = os.environ.get("FEDLOOM_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(base) / "fedloom"
