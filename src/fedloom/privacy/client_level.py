"""Client-level privacy of a sum: clip each client's whole change, add, add noise. Pure.

Source: McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models",
https://arxiv.org/abs/1710.06963, algorithm 1 with the estimator of a fixed denominator; the clip follows
a quantile of the norms as in Andrew et al. 2021, "Differentially Private Learning with Adaptive
Clipping", https://arxiv.org/abs/1905.03871, algorithm 1.

A change is one vector over all tensors. It is clipped to C and cut to whole steps of C / 2^30 towards
zero, so that its norm in steps is at most 2^30, which is checked in whole numbers. Sums of steps are
exact: they depend neither on the order of arrival nor on rounding, and discrete Gaussian noise is added
before anything is turned into a floating-point number again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fedloom.privacy.noise import Floats, Integers, NoiseStream
from fedloom.tensors import Tensors

GRID = 1 << 30
"""Steps of the grid that a clip has. Noise of a multiplier of 2^-10 still has 2^20 steps, at which
discrete and continuous accounting agree; a million clients' steps fit in int64."""

SHRINK = 1 - 2.0**-32
"""Factor by which a change is scaled once more where float64 has left its norm above the grid's."""


@dataclass
class ClippedSum:
    """A sum to which each client adds at most the clip.

    Attributes:
        start: What clients were sent; its names and shapes are those of all updates.
        clip: C, above 0.
        steps: Of each tensor, the sum in steps of C / 2^30, flat.
        balance: Clients whose change was not longer than the clip, less the others.
        not_finite: Updates that held NaN or infinity: each adds zero, and counts as longer than the clip.
    """

    start: Tensors
    clip: float
    steps: dict[str, Integers]
    balance: int = 0
    not_finite: int = 0

    @classmethod
    def empty(cls, start: Tensors, clip: float) -> ClippedSum:
        """Return the sum over no client."""
        return cls(
            start, clip, {n: np.zeros(t.numel(), np.int64) for n, t in sorted(start.items())}
        )

    def add(self, update: Tensors) -> None:
        """Add a client's change, clipped.

        Args:
            update: What it sent back: tensors named and shaped as ``start``.

        Raises:
            ValueError: It has other names or shapes.
        """
        if update.keys() != self.start.keys():
            raise ValueError(
                f"tensors {sorted(update.keys() ^ self.start.keys())[:3]} do not match"
            )
        norm = self._norm(update)
        if not math.isfinite(norm):
            self.not_finite += 1
            self.balance -= 1
            return
        self.balance += 1 if norm <= self.clip else -1
        scale = GRID / max(norm, self.clip)
        while True:
            steps = {name: _whole(change, scale) for name, change in self._changes(update)}
            if sum(int(np.sum(own * own)) for own in steps.values()) <= GRID**2:
                break
            scale *= SHRINK
        for name, own in steps.items():
            self.steps[name] += own

    def _changes(self, update: Tensors) -> Iterator[tuple[str, Floats]]:
        """Yield each tensor's change, flat, in float64."""
        for name in self.steps:
            before, after = self.start[name], update[name]
            if before.shape != after.shape:
                raise ValueError(f"{name} has the shape {after.shape}, {before.shape} was sent")
            yield name, (after.to(torch.float64) - before.to(torch.float64)).numpy().reshape(-1)

    def _norm(self, update: Tensors) -> float:
        """Return the Euclidean norm of a change over all tensors; NaN or infinite where it is not finite.

        Summed in numpy's fixed order, so that it does not depend on how many threads there are.
        """
        largest = 0.0
        for _, change in self._changes(update):
            own = float(np.max(np.abs(change), initial=0.0))
            if not math.isfinite(own):
                return own
            largest = max(largest, own)
        if largest == 0:
            return 0.0
        squares = (float(np.sum((change / largest) ** 2)) for _, change in self._changes(update))
        return largest * math.sqrt(sum(squares))

    @property
    def numbers(self) -> int:
        """How many numbers a change has."""
        return sum(map(len, self.steps.values()))

    def content(self) -> Iterator[bytes]:
        """Yield all that the noise depends on."""
        yield f"{self.clip!r} {self.balance}".encode()
        for name, own in self.steps.items():
            yield f" {name} {len(own)} ".encode()
            yield own.tobytes()

    def drawn(self, deviation: float, noise: NoiseStream) -> dict[str, Integers]:
        """Return independent noise for each number of the sum.

        Args:
            deviation: Its standard deviation in steps.
            noise: Of this release alone.
        """
        return {
            name: noise.discrete_gaussian(deviation, len(own)) for name, own in self.steps.items()
        }

    def moved(self, noise: Mapping[str, Integers], denominator: float) -> Tensors:
        """Return start + (sum + noise) / denominator.

        Args:
            noise: In steps, of each tensor.
            denominator: q N, the number of clients that is expected; never that of those who answered.
        """
        found = {}
        for name, own in self.steps.items():
            noisy, before = own + noise[name], self.start[name]
            change = torch.from_numpy(noisy * (self.clip / GRID / denominator))
            moved = before.to(torch.float64) + change.view(before.shape)
            found[name] = moved.to(before.dtype)
        return {name: found[name] for name in self.start}

    def noised_share(self, deviation: float, expected: float, noise: NoiseStream) -> float:
        """Return the noisy share of clients whose change was not longer than the clip.

        Each client's bit is centred to +1/2 or -1/2: a client that is not there moves the sum by 1/2, one
        whose change is another by 1 at most.

        Args:
            deviation: sigma_b, standard deviation of the noise on the number of clients.
            expected: q N.
            noise: Of this release alone.
        """
        drawn = int(noise.discrete_gaussian(2 * deviation * GRID, 1)[0])
        return 0.5 + (self.balance + drawn / GRID) / (2 * expected)


def _whole(change: Floats, scale: float) -> Integers:
    """Return a change in steps, cut towards zero."""
    return np.trunc(change * scale).astype(np.int64)


def update_multiplier(joint: float, deviation: float, moved: float = 0.5) -> float:
    """Return the noise multiplier of a sum whose clip follows a quantile, given that of both releases.

    z_update = (z^-2 - (sigma_b / moved)^-2)^(-1/2): both releases together cost as much as one with z.

    Args:
        joint: z, from 0.
        deviation: sigma_b, the noise on the number of clients within the clip.
        moved: How far a client moves that number: 1/2 where neighbours have one client more or less, 1
            where they differ in the changes of one.

    Raises:
        ValueError: The number of clients alone costs more than z allows: sigma_b must be above moved z.
    """
    if joint == 0:
        return 0.0
    if deviation <= moved * joint:
        raise ValueError(
            f"privacy.clip_count_noise = {deviation:g} is too little for a noise multiplier of "
            f"{joint:g}, as a client moves the number by {moved:g}: it must be above {moved * joint:g}"
        )
    return float((joint**-2 - (deviation / moved) ** -2) ** -0.5)


def next_clip(clip: float, share: float, quantile: float, rate: float) -> float:
    """Return C exp(-rate (share - quantile)): it grows while too few changes are within it.

    Args:
        clip: C_t.
        share: Noisy share of clients whose change was not longer than it.
        quantile: gamma, the share that is meant to be.
        rate: eta_C.
    """
    return clip * math.exp(-rate * (share - quantile))
