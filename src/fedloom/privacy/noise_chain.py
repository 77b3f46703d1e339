"""Noise that is correlated over rounds: each round's own draw, and what it takes back of those before.

A round's noise is its own draw from the noise key (``noise.py``) less a part of the noise before it
(``correlation.py``). The key and the hashes of what was released are all that is kept: after a kill the
noise of earlier rounds is drawn again, and is the same. Each hash is over the ones before it too, so that
no two releases share a draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fedloom.errors import PluginError, PrivacyError
from fedloom.privacy.client_level import ClippedSum
from fedloom.privacy.correlation import Correlation
from fedloom.privacy.ledger import PrivacyLedger
from fedloom.privacy.noise import Integers

Draw = Callable[[int, bytes, ClippedSum], dict[str, Integers]]
"""From a round, the hash of its release and a sum of its shape to the round's own draw."""


class NoiseChain:
    """What the noise of the next round hangs on.

    Attributes:
        hashes: Of the releases that the run went on from, of rounds 1, 2, ...
        sizes: Numbers of each tensor, from the first round on.
    """

    def __init__(self, correlation: Correlation, draw: Draw) -> None:
        """Begin before the first round."""
        self._correlation, self._draw = correlation, draw
        self.hashes: list[bytes] = []
        self.sizes: dict[str, int] = {}
        self._earlier: dict[str, dict[int, Integers]] = {}
        self._known = 0

    def content(self) -> Iterator[bytes]:
        """Yield what the next release's hash depends on beside its sum."""
        yield from self.hashes[-1:]

    def require(self, round: int, total: ClippedSum) -> None:
        """Check that a round follows the one before, with tensors of the same names and sizes.

        Raises:
            PluginError: It does not.
        """
        sizes = {name: len(own) for name, own in total.steps.items()}
        if round != len(self.hashes) + 1 or sizes != (self.sizes or sizes):
            raise PluginError(
                f"round {round}: noise that is correlated over rounds (privacy.mechanism) needs one mean "
                f"of the same tensors in each; the last was of round {len(self.hashes)} with "
                f'{sum(self.sizes.values())} numbers, this has {sum(sizes.values())}: use "independent"'
            )

    def next(self, round: int, digest: bytes, total: ClippedSum) -> dict[str, Integers]:
        """Return the noise of a release, in steps, and go on to the next round.

        Args:
            round: The one after the last.
            digest: Hash of the release.
            total: The sum, of which the shapes alone are looked at.
        """
        self.sizes = {name: len(own) for name, own in total.steps.items()}
        self.hashes.append(digest)
        found: dict[str, Integers] = {}
        while self._known < round:
            self._known += 1
            drawn = self._draw(self._known, self.hashes[self._known - 1], total)
            found = {
                name: self._correlation.next(self._known, own, self._earlier.setdefault(name, {}))
                for name, own in drawn.items()
            }
        return found

    def saved(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as plain JSON: nothing of it tells of noise without the key."""
        return {"hashes": [own.hex() for own in self.hashes], "sizes": self.sizes}

    def restore(self, saved: Mapping[str, Any], ledger: PrivacyLedger) -> None:
        """Go on from what a checkpoint keeps.

        Raises:
            PrivacyError: The ledger holds no such releases.
        """
        held = {(entry["round"], entry["release"]) for entry in ledger.entries}
        if not held.issuperset(enumerate(saved["hashes"], 1)):
            raise PrivacyError(
                f"{ledger.path}: the checkpoint goes on from releases which this ledger does not hold: "
                "what was spent is not known; start a new run"
            )
        self.hashes = [bytes.fromhex(own) for own in saved["hashes"]]
        self.sizes, self._earlier, self._known = dict(saved["sizes"]), {}, 0
