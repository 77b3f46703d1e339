"""What one request may still compute: batches and seconds, and how large an adapter may become over it.

A model asks before each forward pass, the loop of steps before each batch, so nothing that a method does
gets round it.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from fedloom.errors import PolicyError, Refusal

STEPS, SECONDS, RANK = "policy.max_steps", "policy.max_seconds", "policy.max_rank"
"""Lines of a client's file that bound a request."""


@dataclass
class Allowance:
    """Bounds of a request, and what it has used of them.

    Attributes:
        steps: Batches that may be computed for training, or for choosing what was trained.
        seconds: That may be spent.
        numbers: That an adapter may consist of.
    """

    steps: float = math.inf
    seconds: float = math.inf
    numbers: float = math.inf
    _taken: int = field(default=0, init=False)
    _until: float = field(default=math.inf, init=False)

    def begin(self, *, going_on: bool = False) -> None:
        """Begin a request; where it is ``going_on``, as one step of many, batches are counted further."""
        self._until = time.monotonic() + self.seconds
        self._taken = self._taken if going_on else 0

    def check(self) -> None:
        """Refuse to go on where the time is over.

        Raises:
            PolicyError: It is.
        """
        if time.monotonic() > self._until:
            raise PolicyError(Refusal(SECONDS, f"it took longer than {self.seconds:g} seconds"))

    def step(self) -> None:
        """Take one batch.

        Raises:
            PolicyError: All have been taken.
        """
        self.check()
        if self._taken >= self.steps:
            raise PolicyError(Refusal(STEPS, f"it takes more than {self.steps:g} batches"))
        self._taken += 1

    def hold(self, numbers: int) -> None:
        """Refuse an adapter of so many numbers where that is too many.

        Raises:
            PolicyError: It is.
        """
        if numbers > self.numbers:
            reason = f"an adapter of {numbers} numbers was sent, {self.numbers:g} are allowed"
            raise PolicyError(Refusal(RANK, reason))
