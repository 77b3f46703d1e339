"""The lock file of the one worker of a folder; this module imports nothing, so that it loads at once."""

from __future__ import annotations

LOCK = "worker.pid"
"""File in the client's folder: process id and lock of the only worker."""
