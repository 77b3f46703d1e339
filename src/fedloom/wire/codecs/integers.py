"""Integers with a scale for each block: ``int8``, ``int4``, ``int3`` and ``ternary`` (-1, 0, 1).

The scale is the block's largest magnitude over the largest integer m, rounded up to bfloat16, so that
nothing is cut off; a number x becomes q = floor(x / s + u) with u uniform in (0, 1), whose mean is x /
s, or x / s rounded half to even (``nearest``). Source: QSGD (Alistarh et al. 2017, arXiv:1610.02132)
with the largest magnitude for the norm; TernGrad (Wen et al. 2017, arXiv:1705.07878).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from fedloom.wire.codecs.blocks import BlockCodec, rounded_up
from fedloom.wire.codecs.stage import Bytes, Floats, Options


@dataclass(frozen=True)
class IntegerCodec(BlockCodec):
    """Integers from -m to m."""

    rounding: str = "stochastic"
    largest: ClassVar[int]

    @classmethod
    def read(cls, options: Options) -> Self:
        """Return the codec of a text: ``int4``, ``int4:nearest,block=128``."""
        own = cls(block=cls.block_of(options), rounding=options.flag("stochastic", "nearest"))
        options.end()
        return own

    def __str__(self) -> str:
        return f"{self.name}:{self.rounding},block={self.block}"

    @property
    def levels(self) -> Floats:
        """The integers from -m to m."""
        return np.arange(-self.largest, self.largest + 1, dtype=np.float32)

    @property
    def zero(self) -> int:
        """The code of 0 is m."""
        return self.largest

    def scales(self, rows: Floats, counts: NDArray[np.int64]) -> Floats:
        """Return the largest magnitude over m, rounded up."""
        return rounded_up(np.abs(rows).max(1) / np.float32(self.largest))

    def codes(self, rows: Floats, uniforms: Floats | None) -> Bytes:
        """Return q + m."""
        if uniforms is None:
            np.rint(rows, out=rows)
        else:
            # m at most: the sum of m and the largest u is a float32
            rows += uniforms
            np.floor(rows, out=rows)
        rows += np.float32(self.largest)
        found = np.empty(rows.shape, np.uint8)
        np.copyto(found, rows, casting="unsafe")  # a third of the time of astype
        return found


class Int8(IntegerCodec):
    """255 levels, 8 bits."""

    name, largest, usual_block = "int8", 127, 256


class Int4(IntegerCodec):
    """15 levels, two to a byte."""

    name, largest = "int4", 7


class Int3(IntegerCodec):
    """7 levels, two to a byte: 2.6 bits after the entropy stage."""

    name, largest = "int3", 3


class Ternary(IntegerCodec):
    """3 levels, five to a byte."""

    name, largest = "ternary", 1
