"""Processes that end with their parent, also after a crash.

On Linux the kernel signals the parent's death; elsewhere the process checks its parent twice a second.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

PARENT = "FEDLOOM_PARENT"
"""In the environment of a process: the one that started it."""

SET_DEATH_SIGNAL = 1
"""``PR_SET_PDEATHSIG`` of Linux's ``prctl``."""

LOOK = 0.5
"""Seconds between looks where the system does not tell."""


def of_this_process() -> dict[str, str]:
    """Return what the environment of a child must hold."""
    return {PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """Make this process be killed when its parent ends; at once if it has ended already."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(SET_DEATH_SIGNAL, signal.SIGKILL)
    else:
        threading.Thread(target=_look, args=(parent,), daemon=True).start()
    started = os.environ.pop(PARENT, None)  # it is not the parent of what this one starts
    if os.getppid() != parent or (started is not None and int(started) != parent):
        os._exit(1)


def _look(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK)
    os._exit(1)
