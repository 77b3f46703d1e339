"""Codes of numbers in blocks, each block with a scale of 16 bits.

A block is ``block`` numbers of one part in a row; the last one of a part may be shorter. Scales are
bfloat16, which has the range of float32: deltas of LoRA have scales of 1e-6, below float16's normal
numbers. They are written before the codes, all high bytes first and then all low ones, since the high
ones hardly differ. A scale is zero where all codes of its block stand for zero, and only there, so that
there is one way to write what is decoded.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from fedloom.errors import MessageError
from fedloom.wire.codecs import digits
from fedloom.wire.codecs.stage import LARGEST, Bytes, Floats, Options, ValueCodec

CHUNK = 1 << 15
"""Numbers that are worked on at a time, so that they stay in the processor's cache."""

SMALLEST = np.float32(2.0**-126)
"""Smallest scale: float32's smallest normal number."""

LARGEST_SCALE = np.float32(1.01 * LARGEST)
"""Largest scale: that of ``LARGEST``, rounded up to 8 bits."""

FEWEST, MOST = 8, 1 << 16
"""Fewest and most numbers of a block."""


def rounded_up(values: Floats) -> Floats:
    """Return the smallest bfloat16 that is not below each positive number; zero stays zero."""
    bits = np.maximum(values, SMALLEST).view(np.uint32)
    up = ((bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(values > 0, up, np.float32(0))


def rounded(values: Floats) -> Floats:
    """Return the bfloat16 nearest to each number, none below 0; ties to even, subnormals to zero."""
    bits = values.view(np.uint32)
    near = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    found = (near & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(found >= SMALLEST, found, np.float32(0))


def scale_bytes(scales: Floats) -> Bytes:
    """Return scales that are bfloat16 as bytes: all high ones, then all low ones."""
    own = np.ascontiguousarray((scales.view(np.uint32) >> np.uint32(16)).astype("<u2"))
    return np.ascontiguousarray(own.view(np.uint8).reshape(-1, 2)[:, ::-1].T).reshape(-1)


def read_scales(data: Bytes) -> Floats:
    """Return the scales in bytes of :func:`scale_bytes`, checked.

    Raises:
        MessageError: One is negative (also -0.0), subnormal, infinite, NaN or above ``LARGEST_SCALE``.
    """
    count = len(data) // 2
    bits = (data[:count].astype(np.uint32) << np.uint32(8)) | data[count:]
    scales = (bits << np.uint32(16)).view(np.float32)
    if not count:
        return scales
    if int(bits.max()) >= 0x8000:
        raise MessageError("a scale is negative or -0.0")
    if int(bits.max()) >= 0x7F80:
        raise MessageError("a scale is NaN or infinite", "not_finite")
    if float(scales.max()) > LARGEST_SCALE:
        raise MessageError(
            f"a scale is {float(scales.max()):g}, the largest is {float(LARGEST_SCALE):g}",
            "out_of_range",
        )
    if np.any((bits > 0) & (bits < 0x80)):
        raise MessageError("a scale is subnormal")
    return scales


@dataclass(frozen=True)
class Piece:
    """Numbers of one part within a chunk of blocks.

    Attributes:
        part: Which part.
        own: Where they lie in it.
        all: Where they lie among the numbers of all parts.
        chunk: Where they lie in the rows of the chunk, flat.
    """

    part: int
    own: slice
    all: slice
    chunk: slice


@dataclass(frozen=True)
class Layout:
    """Where the blocks of parts lie: every part begins a new one.

    Attributes:
        lengths: Numbers of each part.
        block: Numbers of a block.
    """

    lengths: tuple[int, ...]
    block: int

    @cached_property
    def blocks(self) -> int:
        """Blocks of all parts."""
        return sum(-(-n // self.block) for n in self.lengths)

    @cached_property
    def even(self) -> bool:
        """Whether every part fills its blocks."""
        return not any(n % self.block for n in self.lengths)

    def chunks(self) -> Iterator[tuple[slice, list[Piece]]]:
        """Yield ranges of at most ``CHUNK // block`` blocks, or one, and the pieces that lie in them."""
        most = max(1, CHUNK // self.block)
        first = free = 0  # the first block of the chunk, and its blocks so far
        pieces: list[Piece] = []
        before = 0
        for part, length in enumerate(self.lengths):
            done = 0
            while done < length:
                take = min(length - done, (most - free) * self.block)
                at, start = free * self.block, before + done
                own, whole = slice(done, done + take), slice(start, start + take)
                pieces.append(Piece(part, own, whole, slice(at, at + take)))
                done, free = done + take, free - -take // self.block
                if free == most:
                    yield slice(first, first + free), pieces
                    first, free, pieces = first + free, 0, []
            before += length
        if pieces:
            yield slice(first, first + free), pieces

    def views(self, flat: Floats) -> Iterator[tuple[Floats, slice]]:
        """Yield views of the numbers of all parts, (blocks, numbers), and which blocks they are."""
        if self.even:
            rows, step = flat.reshape(-1, self.block), max(1, CHUNK // self.block)
            for at in range(0, len(rows), step):
                own = rows[at : at + step]
                yield own, slice(at, at + len(own))
            return
        start = block = 0
        for length in self.lengths:
            whole, over = divmod(length, self.block)
            end = start + whole * self.block
            if whole:
                yield flat[start:end].reshape(whole, self.block), slice(block, block + whole)
            if over:
                last = slice(block + whole, block + whole + 1)
                yield flat[end : end + over].reshape(1, over), last
            start, block = start + length, block + whole + bool(over)


class Uniforms:
    """Uniform numbers in (0, 1), each part's from its own generator.

    They are (k + 1/2) / 2^16 with k of 16 bits, which take a quarter of the time of floats of 24 bits.
    Rounding by them is unbiased to 2^-17 of a scale.
    """

    def __init__(
        self, lengths: Sequence[int], generators: Sequence[np.random.Generator | None]
    ) -> None:
        """Begin with the first part."""
        self.lengths, self.generators = lengths, generators
        self.part, self.words = -1, np.empty(0, "<u2")

    def fill(self, flat: Floats, pieces: Sequence[Piece]) -> None:
        """Write those of the next chunk."""
        for piece in pieces:
            if piece.part != self.part:
                generator, length = self.generators[piece.part], self.lengths[piece.part]
                assert generator is not None
                raw = generator.bit_generator.random_raw(-(-length // 4))
                self.part, self.words = piece.part, np.asarray(raw, "<u8").view("<u2")
            np.multiply(self.words[piece.own], np.float32(2.0**-16), out=flat[piece.chunk])
        flat += np.float32(2.0**-17)


@dataclass(frozen=True)
class BlockCodec(ValueCodec):
    """Codes of blocks with scales.

    Attributes:
        block: Numbers of a block.
        rounding: ``stochastic``, or ``nearest``.
    """

    block: int = 64
    rounding: str = "nearest"
    usual_block: ClassVar[int] = 64

    @classmethod
    def read(cls, options: Options) -> Self:
        """Return the codec of a text: ``nf4``, ``sign:block=1024``."""
        own = cls(block=cls.block_of(options))
        options.end()
        return own

    @classmethod
    def block_of(cls, options: Options) -> int:
        """Return the option ``block``."""
        return options.whole("block", cls.usual_block, FEWEST, MOST)

    def __str__(self) -> str:
        return f"{self.name}:block={self.block}"

    @property
    def unbiased(self) -> bool:
        """Whether it rounds at random."""
        return self.rounding == "stochastic"

    @property
    def random(self) -> bool:
        """Whether it rounds at random."""
        return self.rounding == "stochastic"

    @property
    @abstractmethod
    def levels(self) -> Floats:
        """What each code stands for at scale 1, (codes,)."""

    @property
    @abstractmethod
    def zero(self) -> int:
        """The code of zero."""

    @abstractmethod
    def scales(self, rows: Floats, counts: NDArray[np.int64]) -> Floats:
        """Return the scales of blocks, all bfloat16, (blocks,).

        Args:
            rows: (blocks, block), with zeros behind a block that is shorter.
            counts: Numbers of each block, (blocks,).
        """

    @abstractmethod
    def codes(self, rows: Floats, uniforms: Floats | None) -> Bytes:
        """Return the codes of numbers over their scales, (blocks, block); both arrays may be changed."""

    def agreed(self, codes: Bytes, scales: Floats) -> Floats:
        """Return the scales with zero where all codes of a block stand for zero; codes may be changed."""
        return np.where((codes != self.zero).any(1), scales, np.float32(0))

    def agree(self, values: Floats, scales: Floats) -> bool:
        """Return whether scales are zero where :meth:`agreed` has them zero, given levels of blocks."""
        return np.array_equal(values.any(1), scales > 0)

    def sections(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Return a high byte and a low one for each block, and the bytes of all codes."""
        blocks = self._layout(lengths).blocks
        return (blocks, blocks, digits.packed_bytes(sum(lengths), len(self.levels)))

    def encode(
        self, parts: Sequence[Floats], generators: Sequence[np.random.Generator | None]
    ) -> Bytes:
        """Return the scales of all blocks, and then all codes."""
        layout = self._layout([len(part) for part in parts])
        scales = np.empty(layout.blocks, np.float32)
        codes = np.empty(sum(layout.lengths), np.uint8)
        uniforms = Uniforms(layout.lengths, generators) if self.random else None
        room = np.zeros((2, max(1, CHUNK // layout.block), layout.block), np.float32)
        for place, pieces in layout.chunks():
            rows, drawn = room[:, : place.stop - place.start]
            if not layout.even:
                rows.fill(0)
            for piece in pieces:
                rows.reshape(-1)[piece.chunk] = parts[piece.part][piece.own]
            if uniforms is not None:
                uniforms.fill(drawn.reshape(-1), pieces)
            scale = self.scales(rows, _counts(pieces, len(rows), layout.block))
            rows /= np.where(scale > 0, scale, np.float32(1))[:, None]
            found = self.codes(rows, drawn if uniforms is not None else None)
            scales[place] = self.agreed(found, scale)
            for piece in pieces:
                codes[piece.all] = found.reshape(-1)[piece.chunk]
        return np.concatenate([scale_bytes(scales), digits.pack(codes, len(self.levels))])

    def decode(self, data: Bytes, lengths: Sequence[int]) -> Floats:
        """Return the levels of all codes, each times the scale of its block."""
        layout, count = self._layout(lengths), sum(lengths)
        scales, packed = read_scales(data[: 2 * layout.blocks]), data[2 * layout.blocks :]
        digits.check(packed, count, len(self.levels))
        flat = digits.values(packed, count, self.levels)
        for own, place in layout.views(flat):
            if not self.agree(own, scales[place]):
                raise MessageError(
                    "a scale is zero where a code is not, or every code is zero where the scale is not"
                )
            own *= scales[place, None]
        return flat

    def _layout(self, lengths: Sequence[int]) -> Layout:
        """Return where blocks lie; no block is longer than the longest part."""
        return Layout(tuple(lengths), max(1, min(self.block, max(lengths, default=1))))


def _counts(pieces: Sequence[Piece], blocks: int, block: int) -> NDArray[np.int64]:
    """Return the numbers of each block of a chunk."""
    found = np.full(blocks, block)
    for piece in pieces:
        if over := (piece.chunk.stop - piece.chunk.start) % block:
            found[piece.chunk.stop // block] = over
    return found
