"""What releases with Gaussian noise cost together: epsilon at a delta, and the noise for an epsilon.

The authority is dp-accounting (the extra ``fedloom[privacy]``): privacy loss distributions (PLD: Koskela
et al. 2020, https://arxiv.org/abs/1906.03049) where they end, Renyi differential privacy (RDP: Mironov
2017, https://arxiv.org/abs/1702.07476) elsewhere. Opacus's PRV is PLD and its own error bound of 0.01
more; its GDP is the central limit theorem, which is no bound, and is not offered here.

All figures are for adding or removing one unit, with each unit drawn by its own coin of probability
``sampling`` (Poisson), or always there where that is 1. Without sampling the closed form of
:mod:`fedloom.privacy.gaussian` is the oracle. Noise on the integers with a standard deviation of 2^20
steps and more is accounted as continuous: the two differ far beyond what is printed.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from fedloom.errors import SettingsError
from fedloom.privacy.gaussian import noise_multiplier

Accountant = Literal["auto", "pld", "rdp"]

NEIGHBOURS = "add or remove one"
"""The relation of all figures here, as records name it."""

LARGEST_PLD_EPSILON = 50.0
"""epsilon by RDP above which PLD is not tried: its grid of 1e-4 grows with epsilon, and does not end."""

LEAST_PLD_NOISE = 0.2
"""Noise multiplier below which PLD is not tried: one release alone has a loss of 1 / z^2 and more."""

MOST_PLD_KINDS = 8
"""Different releases (noise, sampling) above which PLD is not tried: each costs a convolution."""

LEAST_NOISE, MOST_NOISE = 1e-2, 1e5
"""Noise multipliers among which one is looked for."""

PRECISION = 1e-4
"""Relative precision of a noise multiplier that was solved for."""


@dataclass(frozen=True)
class Releases:
    """Releases of one kind: Gaussian noise on a sum to which one unit adds at most the clip.

    Attributes:
        noise_multiplier: z, standard deviation of the noise over the clip; at least 0.
        sampling: q, probability that a unit takes part, in (0, 1]; 1 where nobody claims that who took
            part is secret.
        steps: How many, at least 0.
    """

    noise_multiplier: float
    sampling: float
    steps: int

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: One of them is not kept.
        """
        if not (self.noise_multiplier >= 0 and 0 < self.sampling <= 1 and self.steps >= 0):
            raise ValueError(f"no releases that can be accounted for: {self}")


@dataclass(frozen=True)
class Spent:
    """What releases cost.

    Attributes:
        epsilon: Infinite where there is no noise.
        accountant: Name and version of what computed it.
    """

    epsilon: float
    accountant: str


def epsilon(releases: Sequence[Releases], delta: float, accountant: Accountant = "auto") -> Spent:
    """Return the epsilon of all releases together.

    Args:
        releases: In any order; later ones may depend on earlier.
        delta: In (0, 1).
        accountant: "pld", "rdp", or "auto": PLD where it ends, RDP elsewhere.

    Raises:
        SettingsError: dp-accounting is missing, or PLD is asked for where it does not end.
    """
    counted: Counter[tuple[float, float]] = Counter()
    for own in releases:
        if own.steps:
            counted[own.noise_multiplier, own.sampling] += own.steps
    if not counted:
        return Spent(0.0, "none: nothing was released")
    if min(z for z, _ in counted) == 0:
        return Spent(math.inf, "none: without noise there is no bound")
    kinds = tuple(sorted(counted.items()))
    renyi = _epsilon(kinds, delta, "RDP")
    reason = _beyond_pld(counted, renyi.epsilon)
    if accountant == "rdp" or (accountant == "auto" and reason):
        return renyi
    if reason:
        raise SettingsError(
            [f'privacy.accountant = "pld": {reason}: use "rdp", or "auto", which does']
        )
    numeric = _epsilon(kinds, delta, "PLD")
    return min(renyi, numeric, key=lambda spent: spent.epsilon) if accountant == "auto" else numeric


def solve_noise_multiplier(
    target_epsilon: float,
    delta: float,
    sampling: float,
    steps: int,
    accountant: Accountant = "auto",
) -> float:
    """Return a noise multiplier whose epsilon is at most the target, the smallest to 4 digits.

    Args:
        target_epsilon: Above 0.
        delta: In (0, 1).
        sampling: As in :class:`Releases`.
        steps: Releases in all, at least 1.
        accountant: As for :func:`epsilon`.

    Raises:
        SettingsError: No noise up to 1e5 times the clip is enough.
    """

    def spent(z: float, of: Accountant = accountant) -> float:
        return epsilon([Releases(z, sampling, steps)], delta, of).epsilon

    if spent(MOST_NOISE, "rdp") > target_epsilon:
        raise SettingsError(
            [
                f"privacy.target_epsilon = {target_epsilon:g} with privacy.delta = {delta:g} cannot be "
                f"met in {steps} releases by noise up to {MOST_NOISE:g} times the clip"
            ]
        )
    if accountant == "rdp":
        return _least(lambda z: spent(z, "rdp"), target_epsilon)
    if sampling == 1:  # the closed form is the least that any accountant can ask for
        low, step = noise_multiplier(target_epsilon, delta, steps), PRECISION / 16
        while spent(low * (1 + step)) > target_epsilon:
            step *= 2
        return low * (1 + step)
    return _least(spent, target_epsilon)


def _least(spent: Callable[[float], float], target: float) -> float:
    """Return about the least noise multiplier that spends no more than ``target``.

    By regula falsi (Illinois) on log epsilon over log z, as an epsilon may take seconds.

    Args:
        spent: From a noise multiplier to its epsilon, which is at most the target for the largest.
        target: Above 0.
    """

    def beyond(x: float) -> float:
        return math.log(max(spent(math.exp(x)), 1e-300) / target)

    low = high = 0.0
    at_low = at_high = beyond(0.0)
    while at_high > 0:  # epsilon falls at least as 1 / z, and at most about as 1 / z^2
        low, at_low, high = high, at_high, high + max(0.05, at_high)
        at_high = beyond(high)
    while at_low <= 0 and low > math.log(LEAST_NOISE):
        high, at_high, low = low, at_low, low + min(-0.05, at_low / 2)
        at_low = beyond(low)
    if at_low <= 0:  # the least that is looked for is enough
        return math.exp(low)
    latest, weight_low, weight_high = 0, at_low, at_high
    while high - low > PRECISION and at_high < -PRECISION / 2:
        share = min(0.99, max(0.01, weight_low / (weight_low - weight_high)))
        middle = low + share * (high - low) + PRECISION / 4  # to the side that is enough
        if (found := beyond(middle)) <= 0:
            high, at_high, weight_high = middle, found, found
            weight_low = weight_low / 2 if latest < 0 else weight_low
            latest = -1
        else:
            low, weight_low = middle, found
            weight_high = weight_high / 2 if latest > 0 else weight_high
            latest = 1
    return math.exp(high)


def _beyond_pld(counted: Counter[tuple[float, float]], renyi: float) -> str:
    """Return why PLD is not tried, empty where it is."""
    least = min(z for z, _ in counted)
    if renyi > LARGEST_PLD_EPSILON:
        return f"epsilon is {renyi:.4g} by RDP, and above {LARGEST_PLD_EPSILON:g} PLD does not end"
    if least < LEAST_PLD_NOISE:
        return f"a noise multiplier is {least:.4g}, and below {LEAST_PLD_NOISE:g} PLD does not end"
    if len(counted) > MOST_PLD_KINDS:
        return f"there are {len(counted)} kinds of releases, PLD goes with {MOST_PLD_KINDS}"
    return ""


@lru_cache(maxsize=64)
def _epsilon(
    counted: tuple[tuple[tuple[float, float], int], ...], delta: float, kind: Literal["RDP", "PLD"]
) -> Spent:
    """Return the epsilon of so many steps of each noise multiplier and sampling, by one accountant."""
    library = _library()
    relation = library.NeighboringRelation.ADD_OR_REMOVE_ONE
    make = library.rdp.RdpAccountant if kind == "RDP" else library.pld.PLDAccountant
    accountant = make(neighboring_relation=relation)
    with _quiet():
        for (z, q), steps in counted:
            event: Any = library.GaussianDpEvent(z)
            accountant.compose(event if q == 1 else library.PoissonSampledDpEvent(q, event), steps)
        found = max(0.0, float(accountant.get_epsilon(delta)))
    return Spent(found, f"{kind}, dp-accounting {importlib.metadata.version('dp-accounting')}")


def _library() -> Any:
    """Return dp-accounting, which takes some seconds to import."""
    try:
        import dp_accounting
        import dp_accounting.pld
        import dp_accounting.rdp
    except ModuleNotFoundError as error:
        raise SettingsError(
            [f"privacy needs the package {error.name}: pip install 'fedloom[privacy]'"]
        ) from error
    return dp_accounting


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back its warnings that fractional orders do not converge: it goes on without them, soundly."""
    logger = logging.getLogger("absl")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled
