"""Noise that clients add themselves, each a share, before their changes are summed under masks. Pure.

Source: Kairouz, Liu and Steinke 2021, "The Distributed Discrete Gaussian Mechanism for Federated
Learning with Secure Aggregation", https://arxiv.org/abs/2102.06387, algorithms 1 and 2, theorem 1 and
proposition 14. Each client clips its change to C, rounds it to a grid of C / L at random on the
condition that the norm stays within a bound, and adds the discrete Gaussian of the variance sigma^2 to
each number. The sum of h of them is no discrete Gaussian. With D the bound of a rounded change's norm, in
steps, and d numbers it is (1/2) e^2-concentrated differentially private with

    e = min( sqrt(D^2 / (h sigma^2) + 2 tau d),  D / (sqrt(h) sigma) + tau sqrt(d) )
    tau = 10 sum_{k=1}^{h-1} exp(-2 pi^2 sigma^2 k / (k + 1))

which is what continuous Gaussian noise of the multiplier 1 / e costs by Renyi differential privacy. Here
sigma is solved for, so that e = 1 / z for the stated z. h are the clients whose noise is relied on: the
fewest that a sum can be of, by the threshold that each client insists on, less those that may tell others
their noise. So drop-out never leaves less noise than is stated; who answers beyond h adds more.

Left out of the paper: the rotation that makes numbers alike in size, and the modulus that sums may wrap
around in. Both save bits; here the modulus has room for every change and for 12 standard deviations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedloom.privacy.noise import Floats, Integers, NoiseStream
from fedloom.privacy.secure_aggregation.graph import LEAST, threshold_of
from fedloom.privacy.secure_aggregation.masks import Words
from fedloom.privacy.secure_aggregation.quantisation import WIDEST

BIAS = math.exp(-0.5)
"""beta of the paper: the share of roundings that may be drawn again, which is what biases them."""

TRIES = 64
"""Roundings that are drawn at most; each is within the bound with a chance of 1 - beta at least."""

TAIL = 12.0
"""Standard deviations of the sum's noise that the modulus has room for. The discrete Gaussian is
subgaussian: one of 2^40 numbers is beyond with a chance below 2^-62, and then wrong, but no less
private."""

LEAST_DEVIATION = 0.5
"""Standard deviation of a client's noise, in steps, from which the bound holds."""


def least_survivors(asked: int) -> int:
    """Return the fewest clients of a sum for which ``asked`` were asked: more than half, 3 at least."""
    return max(LEAST, threshold_of(asked))


def concentrated(norm: float, deviation: float, honest: int, numbers: int) -> float:
    """Return e for which a sum is (1/2) e^2-concentrated differentially private (see above).

    Args:
        norm: D, largest Euclidean norm of what one client adds, in steps.
        deviation: sigma of one client's noise, in steps, at least 1/2.
        honest: h, clients whose noise nobody knows, at least 1.
        numbers: d.

    Raises:
        ValueError: A number is out of its range.
    """
    if not (norm > 0 and deviation >= LEAST_DEVIATION and honest >= 1 and numbers >= 1):
        raise ValueError(
            f"no noise that can be accounted for: {norm}, {deviation}, {honest}, {numbers}"
        )
    scale = -2 * math.pi**2 * deviation**2
    tau = 10 * sum(math.exp(scale * k / (k + 1)) for k in range(1, honest))
    plain = norm / (math.sqrt(honest) * deviation)
    return min(math.sqrt(plain**2 + 2 * tau * numbers), plain + tau * math.sqrt(numbers))


def rounded_norm(norm: float, numbers: int, *, stochastic: bool = True) -> float:
    """Return the largest norm of a vector of whole numbers that is kept of a rounding.

    Args:
        norm: Of the vector before, in steps.
        numbers: d.
        stochastic: Whether it is rounded at random (theorem 1, with beta), or to the nearest step, which
            moves each number by a half at most.
    """
    if not stochastic:
        return norm + math.sqrt(numbers) / 2
    likely = norm**2 + numbers / 4
    likely += math.sqrt(2 * math.log(1 / BIAS)) * (norm + math.sqrt(numbers) / 2)
    return min(norm + math.sqrt(numbers), math.sqrt(likely))


@dataclass(frozen=True)
class NoiseShares:
    """What the clients of one sum add, all by the same numbers.

    Attributes:
        multiplier: z, standard deviation of the noise that is relied on, over what one client can add;
            0 adds none.
        clip: C, largest norm of a change.
        colluding: Clients of a sum that may tell others their noise.
        bits: b of a number; C has L = 2^(b-1) - 1 steps.
        clients: Clients that were asked.
        numbers: d, of a change; without any nothing is released, and nobody adds noise.
        stochastic: Whether changes are rounded at random.
    """

    multiplier: float
    clip: float
    colluding: int
    bits: int
    clients: int
    numbers: int
    stochastic: bool = True

    @property
    def half(self) -> int:
        """L, steps of the clip."""
        return int(2 ** (self.bits - 1) - 1)

    @property
    def least(self) -> int:
        """The fewest clients of the sum: with fewer nothing is revealed."""
        return least_survivors(self.clients)

    @property
    def honest(self) -> int:
        """h, clients whose noise is relied on.

        Raises:
            ValueError: There are none.
        """
        found = self.least - self.colluding
        if found < 1:
            raise ValueError(
                f"privacy.colluding = {self.colluding}: {self.least} of {self.clients} clients may be "
                "all that are left of a sum, and each of these might tell its noise"
            )
        return found

    @property
    def all_there(self) -> float:
        """The noise of a sum from which nobody dropped out, over the noise that is relied on."""
        return math.sqrt(self.clients / self.honest)

    @cached_property
    def norm(self) -> float:
        """D, the largest norm of a rounded change, in steps."""
        return rounded_norm(self.half, self.numbers, stochastic=self.stochastic)

    @cached_property
    def deviation(self) -> float:
        """Sigma of one client's noise, in steps: the least, to 1e-9, that keeps to 1 / z."""
        if not (self.multiplier and self.numbers):
            return 0.0
        bound, honest = 1 / self.multiplier, self.honest
        low = high = max(LEAST_DEVIATION, self.norm / (bound * math.sqrt(honest)))
        step = 1e-12

        def enough(deviation: float) -> bool:
            return concentrated(self.norm, deviation, honest, self.numbers) <= bound

        while not enough(high):
            low, high, step = high, high * (1 + step), min(1.0, 1024 * step)
        while high - low > 1e-9 * high:
            middle = (low + high) / 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high

    def counted(self, survivors: int) -> float:
        """Return the multiplier of the noise in a sum, z where no more are left than are relied on.

        Args:
            survivors: Clients in the sum, those that may tell their noise among them.
        """
        if not self.multiplier:
            return 0.0
        honest = survivors - self.colluding
        return 1 / concentrated(self.norm, self.deviation, honest, self.numbers)

    @property
    def largest(self) -> int:
        """The largest absolute value that a number of the sum is taken for."""
        noise = TAIL * self.deviation * math.sqrt(self.clients)
        return self.clients * (self.half + 1) + math.ceil(noise)

    @property
    def width(self) -> int:
        """Bits of the modulus, which has room for both signs of that.

        Raises:
            ValueError: It has not.
        """
        found = (2 * self.largest).bit_length()
        if found > WIDEST:
            raise ValueError(
                f"privacy.sum_bits = {self.bits}: the changes of {self.clients} clients with noise of "
                f"the multiplier {self.multiplier:.4g} take {found} bits a number, and {WIDEST} are the "
                f"most: give {self.bits - (found - WIDEST)} or fewer, or less noise"
            )
        return found

    def rounded(self, change: Floats, rng: np.random.Generator | None) -> Integers:
        """Return a client's change, clipped and in whole steps, of a norm of :attr:`norm` at most.

        One that holds NaN or infinity is zero: that it was one would tell of its rows.

        Args:
            change: ``(d,)``, all tensors after each other.
            rng: Rounds at random; ``None``: to the nearest step.
        """
        longest = float(np.max(np.abs(change), initial=0.0))
        if not math.isfinite(longest) or longest == 0:
            return np.zeros(len(change), np.int64)
        norm = longest * math.sqrt(float(np.sum((change / longest) ** 2)))
        scaled = change * (self.half / max(norm, self.clip))
        most = self.norm**2
        for _ in range(TRIES if rng is not None else 1):
            drawn = np.rint(scaled) if rng is None else np.floor(scaled + rng.random(len(scaled)))
            if float(np.sum(drawn * drawn)) <= most:
                return drawn.astype(np.int64)
        return np.trunc(scaled).astype(np.int64)  # never longer than before

    def words(self, steps: Integers, noise: NoiseStream) -> Words:
        """Return whole steps with noise, modulo 2^32."""
        noisy = steps + noise.discrete_gaussian(self.deviation, len(steps))
        return noisy.astype(np.uint32)

    def sums(self, words: Words) -> Integers:
        """Return the signed numbers of a sum modulo 2^width."""
        width = self.width
        found = words.astype(np.int64)
        return np.where(found >> (width - 1) & 1, found - (1 << width), found)

    def change(self, sums: Integers, denominator: float) -> Floats:
        """Return the sum of changes over the number of clients that is expected."""
        return np.asarray(sums * (self.clip / self.half / denominator), np.float64)
