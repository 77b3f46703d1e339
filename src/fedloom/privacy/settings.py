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
    noise_multiplier: float | None = Field(default=None, ge=0, le=1e5)
    """Standard deviation of the noise on a sum, over the clip; 0 clips alone, which promises nothing."""
    clip_quantile: float | None = Field(default=None, gt=0, lt=1)
    """For unit = "client": have the clip follow this quantile of the norms of clients' changes, from
    privacy.clip on (default: it stays). Andrew et al. 2021 take 0.5."""
    clip_learning_rate: float = Field(default=0.2, gt=0, le=1)
    """How fast it follows (Andrew et al. 2021: 0.2)."""
    clip_count_noise: float | None = Field(default=None, gt=0)
    """Standard deviation of the noise on the number of clients within the clip, which the noise on the
    sum pays for: above half the noise multiplier (default: a twentieth of the clients expected in a
    round)."""
    amplification: bool = False
    """Whether drawing clients by coins makes epsilon smaller. It must be false: the records of a run name
    the clients of each round, and against whoever reads them there is no amplification."""
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
        if self.amplification:
            yield (
                "privacy.amplification = true: the records of a run (rounds.jsonl, costs.jsonl, the "
                "audit log, pages) name the clients of each round, so that sampling hides nobody from "
                "who reads them: leave it out; epsilon then counts every client in every round"
            )
        for name in ("clip_quantile", "clip_count_noise"):
            if getattr(self, name) is not None and self.unit != "client":
                yield f'privacy.{name} goes with privacy.unit = "client" alone'
        if self.clip_count_noise is not None and self.clip_quantile is None:
            yield "privacy.clip_count_noise is read where privacy.clip_quantile is given: give both"
        if self.column is not None and self.unit != "row":
            yield 'privacy.column groups rows: it goes with privacy.unit = "row" alone'
