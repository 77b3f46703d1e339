"""The ledger of what a run has spent: one line a release, each hashed with the one before.

A line is written, and on the disk, before the noise of its release is drawn, so that no kill can make a
release that was not counted. A release is named by a hash under the noise key: the same release asked
again (a round repeated after a kill) has the same noise, and is counted once; another one in the same
round is counted beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedloom.errors import PrivacyError
from fedloom.privacy.accounting import Releases
from fedloom.privacy.ledger_file import FIRST, append_entry, entries

Entries = list[dict[str, Any]]
"""Lines of releases, each with its round, its noise multiplier and what names it."""


class PrivacyLedger:
    """The releases of one run.

    Attributes:
        path: The file.
        facts: What its first line says: what the releases are of.
        entries: The lines of releases, oldest first.
    """

    def __init__(
        self,
        path: Path,
        facts: Mapping[str, Any] | None = None,
        compose: Callable[[Entries], list[Releases]] | None = None,
    ) -> None:
        """Open the ledger at ``path``, or begin it.

        Args:
            path: The file.
            facts: For its first line; those of a ledger that exists must be the same (default: whatever
                they are).
            compose: From its lines of releases to how they are accounted (default: each by itself).

        Raises:
            PrivacyError: It was changed, or is of another run.
            OutputError: It cannot be written.
        """
        self.path, self.facts = path, dict(facts or {})
        self.entries: Entries = []
        self._compose = compose or _composed
        self.head = FIRST
        if not path.exists():
            self._append({"ledger": 1, **self.facts})
            return
        lines = entries(path)
        if not lines:
            self._append({"ledger": 1, **self.facts})
            return
        first, *self.entries = lines
        self.head = lines[-1]["hash"]
        found = {key: own for key, own in first.items() if key not in ("ledger", "hash")}
        if facts is not None and found != self.facts:
            raise PrivacyError(
                f"{path} is the privacy ledger of another run, or of other settings of [privacy]: what "
                "was spent cannot be added up; start a new run"
            )

    @property
    def position(self) -> dict[str, Any]:
        """How far it has come, for a checkpoint: the number of releases, and the last line's hash."""
        return {"releases": len(self.entries), "hash": self.head}

    def require(self, position: Mapping[str, Any]) -> None:
        """Check that the ledger holds all that it held at an earlier ``position``.

        Raises:
            PrivacyError: It does not: lines were lost.
        """
        count = int(position["releases"])
        hashes = [entry["hash"] for entry in self.entries]
        found = hashes[count - 1] if 0 < count <= len(hashes) else None
        if count and found != position["hash"]:
            raise PrivacyError(
                f"{self.path}: the checkpoint counts {count} releases, which this ledger does not hold: "
                "what was spent is not known; start a new run"
            )

    def spend(
        self,
        round: int,
        noise_multiplier: float,
        sampling: float,
        release: bytes,
        allowed: Callable[[list[Releases]], None] = lambda releases: None,
    ) -> None:
        """Write down a release, before its noise is drawn. One that is written already is the same one.

        Args:
            round: From 1.
            noise_multiplier: z of all that the release shows together.
            sampling: q that is accounted.
            release: Hash under the noise key of what is noised.
            allowed: Told of all releases with this one; raises where they are too many.

        Raises:
            OutputError: It cannot be written.
        """
        entry = {
            "round": round,
            "mechanism": "discrete gaussian",
            "noise_multiplier": noise_multiplier,
            "sampling": sampling,
            "release": release.hex(),
        }
        if any(all(old[key] == own for key, own in entry.items()) for old in self.entries):
            return
        allowed(self._compose([*self.entries, entry]))
        self.entries.append(self._append(entry))

    @property
    def releases(self) -> list[Releases]:
        """All that was spent, as it is accounted."""
        return self._compose(self.entries)

    def _append(self, entry: dict[str, Any]) -> dict[str, Any]:
        entry = append_entry(self.path, self.head, entry)
        self.head = entry["hash"]
        return entry


def _composed(entries: Entries) -> list[Releases]:
    """Return releases as they are accounted.

    Where sampling counts, those of one round are one, as their cohort was drawn once: Gaussian releases
    on one cohort are together one with z = (sum of z_i^-2)^(-1/2).
    """
    found, rounds = [], dict[tuple[int, float], list[float]]()
    for entry in entries:
        z, sampling = entry["noise_multiplier"], entry["sampling"]
        if sampling == 1:
            found.append(Releases(z, sampling, 1))
        else:
            rounds.setdefault((entry["round"], sampling), []).append(z)
    for (_, sampling), own in rounds.items():
        z = own[0] if len(own) == 1 else 0.0
        if len(own) > 1 and min(own) > 0:
            z = 1 / math.sqrt(sum(one**-2 for one in own))
        found.append(Releases(z, sampling, 1))
    return found
