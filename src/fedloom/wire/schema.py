"""Schemas: names, shapes and dtypes of a payload's tensors, names and ranges of its numbers.

A schema is fixed before anything is sent, and gives a cap on the bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from fedloom.errors import MessageError
from fedloom.tensors import Tensors
from fedloom.wire.codecs import Pipeline, pipeline
from fedloom.wire.packing import DTYPES

HEADER_BYTES = 8192
"""Room for a header: schema digest, numbers and at most ``MAX_NUMBERS`` metrics."""

FINITE = 1e300
"""Largest absolute value of a number that has no narrower range."""

MAX_NUMBERS, MAX_NUMBER_NAME = 64, 64
"""Most numbers, and most metrics, of a schema; and characters of the longest name of one."""

MAX_TENSORS, MAX_TENSOR_NAME = 100_000, 512
"""Most tensors of a schema, and characters of the longest name of one."""

MAX_RANK, MAX_PAYLOAD = 8, 1 << 40
"""Most dimensions of a tensor, and bytes of the largest payload that a schema may describe (1 TiB)."""

MAX_CODECS = 64
"""Most groups of tensors of one codec and dtype in a schema: each has an entry in the header."""

DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
"""Names of the dtypes in a schema that is sent."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of one tensor in a payload.

    Attributes:
        ragged: Whether the first dimension is an upper bound, not the exact size.
        codec: Canonical text of the codec (``wire/codecs/``) in which it travels; only floats of a fixed
            shape have one. Empty: as it is.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    ragged: bool = False
    codec: str = ""

    @cached_property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def codable(self) -> bool:
        """Whether it can have a codec."""
        return self.dtype.is_floating_point and not self.ragged


@dataclass(frozen=True)
class CodecGroup:
    """Tensors of one codec and dtype, which lie in one buffer.

    Attributes:
        codec: How they are coded.
        dtype: Of each.
        specs: In the order of the schema.
    """

    codec: Pipeline
    dtype: torch.dtype
    specs: tuple[TensorSpec, ...]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Their shapes."""
        return [spec.shape for spec in self.specs]

    @property
    def most_bytes(self) -> int:
        """Upper bound of the bytes of the buffer."""
        return self.codec.most_bytes(self.shapes, self.dtype)


@dataclass(frozen=True)
class NumberSpec:
    """Name and range of one number in a payload; both ends are in the range.

    Attributes:
        name: What it is called.
        lowest: Its smallest value.
        highest: Its largest value.
    """

    name: str
    lowest: float = -FINITE
    highest: float = FINITE

    def holds(self, value: float) -> bool:
        """Return whether a value lies in the range; NaN lies in none."""
        return self.lowest <= value <= self.highest


def fraction(name: str) -> NumberSpec:
    """Return the spec of a share of something: from 0 to 1."""
    return NumberSpec(name, 0.0, 1.0)


def amount(name: str, highest: float = 1e9) -> NumberSpec:
    """Return the spec of a number that is never below 0: a loss, a norm, a divergence, a count."""
    return NumberSpec(name, 0.0, highest)


def score(name: str) -> NumberSpec:
    """Return the spec of a number of either sign: a reward, a log-probability, a difference of them.

    A token's log-probability is rarely below minus 100 nats: 1e9 is ten million tokens of these.
    """
    return NumberSpec(name, -1e9, 1e9)


def prefixed(prefix: str, specs: tuple[NumberSpec, ...]) -> tuple[NumberSpec, ...]:
    """Return specs of the same ranges whose names begin with ``prefix``."""
    return tuple(replace(spec, name=prefix + spec.name) for spec in specs)


@dataclass(frozen=True)
class Schema:
    """What one direction of an exchange carries.

    Attributes:
        tensors: The tensors, in the order in which they are packed.
        numbers: The numbers that must be there, and no others.
        metrics: The numbers for the record that may travel beside them; each may be absent.
    """

    tensors: tuple[TensorSpec, ...] = ()
    numbers: tuple[NumberSpec, ...] = ()
    metrics: tuple[NumberSpec, ...] = ()

    @classmethod
    def of(
        cls,
        tensors: Tensors,
        numbers: tuple[NumberSpec, ...] = (),
        metrics: tuple[NumberSpec, ...] = (),
    ) -> Schema:
        """Return the schema that ``tensors`` fit."""
        specs = tuple(TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items())
        return cls(specs, numbers, metrics)

    def to_table(self) -> dict[str, Any]:
        """Return it as plain JSON, to be sent."""
        rows = [
            [s.name, list(s.shape), _dtype_name(s.dtype), s.ragged, *[s.codec] * bool(s.codec)]
            for s in self.tensors
        ]
        return {
            "tensors": rows,
            "numbers": [[s.name, s.lowest, s.highest] for s in self.numbers],
            "metrics": [[s.name, s.lowest, s.highest] for s in self.metrics],
        }

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Schema:
        """Return the schema in a table of :meth:`to_table`, which comes from an untrusted peer.

        Raises:
            MessageError: It is not such a table, or describes more than ``MAX_TENSORS`` tensors,
                ``MAX_NUMBERS`` numbers or metrics, ``MAX_RANK`` dimensions or ``MAX_PAYLOAD`` bytes.
        """
        try:
            specs = tuple(_tensor_spec(*row) for row in _few(table["tensors"], MAX_TENSORS))
            numbers = tuple(_number_spec(*row) for row in _few(table["numbers"], MAX_NUMBERS))
            metrics = tuple(_number_spec(*row) for row in _few(table["metrics"], MAX_NUMBERS))
            for group in (specs, numbers, metrics):
                if len({spec.name for spec in group}) < len(group):
                    raise ValueError("a name occurs twice")
            found = cls(specs, numbers, metrics)
            if len(found.codec_groups) > MAX_CODECS:
                raise ValueError(f"more than {MAX_CODECS} codecs")
            most = max(found.max_bytes, found.plain.max_bytes)
            if most > MAX_PAYLOAD:
                raise ValueError(f"{most} bytes, {MAX_PAYLOAD} are allowed")
        except (KeyError, TypeError, ValueError) as error:
            raise MessageError(f"a schema is malformed: {error}") from None
        return found

    @cached_property
    def digest(self) -> str:
        """64 bits of SHA-256 over names, shapes, dtypes and numbers, as 16 hex digits."""
        specs = [
            (s.name, s.shape, str(s.dtype))
            + ("ragged",) * s.ragged
            + (f"codec {s.codec}",) * bool(s.codec)
            for s in self.tensors
        ]
        ranges = [
            [(s.name, float(s.lowest), float(s.highest)) for s in group]
            for group in (self.numbers, self.metrics)
        ]
        return hashlib.sha256((repr(specs) + repr(ranges)).encode()).hexdigest()[:16]

    @cached_property
    def max_bytes(self) -> int:
        """Upper bound of an encoded payload in bytes."""
        plain = sum(s.elements * s.dtype.itemsize for s in self.tensors if not s.codec)
        return HEADER_BYTES + plain + sum(own.most_bytes for own in self.codec_groups.values())

    @cached_property
    def plain(self) -> Schema:
        """The same without codecs."""
        return self.coded(lambda spec: "") if self.codec_groups else self

    def coded(self, codec_of: Callable[[TensorSpec], str]) -> Schema:
        """Return the same with codecs.

        Args:
            codec_of: Gives the text of the codec of a tensor, or nothing; it is asked for those that are
                :attr:`TensorSpec.codable`.

        Raises:
            ValueError: A text that is no codec, or more than ``MAX_CODECS``.
        """
        found = replace(
            self,
            tensors=tuple(
                replace(s, codec=_canonical(codec_of(s)) if s.codable else "") for s in self.tensors
            ),
        )
        if len(found.codec_groups) > MAX_CODECS:
            raise ValueError(
                f"a schema has at most {MAX_CODECS} codecs, not {len(found.codec_groups)}"
            )
        return found

    @cached_property
    def groups(self) -> dict[str, list[TensorSpec]]:
        """The specs of fixed shape without a codec, by dtype name: each group is one flat buffer."""
        groups: dict[str, list[TensorSpec]] = {}
        for spec in self.tensors:
            if not spec.ragged and not spec.codec:
                groups.setdefault(_dtype_name(spec.dtype), []).append(spec)
        return groups

    @cached_property
    def codec_groups(self) -> dict[str, CodecGroup]:
        """The specs of one codec and dtype by the name of their buffer: ``c0``, ``c1``, ..."""
        groups: dict[tuple[str, torch.dtype], list[TensorSpec]] = {}
        for spec in self.tensors:
            if spec.codec:
                groups.setdefault((spec.codec, spec.dtype), []).append(spec)
        return {
            f"c{i}": CodecGroup(pipeline(codec), dtype, tuple(specs))
            for i, ((codec, dtype), specs) in enumerate(groups.items())
        }

    @cached_property
    def ragged(self) -> dict[str, TensorSpec]:
        """The ragged specs by the name of their buffer on the wire."""
        return {str(i): spec for i, spec in enumerate(self.tensors) if spec.ragged}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _few(rows: object, most: int) -> list[Any]:
    if not isinstance(rows, list) or len(rows) > most:
        raise ValueError(f"a list of at most {most} rows is expected")
    return rows


def _name(value: object, longest: int) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= longest or not value.isprintable():
        raise ValueError(f"{str(value)[:40]!r} is not a name of 1 to {longest} characters")
    return value


def _canonical(codec: str) -> str:
    return str(pipeline(codec)) if codec else ""


def _tensor_spec(
    name: object, shape: object, dtype: object, ragged: object, *codec: object
) -> TensorSpec:
    """Return a tensor's spec from a row of a table, checked."""
    sizes = tuple(_few(shape, MAX_RANK))
    if not all(type(n) is int and 0 <= n <= MAX_PAYLOAD for n in sizes):
        raise ValueError(f"{str(shape)[:80]} is not a shape")
    if not isinstance(dtype, str) or dtype not in DTYPE_NAMES:
        raise ValueError(f"{str(dtype)[:40]!r} is not a dtype that can be sent")
    if not isinstance(ragged, bool) or (ragged and not sizes):
        raise ValueError(
            "ragged must be true or false, and true only for a tensor with a dimension"
        )
    found = TensorSpec(_name(name, MAX_TENSOR_NAME), sizes, DTYPE_NAMES[dtype], ragged)
    if len(codec) > 1:
        raise ValueError("a row of a tensor has at most five entries")
    return replace(found, codec=_codec(codec[0], found)) if codec else found


def _codec(codec: object, spec: TensorSpec) -> str:
    """Return the codec of a row of a table, checked."""
    known = isinstance(codec, str) and 0 < len(codec) <= MAX_TENSOR_NAME and spec.codable
    if not isinstance(codec, str) or not known or _canonical(codec) != codec:
        raise ValueError(
            f"{str(codec)[:40]!r} is not the canonical text of a codec, of floats of a fixed shape"
        )
    return codec


def _number_spec(name: object, lowest: object, highest: object) -> NumberSpec:
    """Return a number's spec from a row of a table, checked."""
    ends = []
    for end in (lowest, highest):
        if isinstance(end, bool) or not isinstance(end, int | float) or not abs(end) <= FINITE:
            raise ValueError(f"{str(end)[:40]} is not a bound of a range")
        ends.append(float(end))
    return NumberSpec(_name(name, MAX_NUMBER_NAME), *ends)


LOSS = amount("loss")
"""Name and range of the mean loss, where an objective does not say otherwise."""
