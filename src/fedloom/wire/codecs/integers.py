"""Integers with a scale for each block: ``int8``, ``int4``, ``int3`` and ``ternary`` (-1, 0, 1).

The scale is the block's largest magnitude over the largest integer m, rounded up to bfloat16, so that
nothing is cut off; a number x becomes q = floor(x / s + u) with u uniform in [0, 1), whose mean is x / s, or
x / s rounded half to even (``nearest``). Source: QSGD (Alistarh et al. 2017, arXiv:1610.02132) with the
largest magnitude for the norm; TernGrad (Wen et al. 2017, arXiv:1705.07878).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedloom.wire.codecs.blocks import BlockCodec, Layout, block_of, rounded_up
from fedloom.wire.codecs.stage import Bytes, Floats, Options


@dataclass(frozen=True)
class IntegerCodec(BlockCodec):
    """Integers from -m to m."""

    rounding: str = "stochastic"
    largest: ClassVar[int]
    usual_block: ClassVar[int] = 64

    @classmethod
    def read(cls, options: Options) -> IntegerCodec:
        """Return the codec of a text: ``int4``, ``int4:nearest,block=128``."""
        own = cls(
            block=block_of(options, cls.usual_block),
            rounding=options.flag("stochastic", "nearest"),
        )
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

    def scales(self, rows: Floats, layout: Layout, blocks: slice) -> Floats:
        """Return the largest magnitude over m, rounded up."""
        most = np.maximum(rows.max(1, keepdims=True), -rows.min(1, keepdims=True))
        return rounded_up(most / np.float32(self.largest))

    def codes(self, rows: Floats, scales: Floats, uniforms: Floats | None) -> Bytes:
        """Return q + m."""
        levels = rows / scales
        if uniforms is None:
            np.rint(levels, out=levels)
        else:
            levels += uniforms
            np.floor(levels, out=levels)
            # m + u with u next to 1 is m + 1 in float32
            np.minimum(levels, np.float32(self.largest), out=levels)
        levels += np.float32(self.largest)
        return levels.astype(np.uint8)


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
