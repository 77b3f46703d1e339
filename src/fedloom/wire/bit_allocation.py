"""Bits dealt over tensors within a budget of bytes, by a rate-distortion rule. Pure.

Independent Gaussians of variances v_i lose least in R bits by reverse water-filling (Cover and Thomas,
*Elements of Information Theory*, theorem 10.3.3): all lose the same D, those of a smaller variance
nothing is sent of. Where the rates are those of a few codecs, of errors e_c relative to the variance and
bits b_c, the same follows from one slope (Shoham and Gersho 1988, "Efficient bit allocation for an
arbitrary set of quantizers"): a step of tensor i from codec c to the next is worth

    v_i (e_c - e_c+1) / (b_c+1 - b_c)

of squared error a bit, and steps are taken from the most worth on, until the budget ends. ``e`` is
measured (``docs/codecs.md``, of changes as AdamW makes them), ``b`` derived: the most that a message can
take, so that the budget is never passed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch

from fedloom.wire.codecs import Pipeline, pipeline
from fedloom.wire.codecs.blocks import BlockCodec
from fedloom.wire.codecs.digits import per_byte
from fedloom.wire.codecs.pipeline import CHECKSUM, LENGTH
from fedloom.wire.codecs.stage import Shape
from fedloom.wire.schema import Schema, TensorSpec

UNBIASED = {"ternary": 0.641, "int3": 0.0569, "int4": 0.0104, "int8": 3.56e-5}
"""Codecs that round at random, from strong to mild, and their squared errors over the variance."""

NOTHING = "nothing"
"""Codec of tensors of which nothing is sent."""

RETURNED = {
    NOTHING: 1.0,
    "ternary:nearest": 0.389,
    "int3:nearest": 0.0285,
    "int4:nearest": 0.00522,
    "int8:nearest": 1.78e-5,
}
"""The same of codecs whose errors are returned by error feedback."""

TRIES = 16
"""Steps that are tried for what is left of a budget, behind the first one that does not fit."""

FRAME, BLOCK = 32, 1 << 17
"""Bytes of a frame of zstd beside its blocks, at most, and the largest content of a block."""

TABLE = 160
"""Bytes of a block's Huffman table and of its headers, at most."""


def ladder(*, returned: bool) -> tuple[tuple[str, float], ...]:
    """Return codecs and their errors, from strong to mild.

    Args:
        returned: Whether error feedback returns what they lose.
    """
    own = RETURNED if returned else UNBIASED
    found = [(name if name == NOTHING else f"{name}|zstd", error) for name, error in own.items()]
    return tuple((str(pipeline(name)), error) for name, error in found)


def most_coded(codec: Pipeline, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
    """Return the most bytes that tensors take in a codec.

    It is below what a decoder takes (``Pipeline.most_bytes``) where codes of few values lie in a byte of
    256: a Huffman code of S values has at most the mean length of S equally frequent ones.
    """
    if not isinstance(codec.values, BlockCodec) or codec.reduction or codec.entropy is None:
        return codec.most_bytes(shapes, dtype)
    *scales, codes = codec.sections(shapes, dtype)
    base = len(codec.values.levels)
    blocks = 1 + codes // BLOCK
    plain = codes + (codes >> 8) + 4 * blocks
    coded = math.ceil(codes * _mean_length(base ** per_byte(base)) / 8 * 1.01) + TABLE * blocks
    found = min(plain, coded) + sum(own + (own >> 8) + 4 + FRAME for own in scales)
    return min(found + FRAME + LENGTH * len(scales) + CHECKSUM, codec.most_bytes(shapes, dtype))


def _mean_length(symbols: int) -> float:
    """Return the mean length in bits of a Huffman code of equally frequent symbols.

    2^k of S symbols or more have k bits, where 2^k is the largest power of two within S, and the others
    k + 1: 49 symbols have 15 of 5 bits and 34 of 6, (15 * 5 + 34 * 6) / 49 = 5.69.
    """
    short = symbols.bit_length() - 1
    longer = 2 * (symbols - (1 << short))
    return short + longer / symbols


@cache
def most_bits(codec: str) -> float:
    """Return the most bits of a number of a large tensor in a codec."""
    shape = (1024, 1024)
    return 8 * most_coded(pipeline(codec), [shape], torch.float32) / math.prod(shape)


def most_sent(schema: Schema) -> int:
    """Return the most bytes of a message of a schema, header included."""
    plain = sum(s.elements * s.dtype.itemsize for s in schema.tensors if not s.codec)
    groups = schema.codec_groups.values()
    coded = sum(most_coded(own.codec, own.shapes, own.dtype) for own in groups)
    return _header(schema) + plain + coded


def _header(schema: Schema) -> int:
    """Return the most bytes of a message's header (``wire/packing.py``)."""
    number, size = "-1.2345678901234567e-300", 10**13
    entry = {"dtype": "BF16", "shape": [size], "data_offsets": [size, size]}
    names = [*schema.groups, *schema.codec_groups, *schema.ragged]
    metrics = {spec.name: number for spec in schema.metrics}
    metadata = {
        "schema": schema.digest,
        "numbers": json.dumps([number] * len(schema.numbers)),
        "metrics": json.dumps(metrics),
    }
    sizes = 20 * sum(len(spec.shape) for spec in schema.ragged.values())
    return 16 + len(json.dumps({"__metadata__": metadata, **dict.fromkeys(names, entry)})) + sizes


@dataclass(frozen=True)
class Allocation:
    """What a budget is dealt to.

    Attributes:
        specs: The tensors that are coded.
        codecs: As :func:`ladder` returns them.
        make: Makes the schema of the message, given the codec of each tensor by name.
    """

    specs: tuple[TensorSpec, ...]
    codecs: tuple[tuple[str, float], ...]
    make: Callable[[Mapping[str, str]], Schema]

    @property
    def least(self) -> int:
        """The smallest budget in bytes: all tensors in the strongest codec.

        Where that is none at all, there is room for any one tensor in the next.
        """
        taken = [0] * len(self.specs)
        if self.codecs[0][0] == NOTHING:
            taken[max(range(len(taken)), key=lambda i: self.specs[i].elements)] = 1
        return self._bytes(taken)

    def dealt(self, budget: int, squares: Mapping[str, float]) -> dict[str, str]:
        """Return the codec of each tensor.

        Args:
            budget: Bytes of a message, at least :attr:`least`.
            squares: Mean square of each tensor; one that is absent counts as the largest of the others,
                and where none is known, all count alike.
        """
        order = self._steps(squares)
        low, high = 0, len(order)
        while low < high:  # the most steps that fit
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._fits(order[:middle], budget) else (low, middle - 1)
        taken = self._taken(order[:low])
        left = set(range(len(self.specs)))
        for tensor in order[low : low + TRIES]:
            if tensor not in left:
                continue
            taken[tensor] += 1
            if self._bytes(taken) > budget:
                taken[tensor] -= 1
                left.remove(tensor)
        return self._named(taken)

    def _named(self, taken: Sequence[int]) -> dict[str, str]:
        return {s.name: self.codecs[n][0] for s, n in zip(self.specs, taken, strict=True)}

    def _bytes(self, taken: Sequence[int]) -> int:
        return most_sent(self.make(self._named(taken)))

    def _taken(self, steps: Sequence[int]) -> list[int]:
        taken = [0] * len(self.specs)
        for tensor in steps:
            taken[tensor] += 1
        return taken

    def _fits(self, steps: Sequence[int], budget: int) -> bool:
        return self._bytes(self._taken(steps)) <= budget

    def _steps(self, squares: Mapping[str, float]) -> list[int]:
        """Return whose step is next, from the one that is worth the most on."""
        worth = []
        for (codec, error), (milder, less) in pairwise(self.codecs):
            worth.append((error - less) / (most_bits(milder) - most_bits(codec)))
        known = [squares[spec.name] for spec in self.specs if spec.name in squares]
        absent = max(known, default=1.0)
        found = [
            (-squares.get(spec.name, absent) * one, step, tensor)
            for tensor, spec in enumerate(self.specs)
            for step, one in enumerate(worth)
        ]
        return [tensor for _, _, tensor in sorted(found)]
