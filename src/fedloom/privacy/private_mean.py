"""The mean of clients' changes under client-level privacy, as a run's server takes it in each round.

It puts together the clipped sum (``client_level.py``), the noise (``noise.py``) and the ledger
(``ledger.py``). It knows no messages and no methods: tensors in, tensors out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedloom.errors import PluginError, PrivacyError, SettingsError
from fedloom.privacy.accounting import (
    Accountant,
    Releases,
    Spent,
    epsilon,
    solve_noise_multiplier,
)
from fedloom.privacy.client_level import ClippedSum, next_clip, update_multiplier
from fedloom.privacy.ledger import PrivacyLedger
from fedloom.privacy.noise import NoiseSource
from fedloom.privacy.settings import PrivacySettings
from fedloom.tensors import Tensors

SERVER = -1
"""The party of noise that the server draws."""


@dataclass(frozen=True)
class ClientLevelPlan:
    """The numbers of the mechanism, known before the first round and told to everybody.

    Attributes:
        noise_multiplier: z of a round: of the noisy sum and the noisy number of clients together.
        clip: C of the first round.
        rate: q, the probability with which each member is drawn.
        sampling: q that is accounted: 1, as those who see the server's records see who took part.
        members: N.
        rounds: Releases that are planned, one a round.
        delta: Of the statement.
        target_epsilon: What may be spent, where that is bounded.
        accountant: Which is asked.
        quantile: Share of the changes that the clip is to leave as they are, where it follows one.
        clip_rate: How fast it follows.
        count_noise: sigma_b, noise on the number of clients within the clip.
    """

    noise_multiplier: float
    clip: float
    rate: float
    sampling: float
    members: int
    rounds: int
    delta: float
    target_epsilon: float | None
    accountant: Accountant
    quantile: float | None
    clip_rate: float
    count_noise: float

    @classmethod
    def of(
        cls, settings: PrivacySettings, members: int, cohort: int, rounds: int
    ) -> ClientLevelPlan:
        """Return the plan of an experiment.

        Args:
            settings: With ``unit = "client"``.
            members: N.
            cohort: Clients that are expected in a round.
            rounds: T.

        Raises:
            SettingsError: The budget cannot be met, or the noise on the number of clients is too little.
        """
        assert settings.delta is not None, "the section asks for it with a unit"
        z, sampling = settings.noise_multiplier, 1.0
        if z is None:
            assert settings.target_epsilon is not None, "one of both is given"
            z = solve_noise_multiplier(
                settings.target_epsilon, settings.delta, sampling, rounds, settings.accountant
            )
        plan = cls(
            z,
            settings.clip,
            min(1.0, cohort / members),
            sampling,
            members,
            rounds,
            settings.delta,
            settings.target_epsilon,
            settings.accountant,
            settings.clip_quantile,
            settings.clip_learning_rate,
            settings.clip_count_noise or cohort / 20,
        )
        try:
            plan.sum_multiplier  # noqa: B018
        except ValueError as error:
            default = " (not given: a twentieth of the clients expected)"
            raise SettingsError(
                [f"{error}{default * (settings.clip_count_noise is None)}"]
            ) from error
        return plan

    @property
    def expected(self) -> float:
        """The number of clients that is expected in a round, q N: the denominator of every mean."""
        return self.rate * self.members

    @property
    def sum_multiplier(self) -> float:
        """The noise multiplier of the sum alone."""
        if self.quantile is None:
            return self.noise_multiplier
        return update_multiplier(self.noise_multiplier, self.count_noise)

    @property
    def promised(self) -> Spent:
        """What all planned rounds cost."""
        planned = [Releases(self.noise_multiplier, self.sampling, self.rounds)]
        return epsilon(planned, self.delta, self.accountant)

    def require_budget(self, releases: list[Releases]) -> None:
        """Check that releases are within the budget.

        Raises:
            PrivacyError: They are not; nothing of the last one was drawn.
        """
        if self.target_epsilon is None:
            return
        planned = Releases(self.noise_multiplier, self.sampling, 1)
        if len(releases) <= self.rounds and all(own == planned for own in releases):
            return  # the noise was solved for these
        spent = epsilon(releases, self.delta, self.accountant).epsilon
        if spent > self.target_epsilon:
            raise PrivacyError(
                f"the next release would bring epsilon to {spent:.4g}, and privacy.target_epsilon is "
                f"{self.target_epsilon:g}: rounds were repeated with other answers, each of which costs "
                "as a release of its own. Nothing more is released; start a new run with a larger budget"
            )


class PrivateMean:
    """Clips, adds, spends, adds noise: the only way from clients' answers to the server's state.

    Attributes:
        plan: The numbers of the mechanism.
        clip: C_t of the next release.
        latest: The round of the latest release.
        ledger: What was spent.
    """

    def __init__(self, plan: ClientLevelPlan, source: NoiseSource, ledger: PrivacyLedger) -> None:
        """Begin with the clip of the first round."""
        self.plan, self._source, self.ledger = plan, source, ledger
        self.clip, self.latest = plan.clip, 0

    def mean(self, updates: Iterable[Tensors], start: Tensors, round: int) -> Tensors:
        """Return start + (clipped sum of changes + noise) / (q N).

        Args:
            updates: What clients sent back for ``start``; perhaps of none.
            start: What they were sent.
            round: From 1.

        Raises:
            PrivacyError: The budget would be passed.
            OutputError: The ledger cannot be written.
        """
        plan = self.plan
        total = ClippedSum.empty(start, self.clip)
        for update in updates:
            total.add(update)
        digest = self._source.digest(total.content())
        self.ledger.spend(round, plan.noise_multiplier, plan.sampling, digest, plan.require_budget)
        noise = self._source.stream("sum of changes", round, SERVER, digest)
        found = total.noised_mean(plan.sum_multiplier, plan.expected, noise)
        if plan.quantile is not None:
            noise = self._source.stream("number within the clip", round, SERVER, digest)
            share = total.noised_share(plan.count_noise, plan.expected, noise)
            self.clip = next_clip(self.clip, share, plan.quantile, plan.clip_rate)
        self.latest = round
        return found

    def require_released(self, round: int) -> None:
        """Check that the state of a round came of :meth:`mean`, before it is sent to anybody.

        Raises:
            PluginError: It did not.
        """
        if self.latest != round:
            raise PluginError(
                f'privacy.unit = "client": round {round} made a state without Method.averaged, where '
                "changes are clipped and get their noise: the method declares client_privacy and must "
                "take its means there"
            )

    def spent(self) -> Spent:
        """Return what the ledger says was spent."""
        return epsilon(self.ledger.releases, self.plan.delta, self.plan.accountant)

    def saved(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it, as plain JSON: numbers that were released."""
        return {"clip": self.clip, "ledger": self.ledger.position}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint keeps.

        Raises:
            PrivacyError: The ledger does not hold what the checkpoint counts.
        """
        self.ledger.require(saved["ledger"])
        self.clip = float(saved["clip"])
