"""``[privacy]``: differential privacy and secure aggregation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fedloom.privacy.correlation import MOST_BANDS
from fedloom.privacy.secure_aggregation.quantisation import LEAST_BITS, MOST_BITS
from fedloom.settings.schema import Of, Settings

SUMMED = Of("privacy.secure_aggregation", (True,))

SHARED = Of("privacy.noise", ("distributed",))

Unit = Literal["client", "row"]
"""Whose presence is hidden: all of a client, or one of its rows."""

Profile = Literal["research", "consortium", "regulated"]

Noise = Literal["central", "distributed"]
"""Who adds the noise that hides clients."""

Mechanism = Literal["independent", "tree", "banded"]
"""How the noise of rounds is correlated."""

PROFILES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "research": {},
        "consortium": {"secure_aggregation": True},
        "regulated": {
            "unit": "row",
            "delta": 1e-5,
            "target_epsilon": 8.0,
            "secure_aggregation": True,
        },
    }
)
"""Settings of ``[privacy]`` that a profile stands for; what the file says beside it goes first."""

EITHER = ("noise_multiplier", "target_epsilon")
"""Of which one is given, and the other solved for."""


class PrivacySettings(Settings):
    """``[privacy]``: what of the rows may be learnt from what is sent and released, and by whom."""

    profile: Profile | None = None
    """Settings of this section under one name: "research" (nothing is promised), "consortium" (sums of
    updates alone), "regulated" (rows are hidden with epsilon 8, and sums alone); what the file says
    beside it goes first, and the experiment of the run folder has what came of both."""
    unit: Unit | None = None
    """Whose presence differential privacy hides: "client" (clipped updates, noise on their sum) or "row"
    (clipped gradients and noise in each client's own steps); without it there is none."""
    delta: float | None = Field(default=None, gt=0, lt=1)
    """delta of (epsilon, delta)-differential privacy: below 1 / number of units."""
    clip: float = Field(default=1.0, ge=1e-8, le=1e8)
    """Largest Euclidean norm of what one unit adds, over all tensors together; longer ones are scaled
    down to it."""
    noise_multiplier: float | None = Field(default=None, ge=0, le=1e5)
    """Standard deviation of the noise on a sum, over the clip; 0 clips alone, which promises nothing."""
    noise: Noise = "central"
    """For unit = "client": who adds the noise. "central": the server, which sees each client's update
    first. "distributed", with secure_aggregation: each client adds a share before its update is masked,
    so that the sum has the noise whoever drops out, and the server never sees one without."""
    colluding: Annotated[int, SHARED] = Field(default=1, ge=0)
    """Clients of a sum whose noise is not counted on, as they may tell it to the server or to others: the
    statement holds against the server and so many clients together. With 0 it does not hold against one
    client, which knows its own noise."""
    clip_quantile: float | None = Field(default=None, gt=0, lt=1)
    """For unit = "client": have the clip follow this quantile of the norms of clients' changes, from
    privacy.clip on (default: it stays). Andrew et al. 2021 take 0.5."""
    clip_learning_rate: float = Field(default=0.2, gt=0, le=1)
    """How fast it follows (Andrew et al. 2021: 0.2)."""
    clip_count_noise: float | None = Field(default=None, gt=0)
    """Standard deviation of the noise on the number of clients within the clip, which the noise on the
    sum pays for: above half the noise multiplier, with min_separation or max_participations above the
    whole (default: a twentieth of the clients expected in a round)."""
    mechanism: Mechanism = "independent"
    """For unit = "client": noise that is "independent" in each round, or correlated over
    rounds, of which less is left in the sum of all (DP-FTRL): by a binary "tree", or by a "banded" matrix
    factorisation, which leaves less than the tree in most plans."""
    min_separation: int | None = Field(default=None, ge=1)
    """For unit = "client": rounds from one in which a client takes part to its next at least. With it, or
    with another mechanism than "independent", clients are drawn so in place of by coins (default: clients
    / clients_per_round, rounded down)."""
    max_participations: int | None = Field(default=None, ge=1)
    """For unit = "client": rounds that a client takes part in at most, with the same draw (default: as
    many as min_separation leaves)."""
    bands: Annotated[int | None, Of("privacy.mechanism", ("banded",))] = Field(
        default=None, ge=1, le=MOST_BANDS
    )
    """Rounds that noise of "banded" reaches over; each but the first keeps as many numbers in memory as
    are sent (default: of up to 16 those with the least error)."""
    amplification: bool = False
    """For unit = "client" in simulations: count that each client is drawn by a secret coin (Poisson
    sampling), so that the same noise gives a smaller epsilon. The run folder then holds nothing that
    follows from who was drawn, and is written when the run is over; the records that name the clients of
    rounds are in FOLDER.private, which must not be handed out."""
    target_epsilon: float | None = Field(default=None, gt=0)
    """epsilon that the whole run may spend; the noise multiplier is solved for it."""
    accountant: Literal["auto", "pld", "rdp"] = "auto"
    """How epsilon is computed: privacy loss distributions, Renyi, or the first where it ends and else the
    second."""
    column: str | None = None
    """For unit = "row": rows with the same value in this column (a patient) are one unit."""
    units_per_pass: int = Field(default=1, ge=1, le=32)
    """For unit = "row": units that the model reads at a time. With 1 a unit's gradient is the same bits
    whoever else is in the batch. More are faster on accelerators and for short rows, where LoRA of linear
    layers is all that is trained; rounding then couples the units of a pass, which is not accounted."""
    seeded: bool = False
    """Whether noise is drawn from federation.seed: reproducible, therefore not private (for simulations
    alone)."""
    secure_aggregation: bool = False
    """Whether the server sees sums of updates and none of a single client."""
    sum_bits: Annotated[int, SUMMED] = Field(default=16, ge=LEAST_BITS, le=MOST_BITS)
    """Bits into which secure aggregation rounds a number of an update; a message needs so many, and those
    of the sum of the clients' weights, at most 32."""
    sum_bound: Annotated[float, SUMMED] = Field(default=1.0, gt=0)
    """Largest absolute value of a number in an update under secure aggregation; a larger one is cut off,
    and the share of these is in the record. A smaller bound makes smaller steps of rounding. With
    noise = "distributed" it is privacy.clip."""
    sum_rounding: Annotated[Literal["stochastic", "nearest"], SUMMED] = "stochastic"
    """How secure aggregation rounds: at random so that the mean is kept, or to the nearest step."""

    @model_validator(mode="before")
    @classmethod
    def _of_profile(cls, given: Any) -> Any:
        """Put the profile's settings below those that are given."""
        named = given.get("profile") if isinstance(given, Mapping) else None
        own = dict(PROFILES.get(named, {})) if isinstance(named, str) else {}
        if own and any(name in given for name in EITHER):
            own = {name: value for name, value in own.items() if name not in EITHER}
        return {**own, **given} if own else given

    @property
    def draws_in_steps(self) -> bool:
        """Whether clients' own steps have noise from a secret key."""
        return self.unit == "row" and not self.seeded

    @property
    def distributes(self) -> bool:
        """Whether clients add the noise that hides them, each a share."""
        return self.unit == "client" and self.noise == "distributed"

    @property
    def separates(self) -> bool:
        """Whether clients are drawn so that bounds on the rounds of each hold, in place of by coins."""
        return self.unit == "client" and (
            self.mechanism != "independent"
            or self.min_separation is not None
            or self.max_participations is not None
        )

    def _distributed(self) -> Iterator[str]:
        """Yield what does not go with noise that clients add."""
        what = 'privacy.noise = "distributed"'
        if self.unit != "client":
            yield (
                f'{what} goes with privacy.unit = "client" alone'
                + ': with "row" clients add the noise in their own steps' * (self.unit == "row")
            )
            return
        if not self.secure_aggregation:
            yield (
                f"{what}: each client adds a share of the noise, which hides nothing by itself: it needs "
                "privacy.secure_aggregation = true, so that sums alone are seen"
            )
        if self.mechanism != "independent":
            yield (
                f'{what}: privacy.mechanism = "{self.mechanism}" takes noise of earlier rounds back, and '
                "nobody knows that of all clients: leave mechanism out"
            )
        if self.clip_quantile is not None:
            yield (
                f"{what}: privacy.clip_quantile has the server count clients within the clip, which is a "
                "sum of its own without noise: leave clip_quantile out"
            )
        if self.accountant == "pld":
            yield (
                f'{what}: a sum of discrete Gaussians is bounded by Renyi divergence alone: use "rdp", '
                'or "auto", which does'
            )
        if self.amplification:
            yield f"{what}: whoever adds up masked answers knows whose they are: leave amplification out"
        if self.sum_bound not in (1.0, self.clip):  # the default is in the run folder's experiment
            yield (
                f"{what}: a number is at most privacy.clip = {self.clip:g}, by which all are rounded: "
                f"leave privacy.sum_bound = {self.sum_bound:g} out"
            )

    def contradictions(self) -> Iterator[str]:
        """Yield what in this section contradicts itself."""
        if self.secure_aggregation and self.unit == "client" and not self.distributes:
            yield (
                'privacy.secure_aggregation: with privacy.unit = "client" the server clips updates, and '
                "so has to see each: have clients clip and add the noise (privacy.noise = "
                '"distributed"), use privacy.unit = "row", or leave one of the two out'
            )
        if self.noise == "distributed":
            yield from self._distributed()
        if self.unit is None:
            for name in ("delta", "noise_multiplier", "target_epsilon", "column", "amplification"):
                if getattr(self, name) not in (None, False):
                    yield f'privacy.{name} is given and privacy.unit is not: give "client" or "row"'
            return
        if self.delta is None:
            yield "privacy.delta is missing: below 1 / number of units, 1e-5 for 10,000 rows or more"
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            yield "give one of privacy.noise_multiplier and privacy.target_epsilon: the other is solved"
        if self.amplification and self.unit == "row":
            yield (
                "privacy.amplification = true counts how clients are drawn, and goes with "
                'privacy.unit = "client" alone: leave it out; that rows are drawn is counted in any case'
            )
        elif self.amplification and self.separates:
            yield (
                "privacy.amplification = true needs clients that are drawn by coins: leave out "
                "privacy.mechanism, min_separation and max_participations, or amplification"
            )
        for name in ("clip_quantile", "clip_count_noise"):
            if getattr(self, name) is not None and self.unit != "client":
                yield f'privacy.{name} goes with privacy.unit = "client" alone'
        for name in ("mechanism", "min_separation", "max_participations"):
            if getattr(self, name) not in (None, "independent") and self.unit != "client":
                yield (
                    f"privacy.{name} is about the rounds of clients: it goes with "
                    'privacy.unit = "client" alone'
                )
        if self.clip_quantile is not None and self.mechanism != "independent":
            yield (
                f'privacy.clip_quantile: with privacy.mechanism = "{self.mechanism}" the noise of a '
                "round takes back that of others, and needs their clip: leave clip_quantile out"
            )
        if self.clip_count_noise is not None and self.clip_quantile is None:
            yield "privacy.clip_count_noise is read where privacy.clip_quantile is given: give both"
        if self.column is not None and self.unit != "row":
            yield 'privacy.column groups rows: it goes with privacy.unit = "row" alone'
        if self.units_per_pass > 1 and self.unit != "row":
            yield 'privacy.units_per_pass goes with privacy.unit = "row" alone'
