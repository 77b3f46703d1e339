"""Termination: SIGTERM, from a service manager, a batch system or ``kill``, is handled like Ctrl-C.

The run saves its state in both cases, and prints how to resume it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Terminated(KeyboardInterrupt):
    """This process alone was told to end; after Ctrl-C its children were, too."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise :class:`Terminated` once; what comes later does not disturb the saving."""
    if threading.current_thread() is not threading.main_thread():
        yield  # the system tells the main thread alone
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise Terminated
