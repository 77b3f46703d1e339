"""Casts to 16 bits: ``bf16`` (8 bits of precision, float32's range), ``fp16`` (11 bits, to 65504).

Rounded to nearest, ties to even.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from fedloom.errors import MessageError
from fedloom.wire.codecs.stage import Bytes, Floats, Options, ValueCodec


@dataclass(frozen=True)
class Cast(ValueCodec):
    """Numbers as floats of 16 bits."""

    dtype: ClassVar[torch.dtype]
    exponent: ClassVar[int]

    @classmethod
    def read(cls, options: Options) -> Cast:
        """Return the codec of a text, which has no options."""
        options.end()
        return cls()

    def __str__(self) -> str:
        return self.name

    def sections(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Return a high byte and a low one for each number."""
        return (sum(lengths), sum(lengths))

    def encode(
        self, parts: Sequence[Floats], generators: Sequence[np.random.Generator | None]
    ) -> Bytes:
        """Return the high bytes of all numbers, and then the low ones."""
        cast = [torch.from_numpy(part).to(self.dtype).view(torch.uint8) for part in parts]
        data: Bytes = torch.cat(cast).numpy() if cast else np.empty(0, np.uint8)
        if self._not_finite(data.view("<u2")):
            raise MessageError(
                f"a number is beyond {torch.finfo(self.dtype).max:g}, the largest of {self.name}: use "
                "bf16 or a quantiser",
                "out_of_range",
            )
        return np.concatenate([data[1::2], data[0::2]])

    def decode(self, data: Bytes, lengths: Sequence[int]) -> Floats:
        """Return the numbers as float32."""
        half = len(data) // 2
        words = (data[:half].astype(np.uint16) << np.uint16(8)) | data[half:]
        if self._not_finite(words):
            raise MessageError("a coded number is NaN or infinite", "not_finite")
        return torch.from_numpy(words).view(self.dtype).float().numpy()

    def _not_finite(self, words: NDArray[np.uint16]) -> bool:
        return bool(((words & np.uint16(self.exponent)) == self.exponent).any())


class BFloat16(Cast):
    """bfloat16."""

    name, dtype, exponent = "bf16", torch.bfloat16, 0x7F80


class Float16(Cast):
    """float16."""

    name, dtype, exponent = "fp16", torch.float16, 0x7C00
