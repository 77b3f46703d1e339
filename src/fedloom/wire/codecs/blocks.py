"""Codes of numbers in blocks, each block with a scale of 16 bits.

A block is ``block`` numbers of one part in a row; the last one of a part may be shorter. Scales are
bfloat16, which has the range of float32: deltas of LoRA have scales of 1e-6, below float16's normal
numbers. They are written before the codes, all high bytes first and then all low ones, since the high ones
hardly differ. A scale is zero where all codes of its block stand for zero, and only there, so that there is
one way to write what is decoded.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
    """Return the bfloat16 nearest to each number that is not negative, ties to even; subnormals are zero."""
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
class Layout:
    """Where the blocks of parts lie if every part begins a new row.

    Attributes:
        lengths: Numbers of each part.
        block: Numbers of a block, the length of a row.
    """

    lengths: tuple[int, ...]
    block: int

    @property
    def rows(self) -> list[int]:
        """Blocks of each part."""
        return [-(-n // self.block) for n in self.lengths]

    @property
    def even(self) -> bool:
        """Whether every part fills its blocks."""
        return not any(n % self.block for n in self.lengths)

    def padded(self, parts: Sequence[Floats]) -> Floats:
        """Return parts as rows, (blocks, block), with zeros behind each part."""
        if len(parts) == 1 and self.even:
            return parts[0].reshape(-1, self.block)
        whole = np.zeros((sum(self.rows), self.block), np.float32)
        flat, start = whole.reshape(-1), 0
        for part, rows in zip(parts, self.rows, strict=True):
            flat[start : start + len(part)] = part
            start += rows * self.block
        return whole

    def unpadded(self, rows: Bytes) -> Bytes:
        """Return the codes of all parts, one after the other, of rows of them."""
        flat = rows.reshape(-1)
        if self.even:
            return flat
        starts = np.cumsum([0, *self.rows]) * self.block
        return np.concatenate([flat[s : s + n] for s, n in zip(starts, self.lengths, strict=False)])

    def blocks(self, flat: Floats) -> Iterator[tuple[Floats, slice]]:
        """Yield views of numbers without padding, (blocks, numbers), and which blocks they are."""
        if self.even:
            yield from _chunks(flat.reshape(-1, self.block), 0)
            return
        start = block = 0
        for length in self.lengths:
            whole, over = divmod(length, self.block)
            end = start + whole * self.block
            yield from _chunks(flat[start:end].reshape(whole, self.block), block)
            if over:
                yield (
                    flat[end : end + over].reshape(1, over),
                    slice(block + whole, block + whole + 1),
                )
            start, block = start + length, block + whole + bool(over)


def _chunks(rows: NDArray[np.float32], first: int) -> Iterator[tuple[Floats, slice]]:
    step = max(1, CHUNK // rows.shape[1])
    for at in range(0, len(rows), step):
        own = rows[at : at + step]
        yield own, slice(first + at, first + at + len(own))


class Uniforms:
    """Uniform numbers in [0, 1) for the rows of parts, in the order of the parts' own generators."""

    def __init__(self, layout: Layout, generators: Sequence[np.random.Generator | None]) -> None:
        """Begin with the first number of the first part."""
        self.layout, self.generators = layout, generators
        self.part = self.done = 0
        self.rows = layout.rows

    def fill(self, out: Floats) -> None:
        """Write the next numbers to ``out``, (rows, block); padding is left as it is."""
        flat, at, block = out.reshape(-1), 0, self.layout.block
        while at < flat.size:
            length, padded = self.layout.lengths[self.part], self.rows[self.part] * block
            take = min(length - self.done, flat.size - at)
            generator = self.generators[self.part]
            if take > 0 and generator is not None:
                generator.random(out=flat[at : at + take], dtype=np.float32)
            step = min(padded - self.done, flat.size - at)
            at, self.done = at + step, self.done + step
            if self.done == padded:
                self.part, self.done = self.part + 1, 0


@dataclass(frozen=True)
class BlockCodec(ValueCodec):
    """Codes of blocks with scales.

    Attributes:
        block: Numbers of a block.
        rounding: ``stochastic``, or ``nearest``.
    """

    block: int = 64
    rounding: str = "nearest"

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
    def scales(self, rows: Floats, layout: Layout, blocks: slice) -> Floats:
        """Return the scales of some rows, all bfloat16, (rows, 1)."""

    @abstractmethod
    def codes(self, rows: Floats, scales: Floats, uniforms: Floats | None) -> Bytes:
        """Return the codes of rows; no scale is zero, as it is 1 where all numbers are."""

    def bytes_of(self, lengths: Sequence[int]) -> int:
        """Return two bytes a block and the bytes of all codes."""
        blocks = sum(-(-n // self.block) for n in lengths)
        return 2 * blocks + digits.packed_bytes(sum(lengths), len(self.levels))

    def encode(
        self, parts: Sequence[Floats], generators: Sequence[np.random.Generator | None]
    ) -> Bytes:
        """Return the scales of all blocks, and then all codes."""
        layout = Layout(tuple(map(len, parts)), self.block)
        rows = layout.padded(parts)
        scales, codes = np.empty(len(rows), np.float32), np.empty(rows.shape, np.uint8)
        uniforms = Uniforms(layout, generators) if self.random else None
        drawn = np.zeros((max(1, CHUNK // self.block), self.block), np.float32)
        for own, place in _chunks(rows, 0):
            scale = self.scales(own, layout, place)
            if uniforms is not None:
                uniforms.fill(drawn[: len(own)])
            found = self.codes(
                own,
                np.where(scale > 0, scale, np.float32(1)),
                drawn[: len(own)] if uniforms is not None else None,
            )
            scales[place] = np.where((found != self.zero).any(1), scale[:, 0], np.float32(0))
            codes[place] = found
        packed = digits.pack(layout.unpadded(codes), len(self.levels))
        return np.concatenate([scale_bytes(scales), packed])

    def decode(self, data: Bytes, lengths: Sequence[int]) -> Floats:
        """Return the levels of all codes, each times the scale of its block."""
        layout, count = Layout(tuple(lengths), self.block), sum(lengths)
        head = 2 * sum(layout.rows)
        scales, packed = read_scales(data[:head]), data[head:]
        digits.check(packed, count, len(self.levels))
        flat = digits.values(packed, count, self.levels)
        for own, place in layout.blocks(flat):
            if not np.array_equal(own.any(1), scales[place] > 0):
                raise MessageError(
                    "a scale is zero where a code is not, or every code is zero where the scale is not"
                )
            own *= scales[place, None]
        return flat


def block_of(options: Options, default: int) -> int:
    """Return the option ``block`` of a stage."""
    return options.whole("block", default, FEWEST, MOST)
