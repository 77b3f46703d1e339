"""``[privacy]``: differential privacy and secure aggregation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from fedloom.settings.schema import Settings

Unit = Literal["client", "row"]
"""Whose presence is hidden: all of a client, or one of its rows."""


class PrivacySettings(Settings):
    """``[privacy]``: what of the rows may be learnt from what is sent and released, and by whom."""

    unit: Unit | None = None
    """Whose presence differential privacy hides: "client" (clipped updates, noise on their sum) or "row"
    (clipped gradients and noise in each client's own steps); without it there is none."""
    delta: float | None = Field(default=None, gt=0, lt=1)
    """delta of (epsilon, delta)-differential privacy: below 1 / number of units."""
    clip: float = Field(default=1.0, gt=0)
    """Largest Euclidean norm of what one unit adds, over all tensors together; longer ones are scaled
    down to it."""
    noise_multiplier: float | None = Field(default=None, ge=0)
    """Standard deviation of the noise on a sum, over the clip; 0 clips alone, which promises nothing."""
    target_epsilon: float | None = Field(default=None, gt=0)
    """epsilon that the whole run may spend; the noise multiplier is solved for it."""
    accountant: Literal["auto", "pld", "rdp"] = "auto"
    """How epsilon is computed: privacy loss distributions, Renyi, or the first where it ends and else the
    second."""
    column: str | None = None
    """For unit = "row": rows with the same value in this column (a patient) are one unit."""
    seeded: bool = False
    """Whether noise is drawn from federation.seed: reproducible, therefore not private (for simulations
    alone)."""
    secure_aggregation: bool = False
    """Whether the server sees sums of updates and none of a single client."""

    def contradictions(self) -> Iterator[str]:
        """Yield what in this section contradicts itself."""
        if self.unit is None:
            for name in ("delta", "noise_multiplier", "target_epsilon", "column"):
                if getattr(self, name) is not None:
                    yield f'privacy.{name} is given and privacy.unit is not: give "client" or "row"'
            return
        if self.delta is None:
            yield "privacy.delta is missing: below 1 / number of units, 1e-5 for 10,000 rows or more"
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            yield "give one of privacy.noise_multiplier and privacy.target_epsilon: the other is solved"
        if self.column is not None and self.unit != "row":
            yield 'privacy.column groups rows: it goes with privacy.unit = "row" alone'
