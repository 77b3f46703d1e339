"""The mean of clients' changes under client-level privacy, as a run's server takes it in each round.

It puts together the clipped sum (``client_level.py``), the noise (``noise.py``) and the ledger
(``ledger.py``). It knows no messages and no methods: tensors in, tensors out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedloom.errors import PluginError, PrivacyError, SettingsError
from fedloom.privacy.accounting import (
    NEIGHBOURS,
    Accountant,
    Releases,
    Spent,
    epsilon,
    solve_noise_multiplier,
)
from fedloom.privacy.client_level import GRID, ClippedSum, next_clip, update_multiplier
from fedloom.privacy.correlation import Banded, Correlation, Participation, Tree
from fedloom.privacy.distributed_noise import NoiseShares
from fedloom.privacy.ledger import Entries, PrivacyLedger
from fedloom.privacy.noise import Floats, Integers, NoiseSource
from fedloom.privacy.noise_chain import NoiseChain
from fedloom.privacy.participations import Participations
from fedloom.privacy.settings import Mechanism, PrivacySettings
from fedloom.tensors import Tensors
from fedloom.wire.messages import AddedNoise

SERVER = -1
"""The party of noise that the server draws."""

ZERO_OUT = "one with all its changes zero"
"""The relation of draws of fixed size ("zero-out": Kairouz et al. 2021), as records name it."""

MOST_BANDED_NOISE = 1000.0
"""Noise multiplier up to which whole numbers of banded noise fit in 64 bits, by more than 100 standard
deviations."""

MOST_REPEATED = 16
"""Releases for each planned round that banded noise is large enough for; see ``deviation``."""


@dataclass(frozen=True)
class ClientLevelPlan:
    """The numbers of the mechanism, known before the first round and told to everybody.

    Attributes:
        noise_multiplier: z of a round: of the noisy sum and the noisy number of clients together.
        clip: C of the first round.
        rate: q, the probability with which each member is drawn.
        sampling: q that is accounted: the rate where who was drawn is kept secret (``amplification``),
            else 1, as those who see the server's records see who took part.
        members: N.
        rounds: Releases that are planned, one a round.
        delta: Of the statement.
        target_epsilon: What may be spent, where that is bounded.
        accountant: Which is asked.
        quantile: Share of the changes that the clip is to leave as they are, where it follows one.
        clip_rate: How fast it follows.
        count_noise: sigma_b, noise on the number of clients within the clip.
        mechanism: How the noise of rounds is correlated, by its name.
        correlation: The same, with the rounds of a client, where these are bounded by the draw; ``None``
            where clients are drawn by coins.
        shares: What each client adds of a round in which all that are drawn are there, for a change of
            one number, where clients add the noise; ``None`` where the server does.
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
    mechanism: Mechanism = "independent"
    correlation: Correlation | None = None
    shares: NoiseShares | None = None

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
        rate = min(1.0, cohort / members)
        sampling = rate if settings.amplification else 1.0
        correlation = _correlation(settings, members, cohort, rounds)
        accountant: Accountant = "rdp" if settings.distributes else settings.accountant
        z = _multiplier(settings, sampling, rounds, correlation, accountant)
        if correlation is not None and correlation.rounded and z > MOST_BANDED_NOISE:
            raise SettingsError(
                [
                    f'privacy.mechanism = "banded" with a noise multiplier of {z:.4g}: above '
                    f'{MOST_BANDED_NOISE:g} its whole numbers could overflow; use "tree", or less noise'
                ]
            )
        plan = cls(
            z,
            settings.clip,
            rate,
            sampling,
            members,
            rounds,
            settings.delta,
            settings.target_epsilon,
            accountant,
            settings.clip_quantile,
            settings.clip_learning_rate,
            settings.clip_count_noise or cohort / 20,
            settings.mechanism,
            correlation,
            _shares(settings, z, cohort),
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
        moved = 0.5 if self.correlation is None else 1.0  # by the relation, see ``neighbours``
        return update_multiplier(self.noise_multiplier, self.count_noise, moved)

    @property
    def promised(self) -> Spent:
        """What all planned rounds cost."""
        return epsilon(self._planned, self.delta, self.accountant)

    @property
    def _planned(self) -> list[Releases]:
        if self.correlation is None:
            return [Releases(self.noise_multiplier, self.sampling, self.rounds)]
        return self._together(range(1, self.rounds + 1), self.noise_multiplier)

    def _together(self, rounds: Iterable[int], z: float) -> list[Releases]:
        """Return releases of rounds as one with Gaussian noise."""
        assert self.correlation is not None, "asked for where the draw bounds a client's rounds"
        moved = self.correlation.total(rounds)
        return [Releases(z / moved, self.sampling, 1)] if moved else []

    @property
    def compose(self) -> Callable[[Entries], list[Releases]] | None:
        """How the ledger's lines are accounted; ``None`` for each by itself."""
        return None if self.correlation is None else self._composed

    def _composed(self, entries: Entries) -> list[Releases]:
        least = min((entry["noise_multiplier"] for entry in entries), default=0.0)
        return self._together((entry["round"] for entry in entries), least)

    @property
    def neighbours(self) -> str:
        """The relation of the statement, as records name it.

        Where a draw of fixed size bounds a client's rounds, another would be drawn in the place of one
        that is not there. The client's changes are hidden, and not that it was drawn. A change of zero
        is within the clip and counts as +1/2, where another may count as -1/2. Where clients add the
        noise, the server sees who does.
        """
        return NEIGHBOURS if self.correlation is None and self.shares is None else ZERO_OUT

    @property
    def added_noise(self) -> AddedNoise:
        """What clients add themselves.

        Raises:
            ValueError: The server adds the noise.
        """
        if self.shares is None:
            raise ValueError("the server adds the noise")
        return AddedNoise(self.noise_multiplier, self.clip, self.shares.colluding)

    @property
    def facts(self) -> dict[str, Any]:
        """What records and the ledger say of who adds noise, and of draws that bound rounds."""
        return {**self._of_shares, **self._of_draws}

    @property
    def _of_shares(self) -> dict[str, Any]:
        own = self.shares
        if own is None:
            return {}
        return {
            "noise": "distributed",
            "colluding": own.colluding,
            "asked": own.clients,
            "least": own.least,
            "relied_on": own.honest,
        }

    @property
    def _of_draws(self) -> dict[str, Any]:
        own = self.correlation
        if own is None:
            return {}
        places = own.participation
        found: dict[str, Any] = {
            "mechanism": self.mechanism,
            "min_separation": places.separation,
            "max_participations": places.most,
            "planned_rounds": places.rounds,
            "sensitivity": own.sensitivity(places.rounds),
        }
        return {**found, "bands": own.bands} if isinstance(own, Banded) else found

    def deviation(self, numbers: int) -> float:
        """Return the standard deviation of a round's own noise, in steps of the grid.

        Where parts of earlier noise are rounded, a client moves each number of each release by less than
        a step more, and all of them by sqrt(releases numbers) steps; the noise is as much larger.

        Args:
            numbers: d, of a client's change.
        """
        steps = self.sum_multiplier * GRID
        if self.correlation is None or not self.correlation.rounded:
            return steps
        return steps * (1 + math.sqrt(MOST_REPEATED * self.rounds * numbers) / GRID)

    @property
    def noise_of_rounds(self) -> tuple[float, float]:
        """Standard deviations over z C of the noise that rounds add, and that the sum of all has.

        The first is the root of the mean square over all rounds. Where clients add the noise, both are of
        rounds in which nobody drops out.
        """
        more = self.shares.all_there if self.shares is not None else 1.0
        if self.correlation is None:
            return more, more * math.sqrt(self.rounds)
        single, whole = self.correlation.variances()
        return more * math.sqrt(float(single.mean())), more * math.sqrt(float(whole[-1]))

    def require_room(self, numbers: int) -> None:
        """Check that what clients are to add fits, for changes of so many numbers.

        Raises:
            SettingsError: It does not, or nobody's noise is relied on.
        """
        if self.shares is None:
            return
        own = replace(self.shares, numbers=max(1, numbers))
        try:
            own.width  # noqa: B018
        except ValueError as error:
            raise SettingsError([str(error)]) from error

    def _as_planned(self, releases: list[Releases]) -> bool:
        """Return whether releases cost no more than those that are planned, without an accountant."""
        if self.correlation is not None:
            least = self._planned[0].noise_multiplier
            return all(own.noise_multiplier >= least for own in releases)
        planned = Releases(self.noise_multiplier, self.sampling, 1)
        return len(releases) <= self.rounds and all(own == planned for own in releases)

    def require_budget(self, releases: list[Releases]) -> None:
        """Check that releases are within the budget.

        Raises:
            PrivacyError: They are not; nothing of the last one was drawn.
        """
        if self.target_epsilon is None:
            return
        if self._as_planned(releases):
            return  # the noise was solved for these
        spent = epsilon(releases, self.delta, self.accountant).epsilon
        if spent > self.target_epsilon:
            raise PrivacyError(
                f"the next release would bring epsilon to {spent:.4g}, and privacy.target_epsilon is "
                f"{self.target_epsilon:g}: rounds were repeated with other answers, each of which costs "
                "as a release of its own. Nothing more is released; start a new run with a larger budget"
            )


def participation_of(
    settings: PrivacySettings, members: int, cohort: int, rounds: int
) -> Participation:
    """Return in which rounds a client may take part, where the draw bounds that.

    Args:
        settings: With ``separates``.
        members: N.
        cohort: Clients that are drawn for a round.
        rounds: T.
    """
    separation = settings.min_separation or max(1, members // cohort)
    return Participation.of(rounds, separation, settings.max_participations)


def _shares(settings: PrivacySettings, z: float, cohort: int) -> NoiseShares | None:
    """Return what each client of a round adds, where clients add the noise."""
    if not settings.distributes:
        return None
    nearest = settings.sum_rounding == "nearest"
    own = (settings.clip, settings.colluding, settings.sum_bits, cohort)
    return NoiseShares(z, *own, numbers=1, stochastic=not nearest)


def _multiplier(
    settings: PrivacySettings,
    sampling: float,
    rounds: int,
    correlation: Correlation | None,
    accountant: Accountant,
) -> float:
    """Return the noise multiplier that is given, or solved for the target.

    Raises:
        SettingsError: The budget cannot be met.
    """
    if settings.noise_multiplier is not None:
        return settings.noise_multiplier
    assert settings.target_epsilon is not None, "one of both is given"
    assert settings.delta is not None, "the section asks for it with a unit"
    moved, releases = 1.0, rounds
    if correlation is not None:
        moved, releases = correlation.sensitivity(rounds), 1
    return moved * solve_noise_multiplier(
        settings.target_epsilon, settings.delta, sampling, releases, accountant
    )


def _correlation(
    settings: PrivacySettings, members: int, cohort: int, rounds: int
) -> Correlation | None:
    """Return how noise of rounds is correlated, where the draw bounds a client's rounds."""
    if not settings.separates:
        return None
    participation = participation_of(settings, members, cohort, rounds)
    if settings.mechanism == "tree":
        return Tree(participation)
    if settings.mechanism == "banded":
        bands = settings.bands
        return Banded(participation, min(bands, rounds)) if bands else Banded.best(participation)
    return Banded(participation, 1)


class AccountedMean:
    """A mean under client-level privacy, and what its releases have spent, whoever adds the noise.

    Attributes:
        plan: The numbers of the mechanism.
        clip: C_t of the next release.
        latest: The round of the latest release.
        ledger: What was spent.
    """

    def __init__(self, plan: ClientLevelPlan, ledger: PrivacyLedger) -> None:
        """Begin with the clip of the first round."""
        self.plan, self.ledger = plan, ledger
        self.clip, self.latest = plan.clip, 0
        own = plan.correlation
        self._taken = Participations(own.participation) if own is not None else None

    def require_released(self, round: int) -> None:
        """Check that the state of a round came of a release, before it is sent to anybody.

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
        found = {"clip": self.clip, "ledger": self.ledger.position}
        if self._taken is not None:
            found["participations"] = self._taken.saved()
        return found

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint keeps.

        Raises:
            PrivacyError: The ledger does not hold what the checkpoint counts.
        """
        self.ledger.require(saved["ledger"])
        self.clip = float(saved["clip"])
        if self._taken is not None:
            self._taken.restore(saved["participations"])


class PrivateMean(AccountedMean):
    """Clips, adds, spends, adds noise: the server's way from clients' answers to its state."""

    def __init__(self, plan: ClientLevelPlan, source: NoiseSource, ledger: PrivacyLedger) -> None:
        """Take where the server's noise comes from."""
        super().__init__(plan, ledger)
        self._source, own = source, plan.correlation
        self._chain = NoiseChain(own, self._drawn) if own is not None and own.coupled else None

    def _drawn(self, round: int, digest: bytes, total: ClippedSum) -> dict[str, Integers]:
        """Return a round's own noise, for a release with a hash and a sum of such shapes, in steps."""
        noise = self._source.stream("sum of changes", round, SERVER, digest)
        return total.drawn(self.plan.deviation(total.numbers), noise)

    def mean(
        self, updates: Iterable[Tensors], start: Tensors, round: int, clients: Collection[int]
    ) -> Tensors:
        """Return start + (clipped sum of changes + noise) / (q N).

        Args:
            updates: What clients sent back for ``start``; perhaps of none.
            start: What they were sent.
            round: From 1.
            clients: Whose updates they are, one of each.

        Raises:
            PluginError: A client's rounds are bounded, and updates are not one for each client.
            PrivacyError: The budget would be passed, or a client took part more often than is accounted.
            OutputError: The ledger cannot be written.
        """
        plan, total, chain = self.plan, ClippedSum.empty(start, self.clip), self._chain
        count = 0
        for update in updates:
            total.add(update)
            count += 1
        if self._taken is not None:
            if count != len(clients):
                raise PluginError(
                    f"round {round}: the private mean got {count} updates of {len(clients)} clients: it "
                    "counts in how many rounds each client takes part, and needs one update of each. "
                    "Nothing of the round is released; a method has to name whose updates they are"
                )
            self._taken.take(clients, round)
        if chain is None:
            digest = self._source.digest(total.content())
        else:
            chain.require(round, total)
            self._require_few()
            digest = self._source.digest([*chain.content(), *total.content()])
        self.ledger.spend(round, plan.noise_multiplier, plan.sampling, digest, plan.require_budget)
        draw = self._drawn if chain is None else chain.next
        drawn = draw(round, digest, total)
        found = total.moved(drawn, plan.expected)
        if plan.quantile is not None:
            noise = self._source.stream("number within the clip", round, SERVER, digest)
            share = total.noised_share(plan.count_noise, plan.expected, noise)
            self.clip = next_clip(self.clip, share, plan.quantile, plan.clip_rate)
        self.latest = round
        return found

    def coins(self, round: int, n: int) -> Floats:
        """Return the secret coins by which the clients of a round are drawn.

        They follow from the noise's key and the round alone, so that a round which is played again has
        the cohort that it had.

        Args:
            round: From 1.
            n: How many.

        Returns:
            Uniform multiples of 2^-53 in [0, 1), shape ``(n,)``.
        """
        return self._source.stream("cohort", round, SERVER).uniform(n)

    def _require_few(self) -> None:
        """Check that there are not more releases than a round's own noise is large enough for.

        Raises:
            PrivacyError: There are.
        """
        if len(self.ledger.entries) >= MOST_REPEATED * self.plan.rounds:
            raise PrivacyError(
                f"{self.ledger.path} has {MOST_REPEATED} times the releases that were planned: rounds "
                "were repeated with other answers too often; start a new run"
            )

    def saved(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it, as plain JSON: numbers that were released."""
        found = super().saved()
        return found if self._chain is None else {**found, "chain": self._chain.saved()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint keeps.

        Raises:
            PrivacyError: The ledger does not hold what the checkpoint counts.
        """
        super().restore(saved)
        if self._chain is not None:
            self._chain.restore(saved["chain"], self.ledger)
