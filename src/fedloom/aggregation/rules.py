"""Which rule puts the updates of a round together, by name. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from fedloom.aggregation.means import weighted_mean
from fedloom.aggregation.merging import MERGE_RULES, Merging, Space
from fedloom.aggregation.robust import (
    clipped_mean,
    coordinate_median,
    geometric_median,
    krum,
    multi_krum,
    trimmed_mean,
)
from fedloom.settings.schema import Of, Settings
from fedloom.tensors import Tensors

NEEDED = {"trimmed_mean": 1, "krum": 3, "multi_krum": 3}
"""Rule that is told how many updates may be bad to how many it needs above twice that."""


def combined(
    rule: str,
    updates: Sequence[Tensors],
    weights: Sequence[float],
    start: Tensors,
    bad: int = 0,
    largest: float = float("inf"),
) -> Tensors:
    """Return what a round makes of its updates.

    Args:
        rule: mean, or one of ``robust.py``.
        updates: What clients sent back.
        weights: One a client, for mean, clipped_mean and geometric_median.
        start: What they were sent.
        bad: f, how many may be bad, for trimmed_mean, krum and multi_krum.
        largest: Largest norm of a change, for clipped_mean.

    Raises:
        ValueError: Too few updates for the rule, or there is no such rule.
    """
    if rule == "mean":
        return weighted_mean(updates, weights)
    if rule == "median":
        return coordinate_median(updates)
    if rule == "trimmed_mean":
        return trimmed_mean(updates, bad)
    if rule == "krum":
        return krum(updates, bad)
    if rule == "multi_krum":
        return multi_krum(updates, bad)
    if rule == "geometric_median":
        return geometric_median(updates, weights)
    if rule == "clipped_mean":
        return clipped_mean(updates, weights, start, largest)
    raise ValueError(f"{rule!r} is not a rule")


OF_MERGING = Of("aggregation.rule", MERGE_RULES)

SPARSE = Of("aggregation.rule", ("ties", "dare", "knots"))

EITHER_SPACE = Of("aggregation.rule", ("task_arithmetic", "ties", "dare"))


class AggregationSettings(Settings):
    """``[aggregation]``: how the server puts the clients' updates together."""

    rule: Literal[
        "mean",
        "median",
        "trimmed_mean",
        "krum",
        "multi_krum",
        "geometric_median",
        "clipped_mean",
        "task_arithmetic",
        "ties",
        "dare",
        "knots",
    ] = "mean"
    """The mean by rows; a rule that some bad clients cannot move far (median to clipped_mean,
    ``aggregation/robust.py``); or one of model merging, for clients that learn different things
    (task_arithmetic to knots, ``aggregation/merging.py``)."""
    bad: int = Field(default=0, ge=0)
    """Of trimmed_mean, krum and multi_krum: f, clients of a round that may be bad."""
    max_norm: float | None = Field(default=None, gt=0)
    """Of clipped_mean: largest norm of a client's change over all tensors."""

    density: Annotated[float | None, SPARSE] = Field(default=None, gt=0, le=1)
    """Share of the entries of each tensor's change that is kept: of ties and knots the largest (default
    0.2), of dare random ones, the others being divided by it (default 0.8)."""
    scale: Annotated[float, OF_MERGING] = Field(default=1.0, gt=0, le=100)
    """Times the merged change: 1 is the step of the mean, the number of clients that of the sum."""
    space: Annotated[Space, EITHER_SPACE] = "factors"
    """Whether the rule takes changes of LoRA's factors A and B apart, or of their products B A, whose
    result is cut to adapter.rank; knots has products alone."""

    @property
    def merging(self) -> Merging | None:
        """The rule of model merging, if it is one."""
        if self.rule not in MERGE_RULES:
            return None
        return Merging(self.rule, self.density, self.scale, self.space)  # type: ignore[arg-type]

    @property
    def of_products(self) -> bool:
        """Whether the rule needs both factors of LoRA."""
        return self.merging is not None and self.merging.of_products

    @property
    def needed(self) -> int:
        """Clients that the rule needs at least, 0 where it takes any number."""
        return 2 * self.bad + NEEDED[self.rule] if self.rule in NEEDED else 0

    def contradictions(self, cohort: int) -> list[str]:
        """Return what in these settings cannot both be meant, with so many clients in a round."""
        found = []
        if self.bad and self.rule not in NEEDED:
            found.append(f"aggregation.bad is a setting of {', '.join(NEEDED)}, not {self.rule}")
        if (self.max_norm is None) == (self.rule == "clipped_mean"):
            found.append('aggregation.max_norm and aggregation.rule = "clipped_mean" go together')
        if cohort < self.needed:
            found.append(
                f"aggregation.rule = {self.rule!r} with aggregation.bad = {self.bad} needs "
                f"{self.needed} clients in a round, there are {cohort}"
            )
        return found

    def contradictions_of_groups(
        self, setting: str, groups: int, clients: int, cohort: int
    ) -> list[str]:
        """Return what is wrong with a mean in each of some groups of one size.

        Args:
            setting: Name of what gives their number.
            groups: That number.
            clients: In all.
            cohort: In a round; of fewer than all, a group may have none.
        """
        if not self.needed or (cohort == clients and clients // groups >= self.needed):
            return []
        return [
            f"aggregation.rule = {self.rule!r} with aggregation.bad = {self.bad} needs {self.needed} "
            f"clients of each of {setting} = {groups} groups in every round: have all of "
            f"{self.needed * groups} clients or more take part in each, or use a rule that goes with any "
            'number, such as "geometric_median"'
        ]
