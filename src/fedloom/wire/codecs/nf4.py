"""``nf4``: the 16 levels of NormalFloat, with the largest magnitude of a block as its scale.

Levels are quantiles of a normal distribution, with 0, -1 and 1 among them. Nearest level; of two equally
near the lower. Not unbiased, and of higher entropy than ``int4``: a code for weights rather than for
changes of them. Source: QLoRA (Dettmers et al. 2023, arXiv:2305.14314), appendix E.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedloom.wire.codecs.blocks import BlockCodec, rounded_up
from fedloom.wire.codecs.stage import Bytes, Floats

LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
"""The levels."""

BETWEEN = (LEVELS[:-1] + LEVELS[1:]) / np.float32(2)
"""Where the nearest level changes, (15,)."""


@dataclass(frozen=True)
class NF4(BlockCodec):
    """16 levels, two to a byte."""

    name = "nf4"

    @property
    def levels(self) -> Floats:
        """``LEVELS``."""
        return LEVELS

    @property
    def zero(self) -> int:
        """The place of 0 among them."""
        return 7

    def scales(self, rows: Floats, counts: NDArray[np.int64]) -> Floats:
        """Return the largest magnitude, rounded up."""
        return rounded_up(np.abs(rows).max(1))

    def codes(self, rows: Floats, uniforms: Floats | None) -> Bytes:
        """Return how many of ``BETWEEN`` lie below each number over its scale."""
        found = np.zeros(rows.shape, np.uint8)
        for limit in BETWEEN:
            found += rows > limit
        return found
