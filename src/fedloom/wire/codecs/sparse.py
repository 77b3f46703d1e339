"""Sparsity: ``top_k:SHARE`` keeps a tensor's largest magnitudes, ``random_k:SHARE`` some at random.

Of d numbers K = ceil(share d) are kept. ``top_k`` sends their indices (``rice.py``); it is biased, and
loses most of AdamW's changes, whose magnitudes are alike: it needs error feedback. ``random_k`` sends a
seed of eight bytes in their place, and what is kept times d / K: unbiased, with d / K - 1 times the
energy as variance. Source: Stich et al. 2018, Sparsified SGD with Memory, arXiv:1809.07599.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from fedloom.errors import MessageError
from fedloom.wire.codecs import rice
from fedloom.wire.codecs.rice import Indices
from fedloom.wire.codecs.stage import Bytes, Floats, Options, Reduction, Shape

SEED = 8
"""Bytes of a seed."""


@dataclass(frozen=True)
class Sparsity(Reduction):
    """Keeps a share of each tensor's numbers.

    Attributes:
        share: Of the numbers that are kept, above 0, at most 1.
    """

    share: float

    @classmethod
    def read(cls, options: Options) -> Self:
        """Return the codec of a text: ``top_k:0.1``."""
        own = cls(options.share())
        options.end()
        return own

    def __str__(self) -> str:
        return f"{self.name}:{self.share!r}"

    def kept(self, size: int) -> int:
        """Return how many of so many numbers are kept."""
        # a share such as 0.1 lies above its decimal: a tenth of 30 numbers is 3
        return min(size, max(1, math.ceil(self.share * size - 1e-9 * size)))

    def lengths(self, shape: Shape) -> tuple[int, ...]:
        """Return how many numbers are kept."""
        return (self.kept(math.prod(shape)),)

    def expand(
        self, head: object, parts: list[Floats], shapes: Sequence[Shape]
    ) -> Iterator[Floats]:
        """Yield tensors with the numbers at their indices, and zeros elsewhere."""
        for indices, part, shape in zip(self.indices(head), parts, shapes, strict=True):
            whole = np.zeros(math.prod(shape), np.float32)
            whole[indices] = part
            yield whole

    @abstractmethod
    def indices(self, head: object) -> Iterator[Indices]:
        """Yield the indices of each tensor, increasing, of what :meth:`start` returned."""


@dataclass(frozen=True)
class TopK(Sparsity):
    """The largest magnitudes; of equal ones those of the lowest index."""

    name = "top_k"

    def most_bytes(self, shapes: Sequence[Shape]) -> int:
        """Return the bound of Rice's code."""
        return rice.most_bytes(*self._counts(shapes))

    def encode(
        self, arrays: Sequence[Floats], generators: Sequence[np.random.Generator | None]
    ) -> tuple[list[Floats], bytes]:
        """Return what is kept of each tensor, and all indices."""
        chosen = [largest(np.abs(own.reshape(-1)), self.kept(own.size)) for own in arrays]
        parts = [own.reshape(-1)[kept] for own, kept in zip(arrays, chosen, strict=True)]
        return parts, rice.encode(chosen)

    def start(self, data: Bytes, shapes: Sequence[Shape]) -> tuple[object, int]:
        """Return all indices."""
        return rice.decode(data, *self._counts(shapes))

    def indices(self, head: object) -> Iterator[Indices]:
        """Yield them."""
        assert isinstance(head, list)
        yield from head

    def _counts(self, shapes: Sequence[Shape]) -> tuple[list[int], list[int]]:
        sizes = [math.prod(shape) for shape in shapes]
        return [self.kept(size) for size in sizes], sizes


@dataclass(frozen=True)
class RandomK(Sparsity):
    """Numbers at random, each set equally likely, times d / K."""

    name = "random_k"

    @property
    def unbiased(self) -> bool:
        """What is kept counts for what is not."""
        return True

    @property
    def random(self) -> bool:
        """It draws a seed, from the generator of the first tensor."""
        return True

    @property
    def linear(self) -> bool:
        """With one seed all keep the same numbers."""
        return True

    def most_bytes(self, shapes: Sequence[Shape]) -> int:
        """Return those of the seed."""
        return SEED

    def encode(
        self, arrays: Sequence[Floats], generators: Sequence[np.random.Generator | None]
    ) -> tuple[list[Floats], bytes]:
        """Return what is kept of each tensor, times d / K, and the seed."""
        first = generators[0] if generators else None
        seed = int(first.integers(1 << 63)) if first is not None else 0
        parts = [
            own.reshape(-1)[chosen(seed, place, own.size, self.kept(own.size))]
            * np.float32(own.size / max(1, self.kept(own.size)))
            for place, own in enumerate(arrays)
        ]
        return parts, seed.to_bytes(SEED, "little")

    def start(self, data: Bytes, shapes: Sequence[Shape]) -> tuple[object, int]:
        """Return the seed and the sizes of tensors."""
        if len(data) < SEED:
            raise MessageError("a coded buffer lacks its seed")
        seed = int.from_bytes(data[:SEED].tobytes(), "little")
        if seed >= 1 << 63:
            raise MessageError(f"the seed {seed} is not below 2^63", "out_of_range")
        return (seed, [math.prod(shape) for shape in shapes]), SEED

    def indices(self, head: object) -> Iterator[Indices]:
        """Yield the indices that the seed gives."""
        assert isinstance(head, tuple)
        seed, sizes = head
        for place, size in enumerate(sizes):
            yield chosen(seed, place, size, self.kept(size))


def largest(values: Floats, count: int) -> Indices:
    """Return the indices of the ``count`` largest values, increasing; of equal ones the first."""
    if count == len(values):
        return np.arange(count)
    limit = np.partition(values, len(values) - count)[len(values) - count]
    return _with_ties(values > limit, values == limit, count)


def chosen(seed: int, place: int, size: int, count: int) -> Indices:
    """Return ``count`` indices below ``size`` at random, increasing.

    They are those of the smallest of ``size`` numbers of 32 bits from Philox with the key (seed,
    place), which gives the same numbers in every version of numpy.

    Args:
        seed: Below 2^63.
        place: Of the tensor among those of its codec.
        size: Numbers of the tensor.
        count: How many are chosen.
    """
    if count == size:
        return np.arange(count)
    words = np.random.Philox(key=np.array([seed, place], np.uint64)).random_raw(-(-size // 2))
    drawn = np.asarray(words, "<u8").view("<u4")[:size]
    limit = np.partition(drawn, count - 1)[count - 1]
    return _with_ties(drawn < limit, drawn == limit, count)


def _with_ties(
    inside: np.typing.NDArray[np.bool_], ties: np.typing.NDArray[np.bool_], count: int
) -> Indices:
    """Return the indices of what is inside, and of the first of the ties up to ``count``."""
    lacking = count - int(np.count_nonzero(inside))
    inside[np.flatnonzero(ties)[:lacking]] = True
    return np.flatnonzero(inside)
