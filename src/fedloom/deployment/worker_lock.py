"""The file by which one worker a folder is held; it imports nothing, so that it is found at once."""

from __future__ import annotations

LOCK = "worker.pid"
"""In the client's folder: the number of this process, and the lock that makes it the only one."""
