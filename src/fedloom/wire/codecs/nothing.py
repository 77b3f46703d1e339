"""``nothing``: no byte is sent of a tensor, and zeros are read.

It is what a budget leaves for tensors whose change is too small to be worth bytes; error feedback keeps
all of it for later rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedloom.wire.codecs.stage import Bytes, Floats, Options, ValueCodec


@dataclass(frozen=True)
class Nothing(ValueCodec):
    """No bits."""

    name = "nothing"

    @classmethod
    def read(cls, options: Options) -> Nothing:
        """Return the codec of a text: ``nothing``."""
        options.end()
        return cls()

    def __str__(self) -> str:
        return self.name

    def sections(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Return that there are no bytes."""
        return (0,)

    def encode(
        self, parts: Sequence[Floats], generators: Sequence[np.random.Generator | None]
    ) -> Bytes:
        """Return no bytes."""
        return np.empty(0, np.uint8)

    def decode(self, data: Bytes, lengths: Sequence[int]) -> Floats:
        """Return zeros."""
        return np.zeros(sum(lengths), np.float32)
