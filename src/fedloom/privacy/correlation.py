"""Noise that is correlated over rounds, and how far a client can move what is released. Pure.

Where nobody draws clients by coins, a client's rounds cannot be hidden in sampling, and independent noise
adds up over the rounds. DP-FTRL (Kairouz et al. 2021, https://arxiv.org/abs/2103.00039) has the noise of
a round take back a part of the noise of those before it. Let x_t be the sum of clipped changes in round
t, C a lower triangular matrix of non-negative numbers with ones on its diagonal, and z_t independent
noise of one standard deviation. Round t releases x_t + w_t with w = C^-1 z, which is computed from C x +
z alone: Gaussian noise on C x (Denisov et al. 2022, https://arxiv.org/abs/2202.08312, theorem 2.1;
changes may depend on earlier releases). A client moves C x by at most the sensitivity: the largest norm
of C u over the rounds in which it may take part, at least b rounds apart and at most k of them, with
|u_t| <= 1 in each (Choquette-Choo et al. 2023, https://arxiv.org/abs/2211.06530: for a C without negative
numbers that is where all changes point one way).

All is in steps of the grid of ``client_level.py``, in whole numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedloom.privacy.noise import Floats, Integers

SCALE_BITS = 12
"""Coefficients are multiples of 2^-12, so that all sums are of whole numbers."""

MOST_BANDS = 64
"""Bands that may be asked for; each but the first keeps the noise of one more round in memory."""

TRIED_BANDS = 16
"""Bands among which the number with the least error is looked for."""


@dataclass(frozen=True)
class Participation:
    """In which rounds a client may take part.

    Attributes:
        rounds: T, at least 1.
        separation: b, rounds from one to the next at least: 1 allows every round.
        most: k, rounds in all at most.
    """

    rounds: int
    separation: int
    most: int

    @classmethod
    def of(cls, rounds: int, separation: int, most: int | None) -> Participation:
        """Return that of T rounds, b, and k (default: as many as fit)."""
        fit = -(-rounds // separation)
        return cls(rounds, separation, fit if most is None else min(most, fit))

    def within(self, rounds: int) -> int:
        """Return the most rounds of one client among ``rounds`` that follow each other."""
        return min(self.most, -(-rounds // self.separation))


class Correlation(ABC):
    """A matrix C: how the noise of rounds is correlated.

    Attributes:
        participation: In which rounds a client may take part.
    """

    participation: Participation

    @property
    def coupled(self) -> bool:
        """Whether a round's noise depends on those before it."""
        return True

    @property
    def rounded(self) -> bool:
        """Whether parts of earlier noise are rounded to steps: a number then moves by one step more."""
        return False

    @abstractmethod
    def sensitivity(self, rounds: int) -> float:
        """Return how far a client moves C x of the first rounds, over the clip: from 1, or above it."""

    @abstractmethod
    def row(self, round: int) -> float:
        """Return how far a client moves one round of C x, over the clip."""

    @abstractmethod
    def next(self, round: int, drawn: Integers, earlier: MutableMapping[int, Integers]) -> Integers:
        """Return the noise w_t of a round.

        Args:
            round: t, from 1; each follows the one before.
            drawn: z_t, ``(d,)``.
            earlier: What the rounds before left here, and this one leaves for the next.
        """

    @abstractmethod
    def variances(self) -> tuple[Floats, Floats]:
        """Return the variances of w_t and of w_1 + ... + w_t over that of z, each ``(T,)``."""

    def total(self, rounds: Iterable[int]) -> float:
        """Return how far a client moves all that was released, over the clip.

        A round that was repeated with other answers, after a kill, is a release more: another row of C x
        with noise of its own.

        Args:
            rounds: Of each release.
        """
        counted = Counter(rounds)
        if not counted:
            return 0.0
        again = sum((n - 1) * self.row(round) ** 2 for round, n in counted.items())
        return math.sqrt(self.sensitivity(max(counted)) ** 2 + again)


@dataclass(frozen=True)
class Banded(Correlation):
    """C with 1, c_1, ..., c_{p-1} below each other in each column, and zero further down.

    c_j = binom(2j, j) / 4^j, cut down to multiples of 2^-12: the square root of the matrix of prefix
    sums, banded (Kalinin and Lampert 2024, "Banded Square Root Matrix Factorization",
    https://arxiv.org/abs/2405.13763). With one band noise is independent.

    Attributes:
        participation: In which rounds a client may take part.
        bands: p, from 1 to 64.
    """

    participation: Participation
    bands: int

    def __post_init__(self) -> None:
        """Check the number of bands.

        Raises:
            ValueError: It is out of range.
        """
        if not 1 <= self.bands <= MOST_BANDS:
            raise ValueError(f"bands must be from 1 to {MOST_BANDS}, got {self.bands}")

    @classmethod
    def best(cls, participation: Participation) -> Banded:
        """Return the one of up to 16 bands whose prefix sums have the least mean squared error.

        Errors are those at the same privacy: each times its sensitivity.
        """
        return _best(participation)

    @property
    def coupled(self) -> bool:
        """Whether there is more than one band."""
        return self.bands > 1

    @property
    def rounded(self) -> bool:
        """Whether there is more than one band."""
        return self.bands > 1

    @property
    def coefficients(self) -> Floats:
        """1, c_1, ..., c_{p-1}, ``(p,)``."""
        return _whole_coefficients(self.bands) / float(1 << SCALE_BITS)

    def sensitivity(self, rounds: int) -> float:
        """Return the norm of the sum of columns 1, 1 + b, 1 + 2b, ...: k of them at most.

        As coefficients fall and none is negative, no other rounds move more (theorem 2 of Kalinin and
        Lampert 2024).
        """
        return _banded_sensitivity(self, rounds)

    def row(self, round: int) -> float:
        """Return the largest sum of coefficients b apart, k of them at most."""
        own = self.participation
        return float(np.sum(self.coefficients[: round : own.separation][: own.most]))

    def next(self, round: int, drawn: Integers, earlier: MutableMapping[int, Integers]) -> Integers:
        """Return z_t - round(c_1 w_{t-1} + c_2 w_{t-2} + ...)."""
        whole = _whole_coefficients(self.bands)
        taken = np.zeros_like(drawn)
        for back in range(1, min(self.bands, round)):
            taken += whole[back] * earlier[round - back]
        half = 1 << (SCALE_BITS - 1)
        found: Integers = drawn - ((taken + half) >> SCALE_BITS)
        if self.bands > 1:
            earlier[round] = found
            earlier.pop(round - self.bands + 1, None)
        return found

    def variances(self) -> tuple[Floats, Floats]:
        """Return sums of squares of the power series 1 / c and of its prefix sums."""
        inverse = np.zeros(self.participation.rounds)
        lower = self.coefficients[1:]
        for t in range(len(inverse)):
            near = inverse[max(0, t - len(lower)) : t][::-1]
            inverse[t] = float(t == 0) - float(near @ lower[: len(near)])
        return np.cumsum(inverse**2), np.cumsum(np.cumsum(inverse) ** 2)


@dataclass(frozen=True)
class Tree(Correlation):
    """C with ones where round i is among the last lowbit(t) rounds up to t.

    Binary-tree aggregation (Dwork et al. 2010; Chan, Shi and Song 2011): each prefix sum is of at most
    log2(T) + 1 nodes, each of which has noise once. Of the tree only nodes are drawn of which a prefix
    sum is made, one a round; estimates of nodes from their children (Honaker 2015) are not used.

    Attributes:
        participation: In which rounds a client may take part.
    """

    participation: Participation

    def sensitivity(self, rounds: int) -> float:
        """Return a bound of sqrt(sum of n_v^2) over nodes v, in n_v rounds of which a client takes part.

        n_v^2 is at most n_v times the rounds that fit in v, so that each round of a client counts the
        most of each node that it is in; the largest sum of k of these, b rounds apart, is found exactly.
        For one round, or every round, the bound is reached.
        """
        return _tree_sensitivity(self, rounds)

    def row(self, round: int) -> float:
        """Return how many rounds of a client fit in the node that ends at ``round``."""
        return float(self.participation.within(round & -round))

    def next(self, round: int, drawn: Integers, earlier: MutableMapping[int, Integers]) -> Integers:
        """Return N_t - N_{t-1}, where N_t = z_t + N_{t - lowbit(t)} and N_0 = 0."""
        before = round - (round & -round)
        whole = drawn + earlier[before] if before else drawn
        found: Integers = whole - earlier[round - 1] if round > 1 else whole
        earlier[round] = whole
        needed, at = set[int](), round
        while at:
            needed.add(at)
            at -= at & -at
        for old in earlier.keys() - needed:
            del earlier[old]
        return found

    def variances(self) -> tuple[Floats, Floats]:
        """Return 1 + log2(lowbit(t)) and the number of ones of t in binary."""
        rounds = range(1, self.participation.rounds + 1)
        steps = [float((t & -t).bit_length()) for t in rounds]
        return np.array(steps), np.array([float(t.bit_count()) for t in rounds])


def most_of(weights: Floats, separation: int, most: int) -> float:
    """Return the largest sum of at most ``most`` weights, each at least ``separation`` places apart.

    Args:
        weights: ``(n,)``, none negative.
        separation: b, at least 1.
        most: k, at least 1.
    """
    counted = min(most, -(-len(weights) // separation))
    best = np.zeros(counted + 1)  # with at most 0, 1, ... of those so far
    before = deque([best] * separation, maxlen=separation)
    for weight in weights.tolist():
        taken = before[0][:-1] + weight
        best = np.concatenate([best[:1], np.maximum(best[1:], taken)])
        before.append(best)
    return float(best[-1])


@lru_cache(maxsize=1024)
def _banded_sensitivity(own: Banded, rounds: int) -> float:
    column, places = own.coefficients, own.participation
    added = np.zeros(rounds)
    for first in range(0, rounds, places.separation)[: places.most]:
        length = min(len(column), rounds - first)
        added[first : first + length] += column[:length]
    return float(np.linalg.norm(added))


@lru_cache(maxsize=1024)
def _tree_sensitivity(own: Tree, rounds: int) -> float:
    places, index = own.participation, np.arange(rounds)
    weights, size = np.zeros(rounds), 1
    while size <= rounds:
        block = index // size
        inside = (block % 2 == 0) & ((block + 1) * size <= rounds)
        weights += inside * float(places.within(size))
        size *= 2
    return math.sqrt(most_of(weights, places.separation, places.most))


@lru_cache(maxsize=64)
def _best(participation: Participation) -> Banded:
    def error(own: Banded) -> float:
        whole = own.sensitivity(participation.rounds)
        return float(np.mean(own.variances()[1])) * whole**2

    tried = range(1, min(TRIED_BANDS, participation.rounds) + 1)
    return min((Banded(participation, bands) for bands in tried), key=error)


@lru_cache(maxsize=MOST_BANDS)
def _whole_coefficients(bands: int) -> Integers:
    """Return floor(2^12 binom(2j, j) / 4^j) for j below ``bands``."""
    found = [(math.comb(2 * j, j) << SCALE_BITS) >> 2 * j for j in range(bands)]
    return np.array(found, np.int64)
