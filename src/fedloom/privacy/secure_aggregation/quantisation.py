"""Numbers as integers whose weighted sum cannot overflow, and back.

A value x in [-c, c] becomes L + x L / c with L = 2^(b-1) - 1, rounded: an integer from 0 to 2 L, b bits;
0 is exact. Each client multiplies its integers by its weight w, 1 to W. A sum over n clients is then at
most n W 2 L, which is below the modulus 2^k by the choice of k, and k is at most 32: checked, not hoped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedloom.errors import MessageError
from fedloom.privacy.secure_aggregation.masks import Words

WIDEST = 32
"""Bits of the largest modulus."""

LEAST_BITS, MOST_BITS = 8, 24
"""Of a value; those of a float32's mantissa are the most that say more."""

_BLOCK = 1 << 18
"""Values that are rounded at a time."""

_FRACTION, _WHOLE = 16, 23
"""Binary places of a reported number after and before the point; it is cut at +-2^22."""


@dataclass(frozen=True)
class Grid:
    """How the values of all clients become integers; all must have the same.

    Attributes:
        bits: b, of a value.
        bound: c, its largest absolute value; what is beyond is cut off.
        clients: n, the most that are summed.
        rows: Rows of the largest client that counts; a larger one weighs as this.
    """

    bits: int
    bound: float
    clients: int
    rows: int = 1

    @property
    def half(self) -> int:
        """L, the integer of 0."""
        return int(2 ** (self.bits - 1) - 1)

    @property
    def heaviest(self) -> int:
        """W: weights are rows, or so many steps of them as the modulus has room for.

        Raises:
            ValueError: Not even weights of 1 fit.
        """
        room = int((2**WIDEST - 1) // (self.clients * 2 * self.half))
        if room < 1:
            raise ValueError(f"{self.clients} values of {self.bits} bits do not fit {WIDEST} bits")
        return min(self.rows, room)

    @property
    def width(self) -> int:
        """k: bits of the modulus, which no sum reaches."""
        return (self.clients * self.heaviest * 2 * self.half).bit_length()

    @property
    def step(self) -> float:
        """Distance of two values that are told apart."""
        return self.bound / self.half

    @property
    def digits(self) -> int:
        """Integers that a reported number is put into, each of b - 1 bits."""
        return -(-(_FRACTION + _WHOLE) // (self.bits - 1))

    def weight(self, rows: float) -> int:
        """Return the weight of a client, 1 to W: its rows, rounded to steps of rows / W."""
        return max(1, min(self.heaviest, round(rows * self.heaviest / self.rows)))

    def put(
        self,
        values: NDArray[np.float32] | NDArray[np.float64],
        weight: int,
        out: Words,
        rng: np.random.Generator | None,
    ) -> int:
        """Write values as integers times ``weight`` to ``out``; return how many were cut off.

        Args:
            values: ``(d,)``.
            weight: 1 to W.
            out: ``(d,)``.
            rng: Rounds up with the chance that keeps the mean; ``None``: to the nearest.

        Raises:
            MessageError: A value is NaN or infinite.
        """
        half, cut = float(self.half), 0
        for start in range(0, len(values), _BLOCK):
            scaled = values[start : start + _BLOCK].astype(np.float64) * (half / self.bound)
            if not np.isfinite(scaled).all():
                raise MessageError("holds NaN or infinity: it is not masked", "not_finite")
            cut += int(np.count_nonzero(np.abs(scaled) > half))
            np.clip(scaled, -half, half, out=scaled)
            scaled += half
            if rng is None:
                np.rint(scaled, out=scaled)
            else:
                scaled += rng.random(len(scaled))
                np.floor(scaled, out=scaled)
            np.multiply(
                scaled.astype(np.uint32), np.uint32(weight), out=out[start : start + _BLOCK]
            )
        return cut

    def mean(self, sums: Words, weight: int) -> NDArray[np.float64]:
        """Return the mean of values from the sum of their integers and of their weights."""
        return (sums.astype(np.float64) / weight - self.half) * self.step

    def put_number(self, value: float | None, weight: int) -> list[int]:
        """Return a reported number as integers: its weight, 0 without one, and its digits times that."""
        if value is None:
            return [0] * (1 + self.digits)
        largest = 2.0 ** (_WHOLE - 1)
        whole = round((max(-largest, min(largest, value)) + largest) * 2**_FRACTION)
        whole = min(whole, 2 ** (_WHOLE + _FRACTION) - 1)  # 2^22 itself would take one bit more
        base = self.bits - 1
        digits = [(whole >> (base * place)) & (2**base - 1) for place in range(self.digits)]
        return [weight, *(weight * digit for digit in digits)]

    def mean_number(self, sums: list[int]) -> float | None:
        """Return the mean of a reported number from the sums of its integers; ``None``: nobody's."""
        weight, *digits = sums
        if not weight:
            return None
        whole = sum(digit << ((self.bits - 1) * place) for place, digit in enumerate(digits))
        return float(whole / weight / 2**_FRACTION - 2.0 ** (_WHOLE - 1))
