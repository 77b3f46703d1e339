"""The mean of clients' changes where clients add the noise and the server gets their sum alone.

The server draws nothing. It writes each release into the ledger before it asks for what takes the masks
off (until then nothing is released), with the noise that is certain to be in the sum: that of the clients
in it, less those that may tell theirs. The sum is on the disk before anything that follows from it is
sent, and a round that is repeated after a kill takes it from there: asked for again it would have other
noise, and be another release.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open

from fedloom.errors import OutputError, PrivacyError
from fedloom.privacy.distributed_noise import NoiseShares
from fedloom.privacy.ledger import PrivacyLedger
from fedloom.privacy.private_mean import AccountedMean, ClientLevelPlan
from fedloom.storage.files import make_private, write_atomically
from fedloom.tensors import Tensors

SAMPLING = 1.0
"""What is accounted: whoever adds up the masked answers knows whose they are."""

PART_BYTES = 16
"""Random bytes that name a part of a run."""


class DistributedMean(AccountedMean):
    """Accounts for sums to which clients have added noise, and keeps them.

    Attributes:
        noise: What each client adds.
        part: Names this part of the run, in which noise is other than in those before a kill; empty where
            it is drawn from the experiment's seed, and a sum of the same answers is the same release.
    """

    def __init__(
        self, plan: ClientLevelPlan, ledger: PrivacyLedger, folder: Path, *, seeded: bool
    ) -> None:
        """Begin with nothing kept.

        Args:
            plan: The numbers of the mechanism.
            ledger: What was spent.
            folder: Where sums are kept until a checkpoint has them.
            seeded: Whether noise is drawn from the experiment's seed.
        """
        super().__init__(plan, ledger)
        self.noise, self._folder = plan.added_noise, folder
        self.part = b"" if seeded else os.urandom(PART_BYTES)

    def spend(
        self, round: int, release: bytes, shares: NoiseShares, survivors: Collection[int]
    ) -> None:
        """Write down a sum before its masks are taken off.

        Args:
            round: From 1.
            release: What names it: of which work, of which start of the run, of whose answers.
            shares: What each client has added.
            survivors: Whose answers are in it.

        Raises:
            PrivacyError: The budget would be passed; the masks stay on.
            OutputError: The ledger cannot be written.
        """
        least = shares.counted(len(survivors))
        if least < self.plan.noise_multiplier * (1 - 1e-9):
            raise PrivacyError(
                f"round {round}: the noise of {len(survivors)} clients is {least:.4g} times the clip, "
                f"and {self.plan.noise_multiplier:.4g} is stated: nothing is released"
            )
        self.ledger.spend(round, least, SAMPLING, release, self.plan.require_budget)

    def keep(self, round: int, work: bytes, means: Tensors, clients: Collection[int]) -> None:
        """Put a sum on the disk, before anything is made of it.

        Args:
            round: From 1.
            work: Hash of what clients were asked, in whichever part of the run.
            means: What comes of it.
            clients: Whose answers are in it.

        Raises:
            OutputError: It cannot be written.
        """
        metadata = {"work": work.hex(), "clients": json.dumps(sorted(clients))}
        content = safetensors.torch.save(
            {name: tensor.contiguous() for name, tensor in means.items()}, metadata
        )
        path = self._path(round, work)
        try:
            make_private(self._folder)
            write_atomically(path, content)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error

    def kept(self, round: int, work: bytes) -> tuple[Tensors, tuple[int, ...]] | None:
        """Return a sum that was released before a kill, with its clients; ``None`` where it was not.

        One that cannot be read is none: it would be another release, and is counted as one.
        """
        path = self._path(round, work)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                means = Tensors({name: file.get_tensor(name) for name in list(file.keys())})
            clients = tuple(int(own) for own in json.loads(metadata["clients"]))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError):
            return None
        return (means, clients) if metadata.get("work") == work.hex() else None

    def take(self, round: int, clients: Collection[int]) -> None:
        """Note that clients are in a sum, before it is released or taken from the disk.

        Raises:
            PrivacyError: One of them took part more often than is accounted.
        """
        if self._taken is not None:
            self._taken.take(clients, round)

    def summed(self, means: Tensors, round: int) -> Tensors:
        """Return a sum, as the state of a round is made of it."""
        self.latest = round
        return means

    def forget(self, before: int) -> None:
        """Remove kept sums of the rounds up to one of which a checkpoint is on the disk."""
        with contextlib.suppress(OSError):
            for path in self._folder.iterdir():
                if int(path.stem.split("-")[0]) <= before:
                    path.unlink(missing_ok=True)
            self._folder.rmdir()

    def _path(self, round: int, work: bytes) -> Path:
        return self._folder / f"{round:06d}-{work.hex()[:16]}.safetensors"
