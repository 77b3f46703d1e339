"""What the steps of one client have released: a line each, on the disk before its noise is drawn.

A step that is made again after a kill, of the same rows from the same adapter, is the same release: it
has the same noise and is there already. One that differs in a bit has other noise and is another line,
whichever round it repeats: the lines are never cut back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from fedloom.errors import OutputError, PrivacyError
from fedloom.privacy.ledger_file import FIRST, append_line, whole_lines


class RowLedger:
    """The releases of one client.

    Attributes:
        path: The file: on each line the release's hash, and one over it and the line before.
        allowed: How many there may be, ``None`` for any number.
        room: Called with their number before one more is written, which it counts; raises where that is
            too many.
    """

    def __init__(
        self,
        path: Path,
        allowed: int | None = None,
        room: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Take the file, which need not be there."""
        self.path, self.allowed, self.room = path, allowed, room
        self._known: dict[str, None] = {}
        self._head = FIRST

    def __len__(self) -> int:
        """Return how many releases there are in the file, as it is now."""
        self.read()
        return len(self._known)

    def read(self) -> None:
        """Read the file again: another process may have written since.

        Raises:
            PrivacyError: It is not what was written.
            OutputError: It cannot be read.
        """
        self._known, self._head = {}, FIRST
        for number, line in enumerate(whole_lines(self.path), 1):
            release, _, chain = line.decode("ascii", "replace").partition(" ")
            if chain != _chained(self._head, release):
                raise PrivacyError(
                    f"{self.path}: line {number} is not what was written: what was spent is not known; "
                    "start a new run"
                )
            self._known[release], self._head = None, chain

    def spend(self, release: bytes) -> None:
        """Write a release down; one that is there already is the same one.

        Raises:
            PrivacyError: There are as many as the budget allows.
            FedloomError: What ``room`` raises.
            OutputError: It cannot be written.
        """
        name = release.hex()
        if name in self._known:
            return
        if self.allowed is not None and len(self._known) >= self.allowed:
            raise PrivacyError(
                f"{self.path}: {len(self._known)} noisy steps, as many as this run may make: "
                "steps that were made again differed in rounding, so that each counts. The last "
                "checkpoint holds what was reached"
            )
        self.room(len(self._known) + 1)
        chain = _chained(self._head, name)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}") from error
        append_line(self.path, f"{name} {chain}")
        self._known[name], self._head = None, chain


def _chained(before: str, release: str) -> str:
    return hashlib.sha256(f"{before} {release}".encode()).hexdigest()
