"""Codecs as lists of stages: ``["top_k:0.1", "int4", "zstd"]``; a preset has a name.

All tensors of one codec lie in one sequence of bytes: what the first stage says of all of them, the
values coded, and four bytes of CRC-32, so that a damaged one is not decoded to other numbers. Sizes
come from shapes, never from the bytes.
"""

from __future__ import annotations

import difflib
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fedloom.errors import MessageError
from fedloom.tensors import largest_value
from fedloom.wire.codecs.cast import BFloat16, Float16
from fedloom.wire.codecs.integers import Int3, Int4, Int8, Ternary
from fedloom.wire.codecs.low_rank import LowRank
from fedloom.wire.codecs.nf4 import NF4
from fedloom.wire.codecs.nothing import Nothing
from fedloom.wire.codecs.sign import Sign
from fedloom.wire.codecs.sparse import RandomK, TopK
from fedloom.wire.codecs.stage import (
    LARGEST,
    Bytes,
    EntropyCodec,
    Floats,
    Options,
    Reduction,
    Shape,
    Stage,
    ValueCodec,
)
from fedloom.wire.codecs.zstd import Zstd

PRESETS: dict[str, tuple[str, ...]] = {
    "int8": ("int8", "zstd"),
    "int4": ("int4", "zstd"),
    "small": ("ternary", "zstd"),
    "smallest": ("sign", "zstd"),
}
"""Stages of each preset, from mild to strong."""

STAGES: tuple[type[Stage], ...] = (
    TopK,
    RandomK,
    LowRank,
    BFloat16,
    Float16,
    Int8,
    Int4,
    Int3,
    Ternary,
    NF4,
    Sign,
    Nothing,
    Zstd,
)

_BY_NAME = {stage.name: stage for stage in STAGES}

SEPARATOR = "|"
"""Between the stages of a canonical text."""

CHECKSUM, LENGTH = 4, 8
"""Bytes of a CRC-32, and of the length of a section."""

Generators = Callable[[str], np.random.Generator]
"""Gives the generator of a tensor's random numbers, given its name."""


@dataclass(frozen=True)
class Pipeline:
    """Stages, at most one of each kind; ``str`` of it is its canonical text.

    Attributes:
        reduction: Keeps fewer numbers.
        values: Writes each in fewer bits; without it they travel in their own dtype, or as float32 after
            a reduction.
        entropy: Codes bytes in fewer.
    """

    reduction: Reduction | None = None
    values: ValueCodec | None = None
    entropy: EntropyCodec | None = None

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in order."""
        return tuple(s for s in (self.reduction, self.values, self.entropy) if s is not None)

    def __str__(self) -> str:
        return SEPARATOR.join(map(str, self.stages))

    @property
    def lossless(self) -> bool:
        """Whether what is decoded is what was encoded, bit for bit."""
        return self.reduction is None and self.values is None

    @property
    def unbiased(self) -> bool:
        """Whether the mean of what is decoded, over the random numbers, is what was encoded."""
        return all(stage.unbiased for stage in self.stages)

    @property
    def sums(self) -> bool:
        """Whether a sum of encoded tensors is the encoding of their sum, as secure aggregation needs it.

        Scales of a client's own, indices of its own and entropy coding make it none; what is linear does,
        if all clients are given the same random numbers.
        """
        return self.values is None and self.entropy is None and self._linear

    @property
    def _linear(self) -> bool:
        return self.reduction is None or self.reduction.linear

    @property
    def random(self) -> bool:
        """Whether encoding needs random numbers."""
        return any(stage.random for stage in self.stages)

    def sections(self, shapes: Sequence[Shape], dtype: torch.dtype) -> tuple[int, ...]:
        """Return the bytes of each kind of the values of tensors, before the entropy stage.

        Scales and codes, and the bytes of a float, differ in what is frequent: each kind is coded
        alone, as one frame of all takes up to four percent more.
        """
        if self.lossless:
            return (sum(map(math.prod, shapes)),) * dtype.itemsize
        lengths = self._lengths(shapes)
        return self.values.sections(lengths) if self.values is not None else (4 * sum(lengths),)

    def raw_bytes(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        """Return the bytes of the values of tensors before the entropy stage."""
        return sum(self.sections(shapes, dtype))

    def most_bytes(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        """Return an upper bound of the bytes that tensors are coded to."""
        sections = self.sections(shapes, dtype)
        head = self.reduction.most_bytes(shapes) if self.reduction is not None else 0
        if self.entropy is None:
            return head + sum(sections) + CHECKSUM
        coded = sum(map(self.entropy.most_bytes, sections)) + LENGTH * (len(sections) - 1)
        return head + coded + CHECKSUM

    def encode(
        self, names: Sequence[str], tensors: Sequence[Tensor], rng: Generators | None = None
    ) -> bytes:
        """Return tensors of one dtype as bytes.

        Args:
            names: Of the tensors.
            tensors: Floats.
            rng: Gives each tensor's generator; needed only where :attr:`random`.

        Raises:
            MessageError: A tensor holds NaN or infinity, or a number too large to be coded; ``rng`` is
                needed and absent.
        """
        for name, tensor in zip(names, tensors, strict=True):
            _require_codable(name, tensor, LARGEST if not self.lossless else math.inf)
        if self.lossless:
            head, raw = b"", _own_bytes(tensors)
        else:
            head, raw = self._encode_values(names, tensors, rng)
        shapes = [tuple(tensor.shape) for tensor in tensors]
        coded = self._coded(
            raw, self.sections(shapes, tensors[0].dtype if tensors else torch.float32)
        )
        checksum = zlib.crc32(coded, zlib.crc32(head))
        return b"".join([head, coded, checksum.to_bytes(CHECKSUM, "little")])

    def decode(self, data: Bytes, shapes: Sequence[Shape], dtype: torch.dtype) -> list[Tensor]:
        """Return tensors of these shapes of untrusted bytes.

        Raises:
            MessageError: They are not what :meth:`encode` returns for tensors of these shapes.
        """
        most = self.most_bytes(shapes, dtype)
        if not CHECKSUM <= len(data) <= most:
            raise MessageError(
                f"a coded buffer has {len(data)} bytes, at most {most} are possible",
                "oversized" if len(data) > most else "malformed",
            )
        body = data[: len(data) - CHECKSUM]
        if zlib.crc32(body.data).to_bytes(CHECKSUM, "little") != data[-CHECKSUM:].tobytes():
            raise MessageError("a coded buffer does not have its checksum: it is damaged")
        head, start = (None, 0) if self.reduction is None else self.reduction.start(body, shapes)
        raw = self._values_of(body[start:], self.sections(shapes, dtype))
        if self.lossless:
            return _of_own_bytes(raw, shapes, dtype)
        lengths = self._lengths(shapes)
        flat = self.values.decode(raw, lengths) if self.values is not None else _floats(raw)
        parts: list[Floats] = np.split(flat, np.cumsum(lengths)[:-1]) if lengths else []
        found = iter(parts)
        if self.reduction is not None:
            found = self.reduction.expand(head, parts, shapes)
        return [_as(own, shape, dtype) for own, shape in zip(found, shapes, strict=True)]

    def _encode_values(
        self, names: Sequence[str], tensors: Sequence[Tensor], rng: Generators | None
    ) -> tuple[bytes, Bytes]:
        generators: list[np.random.Generator | None] = [None] * len(names)
        if self.random:
            if rng is None:
                raise MessageError(
                    f"the codec {self} draws random numbers: give its encoder an rng"
                )
            generators = [rng(name) for name in names]
        arrays: list[Floats] = [t.detach().cpu().float().contiguous().numpy() for t in tensors]
        if self.reduction is None:
            head, parts = b"", [own.reshape(-1) for own in arrays]
        else:
            parts, head = self.reduction.encode(arrays, generators)
            most = max((largest_value(torch.from_numpy(part)) for part in parts), default=0.0)
            if most > LARGEST:
                raise MessageError(
                    f"a number becomes {most:g}, at most {LARGEST:g} is coded", "out_of_range"
                )
            each = [len(self.reduction.lengths(own.shape)) for own in arrays]
            generators = [g for g, n in zip(generators, each, strict=True) for _ in range(n)]
        if self.values is not None:
            return head, self.values.encode(parts, generators)
        raw = np.concatenate(parts).view(np.uint8) if parts else np.empty(0, np.uint8)
        return head, raw

    def _coded(self, raw: Bytes, sections: Sequence[int]) -> bytes:
        """Return the values after the entropy stage, behind the lengths of all sections but one."""
        if self.entropy is None:
            return raw.tobytes()
        ends = np.cumsum(sections)
        frames = [
            self.entropy.encode(raw[end - size : end])
            for end, size in zip(ends, sections, strict=True)
        ]
        lengths = [len(frame).to_bytes(LENGTH, "little") for frame in frames[:-1]]
        return b"".join([*lengths, *frames])

    def _values_of(self, data: Bytes, sections: Sequence[int]) -> Bytes:
        """Return the bytes of values before the entropy stage."""
        if self.entropy is None:
            if len(data) != sum(sections):
                raise MessageError(
                    f"a coded buffer has {len(data)} bytes of values, it must have {sum(sections)}"
                )
            return data
        start = LENGTH * (len(sections) - 1)
        lengths = data[:start].view("<u8").tolist() if len(data) >= start else []
        rest = len(data) - start - sum(lengths)
        if len(data) < start or rest < 0:
            raise MessageError("a coded buffer is shorter than its sections")
        whole, at = np.empty(sum(sections), np.uint8), 0
        for size, length in zip(sections, [*lengths, rest], strict=True):
            whole[at : at + size] = self.entropy.decode(data[start : start + length], size)
            at, start = at + size, start + length
        return whole

    def _lengths(self, shapes: Sequence[Shape]) -> list[int]:
        if self.reduction is None:
            return [math.prod(shape) for shape in shapes]
        return [n for shape in shapes for n in self.reduction.lengths(shape)]


def pipeline(text: str | Sequence[str]) -> Pipeline:
    """Return the codec of a preset's name, a canonical text, or a list of stages.

    ``"int4"`` is the preset, ``["int4"]`` the stage alone.

    Raises:
        ValueError: A stage that there is not, with options that it has not, twice, or in a wrong order.
    """
    if isinstance(text, str):
        return _pipeline(PRESETS.get(text.strip()) or tuple(text.split(SEPARATOR)))
    if wrong := [own for own in text if not isinstance(own, str)]:
        raise ValueError(f"{wrong[0]!r} is no text of a stage, such as 'int4'")
    return _pipeline(tuple(text))


@lru_cache(1024)
def _pipeline(texts: tuple[str, ...]) -> Pipeline:
    if not any(text.strip() for text in texts):
        known = ", ".join(PRESETS)
        raise ValueError(f"a codec needs a stage: name one, or a preset ({known})")
    found = [_stage(text) for text in texts]
    kinds = (Reduction, ValueCodec, EntropyCodec)
    titles = ("a stage that keeps fewer numbers", "a quantiser or cast", "an entropy stage")
    order = [next(i for i, kind in enumerate(kinds) if isinstance(own, kind)) for own in found]
    for earlier, later in zip(range(len(found)), range(1, len(found)), strict=False):
        if order[earlier] == order[later]:
            raise ValueError(
                f"{found[earlier].name} and {found[later].name} are both {titles[order[later]]}: leave "
                "one of them out"
            )
        if order[earlier] > order[later]:
            raise ValueError(
                f"{found[later].name} is {titles[order[later]]} and stands before "
                f"{found[earlier].name}: put it there"
            )
    by_kind: dict[int, Stage] = dict(zip(order, found, strict=True))
    reduction, values, entropy = (by_kind.get(i) for i in range(3))
    assert reduction is None or isinstance(reduction, Reduction)
    assert values is None or isinstance(values, ValueCodec)
    assert entropy is None or isinstance(entropy, EntropyCodec)
    return Pipeline(reduction, values, entropy)


def _stage(text: str) -> Stage:
    options = Options(text)
    if options.stage in _BY_NAME:
        return _BY_NAME[options.stage].read(options)
    known = [*_BY_NAME, *(name for name in PRESETS if name not in _BY_NAME)]
    near = difflib.get_close_matches(options.stage, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
    if options.stage in PRESETS:
        hint = "it is a preset, which stands alone and not in a list"
    raise ValueError(f"there is no stage {options.stage[:40]!r} of a codec: {hint}")


def _require_codable(name: str, tensor: Tensor, largest: float) -> None:
    found = largest_value(tensor)
    if not math.isfinite(found):
        raise MessageError(f"tensor {name} holds NaN or infinity", "not_finite")
    if found > largest:
        raise MessageError(
            f"tensor {name} holds {found:g}, at most {largest:g} is coded", "out_of_range"
        )


def _own_bytes(tensors: Sequence[Tensor]) -> Bytes:
    """Return the bytes of tensors: the first byte of all numbers, the second of all, and so on.

    Bytes of exponents are alike, and are coded apart from those of fractions.
    """
    if not tensors:
        return np.empty(0, np.uint8)
    whole = torch.cat([t.detach().cpu().reshape(-1) for t in tensors])
    raw = whole.view(torch.uint8).numpy().reshape(-1, whole.dtype.itemsize)
    return np.ascontiguousarray(raw.T).reshape(-1)


def _of_own_bytes(raw: Bytes, shapes: Sequence[Shape], dtype: torch.dtype) -> list[Tensor]:
    rows = np.array(raw.reshape(dtype.itemsize, -1).T, order="C")
    whole = torch.from_numpy(rows.reshape(-1)).view(dtype)
    if not math.isfinite(largest_value(whole)):
        raise MessageError("a coded number is NaN or infinite", "not_finite")
    parts = torch.split(whole, [math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _floats(raw: Bytes) -> Floats:
    """Return float32 of bytes, copied.

    Raises:
        MessageError: One is not finite, or beyond ``LARGEST``.
    """
    flat: Floats = raw.copy().view(np.float32)
    if flat.size and not float(np.abs(flat).max()) <= LARGEST:
        raise MessageError("a coded number is not finite or too large", "not_finite")
    return flat


def _as(flat: Floats, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Return numbers as a tensor.

    Raises:
        MessageError: One is beyond the dtype's largest.
    """
    found = torch.from_numpy(flat).view(shape).to(dtype)
    if dtype == torch.float16 and not math.isfinite(largest_value(found)):
        raise MessageError("a coded number is beyond 65504, the largest of float16", "out_of_range")
    return found
