"""What a client keeps between rounds, on its own disk, one version for each message it took part in.

A server that was stopped goes on after the last round that it saved, which may be before the last that
this client has seen. So versions say in which stretch of the run (from one beginning to the next) they
were made, and those of rounds that were given up are never used again. Nor are those of messages whose
answers came too late or were refused: nobody else knows what was learnt then.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from fedloom.errors import CheckpointError
from fedloom.storage.files import write_atomically
from fedloom.tensors import Tensors


@dataclass(frozen=True, order=True)
class Version:
    """When something was kept.

    Attributes:
        began: How many times the run had begun or been resumed.
        round: In which round.
        number: Over which message, counted in that stretch.
    """

    began: int
    round: int
    number: int = 0

    def counts(self, began: Sequence[int], undone: Collection[tuple[int, int]] = ()) -> bool:
        """Return whether it was kept in a round, and over a message, that counts.

        Args:
            began: For each time that the run began or was resumed, the last round finished before.
            undone: Messages whose answers did not count, by stretch and number.
        """
        if self.began > len(began) or (self.began, self.number) in undone:
            return False
        return all(self.round <= after for after in began[self.began :])


class ClientVersions:
    """The versions of one client in one run."""

    def __init__(self, folder: Path) -> None:
        """Look into ``folder``, which may not be there yet."""
        self.folder = folder

    def latest(
        self, began: Sequence[int], round: int, undone: Collection[tuple[int, int]] = ()
    ) -> tuple[Version, Tensors] | None:
        """Return the newest version that counts in ``round``, and drop those that never will again.

        Args:
            began: As of :meth:`Version.counts`.
            round: The round.
            undone: As of :meth:`Version.counts`.

        Raises:
            CheckpointError: It is damaged.
        """
        versions = self._versions()
        for version in versions:
            if not version.counts(began, undone):
                self._path(version).unlink(missing_ok=True)
        usable = [v for v in versions if v.counts(began, undone) and v.round <= round]
        if not usable:
            return None
        newest = usable[-1]
        try:
            return newest, safetensors.torch.load_file(self._path(newest))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"what this client keeps is damaged ({self._path(newest)}: {error}); delete that file "
                "to go on with the version before it"
            ) from None

    def put(self, version: Version, tensors: Tensors, *, oldest: int) -> None:
        """Keep tensors, and drop versions before the one that a server gone back to ``oldest`` needs.

        Of one round the last two stay: the last may yet be undone.

        Raises:
            OutputError: The disk is full or not writable.
        """
        write_atomically(self._path(version), safetensors.torch.save(tensors))
        versions = self._versions()
        before = [known for known in versions if known.round <= oldest]
        same = [known for known in versions if known.round == version.round]
        for known in [*before[:-1], *same[:-2]]:
            self._path(known).unlink(missing_ok=True)

    def _versions(self) -> list[Version]:
        found = []
        for path in self.folder.glob("*.safetensors"):
            match = re.fullmatch(r"(\d+)-(\d+)-(\d+)", path.stem)
            if match:
                found.append(Version(*map(int, match.groups())))
        return sorted(found, key=lambda own: (own.round, own.began, own.number))

    def _path(self, version: Version) -> Path:
        name = f"{version.began:04d}-{version.round:06d}-{version.number:09d}.safetensors"
        return self.folder / name
