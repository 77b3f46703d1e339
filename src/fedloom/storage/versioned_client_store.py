"""A client's store on its own disk, with one version for each message it answered.

A server that was stopped goes on after the last round that it saved, which may be before the last that
this client has seen. So each version names the segment of the run (from one start or resume to the next)
in which it was made, and versions of rounds that were lost are never used again. Nor are versions of
messages whose answers came too late or were refused: the server does not know what was learnt then.
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
from fedloom.tensors import Tensors, with_own_memory


@dataclass(frozen=True, order=True)
class Version:
    """When a version was stored.

    Attributes:
        began: How many times the run had begun or been resumed.
        round: In which round.
        number: Number of the message, counted in that segment.
    """

    began: int
    round: int
    number: int = 0

    def counts(self, began: Sequence[int], discarded: Collection[tuple[int, int]] = ()) -> bool:
        """Return whether the round and the message of this version count.

        Args:
            began: For each time that the run began or was resumed, the last round finished before.
            discarded: Messages whose answers did not count, by segment and number.
        """
        if self.began > len(began) or (self.began, self.number) in discarded:
            return False
        return all(self.round <= after for after in began[self.began :])


class ClientVersions:
    """The versions of one client in one run."""

    def __init__(self, folder: Path) -> None:
        """Look into ``folder``, which may not be there yet."""
        self.folder = folder

    def latest(
        self, began: Sequence[int], round: int, discarded: Collection[tuple[int, int]] = ()
    ) -> tuple[Version, Tensors] | None:
        """Return the newest version that counts in ``round``, and drop those that never will again.

        Args:
            began: As of :meth:`Version.counts`.
            round: The round.
            discarded: As of :meth:`Version.counts`.

        Raises:
            CheckpointError: It is damaged.
        """
        versions = self._versions()
        for version in versions:
            if not version.counts(began, discarded):
                self._path(version).unlink(missing_ok=True)
        usable = [v for v in versions if v.counts(began, discarded) and v.round <= round]
        if not usable:
            return None
        newest = usable[-1]
        try:
            return newest, safetensors.torch.load_file(self._path(newest))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"the store of this client is damaged ({self._path(newest)}: {error}); delete that file "
                "to go on with the version before it"
            ) from None

    def put(
        self, version: Version, tensors: Tensors, *, oldest: int, repeated: bool = False
    ) -> None:
        """Keep tensors, and drop versions before the one that a server gone back to ``oldest`` needs.

        Of one round the last two versions stay: the last may still be discarded.

        Args:
            version: When they were made.
            tensors: What to keep.
            oldest: See above.
            repeated: Whether a server that is started again asks for work of earlier rounds once more,
                of which it has not taken the answer: it needs the version before that, too.

        Raises:
            OutputError: The disk is full or not writable.
        """
        write_atomically(self._path(version), safetensors.torch.save(with_own_memory(tensors)))
        versions = self._versions()
        before = [known for known in versions if known.round <= oldest]
        same = [known for known in versions if known.round == version.round]
        for known in [*before[: -2 if repeated else -1], *same[:-2]]:
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
