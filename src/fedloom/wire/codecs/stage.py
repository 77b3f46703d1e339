"""What a stage of a codec is: it keeps fewer numbers, or writes numbers or bytes in fewer bits.

A pipeline has at most one stage of each kind, in this order. Each says how many bytes its output may
have, from shapes alone, so that a decoder knows before it reads. Pure: arrays in, bytes out.

Numbers of a tensor are coded as float32, flat, in row-major order. A stage that splits a tensor in
several arrays (the factors of a matrix) calls each of them a *part*.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Shape = tuple[int, ...]

LARGEST = 2.0**120
"""Largest absolute value that is coded: whatever a scale or a sum of products makes of it is finite."""


class Options:
    """The options of a stage in a text: ``NAME:0.1,nearest,block=64``, each taken once."""

    def __init__(self, text: str) -> None:
        """Take a text apart."""
        self.text = text.strip()
        stage, _, rest = self.text.partition(":")
        self.stage = stage.strip()
        self.left = [own.strip() for own in rest.split(",")] if rest else []

    def flag(self, *names: str) -> str:
        """Return the one of ``names`` that is given, or the first of them."""
        found = [name for name in self.left if name in names]
        if len(found) > 1:
            raise ValueError(f"{self.text!r} says {found[0]} and {found[1]}: leave one of them out")
        self.left = [own for own in self.left if own not in names]
        return found[0] if found else names[0]

    def whole(self, name: str, default: int, lowest: int, highest: int) -> int:
        """Return the whole number of ``name=``, within a range."""
        found = [own for own in self.left if own.startswith(f"{name}=")]
        if not found:
            return default
        if len(found) > 1:
            raise ValueError(f"{self.text!r} says {name}= twice: leave one of them out")
        self.left.remove(found[0])
        return self._whole(name, found[0].removeprefix(f"{name}="), lowest, highest)

    def count(self, name: str, lowest: int, highest: int) -> int:
        """Return the first option, a whole number within a range."""
        return self._whole(name, self._first(name), lowest, highest)

    def share(self) -> float:
        """Return the first option, a share of all numbers: above 0, at most 1."""
        text = self._first("share")
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 < value <= 1:
            raise ValueError(f"{self.text!r}: the share must be above 0 and at most 1, as in 0.1")
        return value

    def end(self) -> None:
        """Check that every option was taken.

        Raises:
            ValueError: One was not.
        """
        if self.left:
            raise ValueError(f"{self.text!r}: {self.stage} has no option {self.left[0]!r}")

    def _first(self, name: str) -> str:
        if not self.left or not self.left[0]:
            raise ValueError(f"{self.text!r} lacks its {name}, as in {self.stage}:{name}")
        return self.left.pop(0)

    def _whole(self, name: str, text: str, lowest: int, highest: int) -> int:
        if not (text.isascii() and text.isdigit() and lowest <= int(text[:12]) <= highest):
            raise ValueError(
                f"{self.text!r}: {name} must be a whole number from {lowest} to {highest}"
            )
        return int(text)


@dataclass(frozen=True)
class Stage(ABC):
    """One step of a codec.

    Attributes:
        name: What it is called in a list of stages.
        unbiased: Whether the mean of what is decoded, over its random numbers, is what was encoded.
        random: Whether it needs random numbers.
    """

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def read(cls, options: Options) -> Stage:
        """Return the stage of a text.

        Raises:
            ValueError: Options that it has not, or out of range.
        """

    @abstractmethod
    def __str__(self) -> str: ...

    @property
    def unbiased(self) -> bool:
        """Whether its error has mean zero."""
        return False

    @property
    def random(self) -> bool:
        """Whether it draws random numbers."""
        return False


class Reduction(Stage):
    """Keeps fewer numbers of each tensor, and says which in a head of bytes."""

    @property
    def linear(self) -> bool:
        """Whether sums of encoded tensors are encodings of sums, if all use the same random numbers."""
        return False

    @abstractmethod
    def lengths(self, shape: Shape) -> tuple[int, ...]:
        """Return how many numbers each part of a tensor has that are kept."""

    @abstractmethod
    def most_bytes(self, shapes: Sequence[Shape]) -> int:
        """Return an upper bound of the bytes of the head."""

    @abstractmethod
    def encode(
        self, arrays: Sequence[Floats], generators: Sequence[np.random.Generator | None]
    ) -> tuple[list[Floats], bytes]:
        """Return the parts of all tensors in order, flat, and the head."""

    @abstractmethod
    def start(self, data: Bytes, shapes: Sequence[Shape]) -> tuple[object, int]:
        """Return what the head at the start of ``data`` says, checked, and how many bytes it has.

        Raises:
            MessageError: It is not what :meth:`encode` writes.
        """

    @abstractmethod
    def expand(
        self, head: object, parts: list[Floats], shapes: Sequence[Shape]
    ) -> Iterator[Floats]:
        """Yield the tensors of what :meth:`start` found and the parts, flat."""


class ValueCodec(Stage):
    """Writes each number in fewer bits."""

    @abstractmethod
    def sections(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Return the exact bytes of each kind that parts of these lengths take."""

    @abstractmethod
    def encode(
        self, parts: Sequence[Floats], generators: Sequence[np.random.Generator | None]
    ) -> Bytes:
        """Return parts, each flat, as bytes; all are finite and within ``LARGEST``."""

    @abstractmethod
    def decode(self, data: Bytes, lengths: Sequence[int]) -> Floats:
        """Return the numbers of all parts, one after the other.

        Args:
            data: As many bytes as :meth:`sections` says.
            lengths: Of the parts.

        Raises:
            MessageError: They are not what :meth:`encode` writes.
        """


class EntropyCodec(Stage):
    """Codes bytes in fewer, without loss."""

    @property
    def unbiased(self) -> bool:
        """It loses nothing."""
        return True

    @abstractmethod
    def most_bytes(self, size: int) -> int:
        """Return an upper bound of what ``size`` bytes become."""

    @abstractmethod
    def encode(self, data: Bytes) -> bytes:
        """Return bytes coded."""

    @abstractmethod
    def decode(self, data: Bytes, size: int) -> Bytes:
        """Return the ``size`` bytes that were coded.

        Raises:
            MessageError: It is anything but one coding of exactly ``size`` bytes.
        """
