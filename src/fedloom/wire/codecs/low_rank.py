"""``low_rank:R``: a matrix as the product of two with R columns, as in PowerSGD.

M, (m, n), is sent as P, (m, R), with orthonormal columns, and Q = M^T P, (n, R); P is that of the
subspace of M after two steps of power iteration from a fixed start. More dimensions are the first one
and all others. Tensors that would not become smaller, R (m + n) >= m n, and those of one dimension are
left as they are. Biased: it needs error feedback. What is decoded is the sum of R products in order,
number by number, so that it has the same bits on every machine.

Source: Vogels, Karimireddy and Jaggi 2019, PowerSGD, arXiv:1905.13727.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedloom.errors import MessageError
from fedloom.wire.codecs.stage import LARGEST, Bytes, Floats, Options, Reduction, Shape

MAX_RANK = 1024
"""Largest R."""

ROOM = 1 << 15
"""Numbers of a product that are worked on at a time."""

ITERATIONS = 2
"""Steps of power iteration; without a start from the round before one is too few."""


@dataclass(frozen=True)
class LowRank(Reduction):
    """Products of two thin matrices.

    Attributes:
        rank: Their columns.
    """

    name = "low_rank"
    rank: int

    @classmethod
    def read(cls, options: Options) -> LowRank:
        """Return the codec of a text: ``low_rank:2``."""
        own = cls(options.count("rank", 1, MAX_RANK))
        options.end()
        return own

    def __str__(self) -> str:
        return f"{self.name}:{self.rank}"

    def lengths(self, shape: Shape) -> tuple[int, ...]:
        """Return the numbers of P and of Q, or of the tensor as it is."""
        rows, columns = _matrix(shape)
        if self._smaller(rows, columns):
            return (rows * self.rank, columns * self.rank)
        return (rows * columns,)

    def most_bytes(self, shapes: Sequence[Shape]) -> int:
        """There is no head."""
        return 0

    def encode(
        self, arrays: Sequence[Floats], generators: Sequence[np.random.Generator | None]
    ) -> tuple[list[Floats], bytes]:
        """Return P and Q of each matrix, and the other tensors."""
        parts: list[Floats] = []
        for own in arrays:
            matrix = own.reshape(_matrix(own.shape))
            parts += _factors(matrix, self.rank) if self._smaller(*matrix.shape) else [matrix]
        return [part.reshape(-1) for part in parts], b""

    def start(self, data: Bytes, shapes: Sequence[Shape]) -> tuple[object, int]:
        """There is no head."""
        return None, 0

    def expand(
        self, head: object, parts: list[Floats], shapes: Sequence[Shape]
    ) -> Iterator[Floats]:
        """Yield the products."""
        left = iter(parts)
        for shape in shapes:
            rows, columns = _matrix(shape)
            if not self._smaller(rows, columns):
                yield next(left)
                continue
            p, q = next(left).reshape(rows, self.rank), next(left).reshape(columns, self.rank)
            yield _product(p, q).reshape(-1)

    def _smaller(self, rows: int, columns: int) -> bool:
        return self.rank * (rows + columns) < rows * columns


def _matrix(shape: Shape) -> tuple[int, int]:
    """Return the rows and columns of a tensor; one of a single dimension is one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def _factors(matrix: Floats, rank: int) -> list[Floats]:
    most = np.abs(matrix).max()
    if not most:
        return [np.zeros((n, rank), np.float32) for n in matrix.shape]
    own = matrix / most  # squares of large numbers are beyond float32
    q = np.random.default_rng(0).standard_normal((matrix.shape[1], rank), np.float32)
    for _ in range(ITERATIONS):
        p = np.linalg.qr(own @ q)[0]
        q = own.T @ p
    return [np.ascontiguousarray(p), q * most]


def _product(p: Floats, q: Floats) -> Floats:
    """Return P Q^T, some rows at a time.

    Raises:
        MessageError: A number is not finite, or beyond twice ``LARGEST``.
    """
    found = np.empty((len(p), len(q)), np.float32)
    step = max(1, ROOM // len(q))
    for start in range(0, len(p), step):
        rows = found[start : start + step]
        with np.errstate(over="ignore", invalid="ignore"):
            np.multiply(p[start : start + step, :1], q[:, 0], out=rows)
            for column in range(1, p.shape[1]):
                rows += p[start : start + step, column : column + 1] * q[:, column]
        if not float(np.abs(rows).max()) <= 2 * LARGEST:
            raise MessageError("a product of factors is not finite or too large", "out_of_range")
    return found
