"""What the steps of one client have released: a line each, on the disk before its noise is drawn.

A step that is made again after a kill, of the same rows from the same adapter, is the same release: it
has the same noise and is there already. One that differs in a bit has other noise and is another line,
whichever round it repeats: the lines are never cut back. A line names the coins of its batch as well: two
noises on one batch tell more of it than two batches would, so that a client of a coordinator makes no
other release of a batch (``once``); in a simulation, which nobody can ask for more, each is a line.
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
        path: The file: on each line hashes of the release and its coins, and one over them and the line
            before.
        allowed: How many there may be, ``None`` for any number.
        room: Called with their number before one more is written, which it counts; raises where that is
            too many.
        once: Whether a batch is released once at most.
    """

    def __init__(
        self,
        path: Path,
        allowed: int | None = None,
        room: Callable[[int], None] | None = None,
        *,
        once: bool = False,
    ) -> None:
        """Take the file, which need not be there."""
        self.path, self.allowed, self.room, self.once = path, allowed, room, once
        self._known: dict[str, None] = {}
        self._batches: set[str] = set()
        self._head = FIRST

    def __len__(self) -> int:
        """Return how many releases there are in the file, as it is now."""
        self.read()
        return len(self._known)

    def count(self) -> int:
        """Return how many releases there are, for a process that writes none of them.

        Raises:
            PrivacyError: The file is not what was written.
            OutputError: It cannot be read.
        """
        self.read(repair=False)
        return len(self._known)

    def read(self, *, repair: bool = True) -> None:
        """Read the file again: another process may have written since.

        Args:
            repair: As of :func:`fedloom.privacy.ledger_file.whole_lines`.

        Raises:
            PrivacyError: It is not what was written.
            OutputError: It cannot be read.
        """
        self._known, self._batches, self._head = {}, set(), FIRST
        for number, line in enumerate(whole_lines(self.path, repair=repair), 1):
            release, _, chain = line.decode("ascii", "replace").partition(" ")
            if chain != _chained(self._head, release):
                raise PrivacyError(
                    f"{self.path}: line {number} is not what was written: what was spent is not known; "
                    "start a new run"
                )
            self._keep(release, chain)

    def spend(self, release: bytes, batch: bytes) -> None:
        """Write a release down; one that is there already is the same one.

        Args:
            release: Its hash.
            batch: Hash of what its coins follow from.

        Raises:
            PrivacyError: There are as many as the budget allows, or one of this batch.
            FedloomError: What ``room`` raises.
            OutputError: It cannot be written.
        """
        name = f"{release.hex()}:{batch.hex()}"
        if name in self._known:
            return
        if self.once and batch.hex() in self._batches:
            raise PrivacyError(
                f"{self.path}: this very batch has got its noise, on a sum that differed in rounding: "
                "other noise on it is not accounted for, and none is drawn. The next round has other "
                "batches"
            )
        if self.allowed is not None and len(self._known) >= self.allowed:
            raise PrivacyError(
                f"{self.path}: {len(self._known)} noisy steps, as many as this run may make: "
                "steps that were made again differed in rounding, so that each counts. The last "
                "checkpoint holds what was reached"
            )
        if self.room is not None:
            self.room(len(self._known) + 1)
        chain = _chained(self._head, name)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}") from error
        append_line(self.path, f"{name} {chain}")
        self._keep(name, chain)

    def _keep(self, name: str, chain: str) -> None:
        self._known[name], self._head = None, chain
        self._batches.add(name.partition(":")[2])


def _chained(before: str, release: str) -> str:
    return hashlib.sha256(f"{before} {release}".encode()).hexdigest()
