"""``sign``: the sign of each number, one bit, and the mean magnitude of each block.

The best code of one bit with one scale in squared error: 1 - 2/pi of a Gaussian's energy is lost, less of
AdamW's changes, whose magnitudes are alike. Biased: error feedback makes up for it. Zero counts as
positive. Source: signSGD with norm compression (Karimireddy et al. 2019, arXiv:1901.09847), by blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedloom.wire.codecs.blocks import BlockCodec, rounded
from fedloom.wire.codecs.stage import Bytes, Floats


@dataclass(frozen=True)
class Sign(BlockCodec):
    """Two levels, eight to a byte."""

    name, usual_block = "sign", 256
    block: int = 256

    @property
    def levels(self) -> Floats:
        """1 and -1."""
        return np.array([1, -1], np.float32)

    @property
    def zero(self) -> int:
        """In a block of zeros every number counts as positive."""
        return 0

    def scales(self, rows: Floats, counts: NDArray[np.int64]) -> Floats:
        """Return the mean magnitude of the numbers that are not padding, rounded to nearest."""
        sums = np.abs(rows).sum(1, dtype=np.float64)
        return rounded((sums / counts).astype(np.float32))

    def codes(self, rows: Floats, uniforms: Floats | None) -> Bytes:
        """Return 1 for each negative number."""
        return (rows < 0).view(np.uint8)

    def agreed(self, codes: Bytes, scales: Floats) -> Floats:
        """Return the scales, and make codes zero where they are zero."""
        codes[scales == 0] = 0
        return scales

    def agree(self, values: Floats, scales: Floats) -> bool:
        """Return whether blocks with scale zero have no negative number."""
        return not (values[scales == 0] < 0).any()
