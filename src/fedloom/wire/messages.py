"""Messages between server and clients, and the checks on arrival.

An :class:`Exchange` asks some clients for one action. Both directions have a :class:`Schema`, fixed
before anything is sent: names, shapes, dtypes, and numbers with their ranges, and with them a cap on the
bytes. A payload is encoded once, as safetensors (``packing.py``) without per-tensor names: all tensors of
a dtype lie in one flat buffer in the order of the schema, whose digest travels in the header. So the
header costs a few hundred bytes whatever the number of tensors, a payload of another model is refused
before it is decoded, bf16 stays bf16, and the ledger counts these very bytes. No pickle, ever.

Tensors that have a codec in the schema (``wire/codecs/``) lie in one buffer of bytes for each codec.
Sizes come from the schema there as well.

Where a method cannot know how many rows will come (the tokens of a batch, the entries of a sparse
table), a tensor is *ragged*: its schema gives the most rows there may be, and it has a buffer of its own.

This file knows no method and no engine.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fedloom.errors import MessageError, ViolationKind
from fedloom.tensors import OnDemand, Tensors, largest_values
from fedloom.wire.codecs import Generators
from fedloom.wire.packing import METADATA, Buffer, buffers_of, content, header_of, pack
from fedloom.wire.schema import (
    FINITE,
    HEADER_BYTES,
    MAX_NUMBER_NAME,
    NumberSpec,
    Schema,
    TensorSpec,
)


@dataclass(frozen=True)
class Payload:
    """Decoded content of a message: tensors, the schema's numbers, and metrics for the record."""

    tensors: Tensors = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Buffered:
    """How an asynchronous exchange is carried: clients work at their own pace, some answers are taken.

    Attributes:
        size: Answers that are taken, the earliest, also to requests of earlier rounds.
        concurrency: Clients that are at work at a time.
    """

    size: int
    concurrency: int


@dataclass(frozen=True)
class AddedNoise:
    """Noise that each client adds to its answer before it is masked (``privacy/distributed_noise.py``).

    Attributes:
        multiplier: z, standard deviation of the noise that is relied on, over the clip.
        clip: C, largest Euclidean norm of an answer's change over all tensors together.
        colluding: Clients of a sum that may tell others their noise.
    """

    multiplier: float
    clip: float
    colluding: int


@dataclass(frozen=True)
class Masking:
    """How replies are masked, so that only their sum can be read (``federation/secure_exchange.py``).

    Attributes:
        run: Id of the run, and which time it has been started or resumed.
        number: Which of the round's sums it is, from 0.
        bits: Of a value.
        bound: Largest absolute value; what is beyond is cut off.
        clients: The most that are summed.
        rows: Rows of the largest client that counts; a larger one weighs as this.
        stochastic: Whether values are rounded at random, so that their mean is kept.
        contents: Schema of a reply before it is masked.
        messages: What each client is sent of the protocol beside its request.
        noise: What clients add themselves; changes are then clipped whole, and nothing else is summed.
    """

    run: str
    number: int
    bits: int
    bound: float
    clients: int
    rows: int
    stochastic: bool
    contents: Schema
    messages: Mapping[int, bytes] = field(default_factory=dict)
    noise: AddedNoise | None = None


@dataclass(frozen=True)
class Exchange:
    """One request to some clients and the schemas of both directions.

    Attributes:
        action: Name of the client-side handler.
        round: The round, from 1 (0 is the evaluation before any training).
        request_schema: Schema of what goes to the clients.
        reply_schema: Schema of what must come back.
        requests: Encoded payload for each client; equal payloads may be the same object.
        check: Checks a reply beyond its schema, given the client and its payload; raises
            :class:`MessageError` where it is wrong. That client is left out of the round.
        buffered: How many of the clients in ``requests`` are asked at a time, and how many answers are
            taken; ``None``: all.
        replies_are_changes: Whether tensors of replies are changes of those that were sent.
        alike: What the names of tensors begin with whose mean is over clients alike, not by their rows.
        masking: How replies are masked, where they are.
        changes: What the names begin with of those tensors of replies that are changes already, of
            something that the client keeps.
        schemas: Schemas of the requests of those clients whose requests have another than
            ``request_schema``.
        plain: The exchange as its method asked for it, where it is carried in another form.
        read: Makes of a client's reply, as bytes, the payload that the method expects, where it is
            carried in another form.
    """

    action: str
    round: int
    request_schema: Schema
    reply_schema: Schema
    requests: Mapping[int, bytes]
    check: Callable[[int, Payload], None] | None = None
    buffered: Buffered | None = None
    replies_are_changes: bool = False
    alike: tuple[str, ...] = ()
    masking: Masking | None = None
    changes: tuple[str, ...] = ()
    schemas: Mapping[int, Schema] = field(default_factory=dict)
    plain: Exchange | None = None
    read: Callable[[int, bytes], Payload] | None = None

    @cached_property
    def digests(self) -> dict[int, str]:
        """SHA-256 of each client's request; a request to all is hashed once."""
        found: dict[int, str] = {}
        for data in self.requests.values():
            if id(data) not in found:
                found[id(data)] = hashlib.sha256(data).hexdigest()
        return {client: found[id(data)] for client, data in self.requests.items()}

    @property
    def changes_replied(self) -> tuple[str, ...] | None:
        """What names of tensors begin with that are replied as changes; ``None`` where all are."""
        return None if self.replies_are_changes else self.changes

    def bytes_down(self, client: int) -> int:
        """Return the bytes that a client is sent."""
        beside = self.masking.messages.get(client, b"") if self.masking is not None else b""
        return len(self.requests[client]) + len(beside)

    def schema_of(self, client: int) -> Schema:
        """Return the schema of a client's request."""
        return self.schemas.get(client, self.request_schema)

    def sent_to(self, client: int) -> Tensors:
        """Return the tensors that a client was sent, as the method sees them; not to be changed."""
        return (self.plain or self).request_to(client).tensors

    def request_to(self, client: int) -> Payload:
        """Return a client's request; the same bytes that several are sent are decoded once."""
        data = self.requests[client]
        if id(data) not in self._decoded:
            self._decoded.clear()
            self._decoded[id(data)] = decode(data, self.schema_of(client))
        return self._decoded[id(data)]

    @cached_property
    def _decoded(self) -> dict[int, Payload]:
        """The request that was decoded last, by its identity."""
        return {}

    def read_reply(self, client: int, data: bytes) -> Payload:
        """Return what a client replied, as the method expects it.

        Raises:
            MessageError: It does not fit the schema.
        """
        return decode(data, self.reply_schema) if self.read is None else self.read(client, data)

    @classmethod
    def broadcast(
        cls,
        action: str,
        round: int,
        clients: tuple[int, ...],
        payload: Payload,
        schema: Schema,
        reply_schema: Schema,
        check: Callable[[int, Payload], None] | None = None,
        alike: tuple[str, ...] = (),
        changes: tuple[str, ...] = (),
    ) -> Exchange:
        """Ask every client the same; the payload is encoded once."""
        requests = dict.fromkeys(clients, encode(payload, schema))
        return cls(
            action, round, schema, reply_schema, requests, check, alike=alike, changes=changes
        )


@dataclass(frozen=True)
class Answer:
    """One client's answer as the engine returns it: encoded bytes, or why there are none.

    Attributes:
        client: Who was asked.
        data: Encoded payload.
        error: Why there is none.
        digest: SHA-256 of the payload, where the engine has found it already.
        violation: Kind of protocol violation, where it is proven that the client sent what it must not
            send; ``None`` where the client failed.
    """

    client: int
    data: bytes | None = None
    error: str | None = None
    digest: str | None = None
    violation: ViolationKind | None = None


@dataclass(frozen=True)
class Reply:
    """An answer that passed every check.

    Attributes:
        client: Who was asked.
        payload: Its content.
        staleness: Server updates since the client was asked; 0 in a synchronous round.
    """

    client: int
    payload: Payload
    staleness: int = 0


def encode(payload: Payload, schema: Schema, rng: Generators | None = None) -> bytes:
    """Encode a payload as the bytes that travel.

    A metric that is not finite or not in its range is left out: the receiver would refuse the whole
    message, and an honest client whose training diverges has violated nothing. A sender that needs to
    know what the receiver will see of tensors with a codec decodes these bytes.

    Args:
        payload: What is sent.
        schema: What it holds, and in which codecs.
        rng: Gives the generator of a tensor's random numbers, given its name; only some codecs draw any
            (:attr:`~fedloom.wire.codecs.Pipeline.random`).

    Raises:
        MessageError: The payload does not fit ``schema`` (a mistake in a method, not at the peer), a
            number is not in its range, or a tensor with a codec is not finite.
    """
    tensors = fitting_tensors(payload, schema)
    buffers = {}
    for dtype, specs in schema.groups.items():
        shape = (sum(spec.elements for spec in specs),)
        buffers[dtype] = Buffer(specs[0].dtype, shape, [tensors[spec.name] for spec in specs])
    for key, spec in schema.ragged.items():
        tensor = tensors[spec.name]
        buffers[key] = Buffer(spec.dtype, tuple(tensor.shape), [tensor])
    for key, group in schema.codec_groups.items():
        own = [(spec.name, tensors[spec.name]) for spec in group.specs]
        data = group.codec.encode([name for name, _ in own], [tensor for _, tensor in own], rng)
        buffers[key] = Buffer(
            torch.uint8, (len(data),), [torch.frombuffer(bytearray(data), dtype=torch.uint8)]
        )
    metadata = {"schema": schema.digest}
    if schema.numbers:
        metadata["numbers"] = json.dumps([payload.numbers[spec.name] for spec in schema.numbers])
    metrics = metrics_in_range(payload, schema)
    if metrics:
        metadata["metrics"] = json.dumps(metrics)
    return pack(buffers, metadata)


def with_metrics(data: bytes, schema: Schema, metrics: Mapping[str, float]) -> bytes:
    """Return an encoded payload with these metrics, without encoding its tensors again.

    Args:
        data: Of :func:`encode`.
        schema: Of the payload.
        metrics: All its metrics; those that are not in their ranges are left out.
    """
    header, start = header_of(data, HEADER_BYTES)
    buffers = {
        name: Buffer(own.dtype, own.shape, [content(data, start, own)])
        for name, own in buffers_of(header, len(data) - start).items()
    }
    metadata = dict(cast("dict[str, str]", header[METADATA]))
    metadata.pop("metrics", None)
    if found := metrics_in_range(Payload(metrics=metrics), schema):
        metadata["metrics"] = json.dumps(found)
    return pack(buffers, metadata)


def fitting_tensors(payload: Payload, schema: Schema) -> Tensors:
    """Return a payload's tensors in the order of a schema.

    Raises:
        MessageError: The payload does not fit it, or a number is not in its range.
    """
    _check_names(payload, schema)
    return {spec.name: _checked(payload.tensors[spec.name], spec) for spec in schema.tensors}


def metrics_in_range(payload: Payload, schema: Schema) -> dict[str, float]:
    """Return those of a payload's metrics that are finite and in their ranges."""
    ranges = {spec.name: spec for spec in schema.metrics}
    return {name: v for name, v in payload.metrics.items() if ranges[name].holds(v)}


def decode(data: bytes, schema: Schema) -> Payload:
    """Decode bytes from a peer that is not trusted.

    Args:
        data: Encoded payload.
        schema: What it must hold. Nothing is allocated for a payload of another schema.

    Returns:
        Tensors that share memory with one buffer per dtype, and numbers and metrics in their ranges.

    Raises:
        MessageError: It is too large, not safetensors, of another schema, or holds numbers or metrics
            that are not declared, not finite or out of range.
    """
    if len(data) > schema.max_bytes:
        raise MessageError(
            f"payload has {len(data)} bytes, the schema allows {schema.max_bytes}", "oversized"
        )
    header, start = header_of(data, HEADER_BYTES)
    metadata = header.get(METADATA)
    if not isinstance(metadata, dict) or metadata.get("schema") != schema.digest:
        raise MessageError(
            "payload was made for another schema (other tensors, shapes, dtypes or numbers)"
        )
    buffers, tensors = buffers_of(header, len(data) - start), {}
    for dtype, specs in schema.groups.items():
        sizes = [spec.elements for spec in specs]
        own = buffers.pop(dtype, None)
        if own is None or own.shape != (sum(sizes),) or own.dtype != specs[0].dtype:
            raise MessageError(f"payload must hold {sum(sizes)} elements of {dtype} in one buffer")
        for spec, part in zip(specs, torch.split(content(data, start, own), sizes), strict=True):
            tensors[spec.name] = part.view(spec.shape)
    for key, spec in schema.ragged.items():
        own = buffers.pop(key, None)
        if own is None or not _fits(own, spec):
            found = "absent" if own is None else f"{own.dtype} {own.shape}"
            raise MessageError(
                f"tensor {spec.name} is {found}, it must be {spec.dtype} with at most "
                f"{spec.shape[0]} rows of {spec.shape[1:]}"
            )
        tensors[spec.name] = content(data, start, own)
    for key, group in schema.codec_groups.items():
        own = buffers.pop(key, None)
        if own is None or own.dtype != torch.uint8 or len(own.shape) != 1:
            raise MessageError(
                f"payload must hold the tensors of {group.codec} in one buffer of bytes"
            )
        raw = np.frombuffer(data, np.uint8, own.size, start + own.start)
        parts = group.codec.decode(raw, group.shapes, group.dtype)
        tensors |= zip([spec.name for spec in group.specs], parts, strict=True)
    if buffers:
        raise MessageError(f"payload holds buffers that were not asked for: {sorted(buffers)[:5]}")
    ordered = {spec.name: tensors[spec.name] for spec in schema.tensors}
    return Payload(ordered, _read_numbers(metadata, schema), _read_metrics(metadata, schema))


class StoredTensors(OnDemand):
    """Tensors of an encoded payload in a file; each is read on access and not kept."""

    def __init__(self, path: Path, schema: Schema) -> None:
        """Find each tensor of ``schema``, without codecs, in a file that :func:`decode` has accepted."""
        if schema.codec_groups:
            raise ValueError("tensors with a codec cannot be read one by one: store schema.plain")
        with path.open("rb") as file:
            header, begin = header_of(file.read(8 + HEADER_BYTES), HEADER_BYTES)
        buffers = buffers_of(header, path.stat().st_size - begin)
        self.path = path
        self._places: dict[str, tuple[int, TensorSpec, tuple[int, ...]]] = {}
        for dtype, specs in schema.groups.items():
            start = begin + buffers[dtype].start
            for spec in specs:
                self._places[spec.name] = start, spec, spec.shape
                start += spec.elements * spec.dtype.itemsize
        for key, spec in schema.ragged.items():
            self._places[spec.name] = begin + buffers[key].start, spec, buffers[key].shape
        super().__init__(dict.fromkeys((spec.name for spec in schema.tensors), torch.empty(0)))

    def __getitem__(self, name: str) -> Tensor:
        start, spec, shape = self._places[name]
        count = math.prod(shape) * spec.dtype.itemsize
        raw = np.fromfile(self.path, np.uint8, count, offset=start)
        return torch.from_numpy(raw).view(spec.dtype).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def get(self, name: str, default: Any = None) -> Any:
        """Return a tensor, or ``default``."""
        return self[name] if name in self else default  # noqa: SIM401 (this is get)

    def items(self) -> Iterator[tuple[str, Tensor]]:  # type: ignore[override]
        """Yield names and tensors."""
        return ((name, self[name]) for name in self.keys())

    def values(self) -> Iterator[Tensor]:  # type: ignore[override]
        """Yield tensors."""
        return (self[name] for name in self.keys())


def require_finite(payload: Payload) -> dict[str, float]:
    """Check that every tensor is finite; return the largest absolute value of each that holds fractions.

    Raises:
        MessageError: A tensor holds NaN or infinity; the first such tensor is named.
    """
    largest = largest_values(payload.tensors)
    for name, value in largest.items():
        if not math.isfinite(value):
            raise MessageError(f"tensor {name} holds NaN or infinity", "not_finite")
    return largest


def _check_names(payload: Payload, schema: Schema) -> None:
    names = {spec.name for spec in schema.tensors}
    numbers = {spec.name for spec in schema.numbers}
    for what, found, asked in (
        ("tensors", payload.tensors.keys(), names),
        ("numbers", payload.numbers.keys(), numbers),
    ):
        if lacking := sorted(asked - found):
            more = f", and has {_few_of(found - asked)}" if found - asked else ""
            raise MessageError(
                f"a payload lacks the {what} {_few_of(lacking)} of its schema{more}: names are those of "
                "what was asked for"
            )
        if extra := found - asked:
            raise MessageError(
                f"a payload has the {what} {_few_of(extra)}, which its schema has not"
            )
    for spec in schema.numbers:
        _require_in_range(f"number {spec.name}", payload.numbers[spec.name], spec)
    if undeclared := payload.metrics.keys() - {spec.name for spec in schema.metrics}:
        raise MessageError(
            f"metrics {sorted(undeclared)[:5]} are not declared: what reports them (an objective in "
            "`reported`, a method in its schema, as by training_exchange(..., metrics=(NumberSpec(name, "
            "lowest, highest),))) declares the name and range of each"
        )


def _few_of(names: Iterable[str]) -> str:
    """Return the first of some names, and how many more there are."""
    ordered = sorted(names)
    more = len(ordered) - 3
    return ", ".join(map(repr, ordered[:3])) + f" and {more} more" * (more > 0)


def _fits(tensor: Tensor | Buffer, spec: TensorSpec) -> bool:
    shape = tuple(tensor.shape)
    if spec.ragged:
        shape_fits = len(shape) == len(spec.shape) and shape[1:] == spec.shape[1:]
        shape_fits = shape_fits and shape[0] <= spec.shape[0]
    else:
        shape_fits = shape == spec.shape
    return shape_fits and tensor.dtype == spec.dtype


def _checked(tensor: Tensor, spec: TensorSpec) -> Tensor:
    if not _fits(tensor, spec):
        raise MessageError(
            f"tensor {spec.name} is {tensor.dtype} {tuple(tensor.shape)}, "
            f"the schema asks for {spec.dtype} {spec.shape}"
        )
    return tensor.detach()


def _read_numbers(metadata: dict[str, str], schema: Schema) -> dict[str, float]:
    if not schema.numbers:
        return {}
    values, names = _json(metadata.get("numbers")), [spec.name for spec in schema.numbers]
    if not isinstance(values, list) or len(values) != len(names):
        raise MessageError(f"payload must hold the numbers {', '.join(names)}")
    for spec, value in zip(schema.numbers, values, strict=True):
        _require_in_range(f"number {spec.name}", value, spec)
    return dict(zip(names, values, strict=True))


def _read_metrics(metadata: dict[str, str], schema: Schema) -> dict[str, float]:
    if "metrics" not in metadata:
        return {}
    values, declared = _json(metadata["metrics"]), {spec.name: spec for spec in schema.metrics}
    if not isinstance(values, dict):
        raise MessageError("metrics must be named numbers")
    if len(values) > len(declared):
        raise MessageError(
            f"payload holds {len(values)} metrics, {len(declared)} are declared", "too_many_names"
        )
    for name, value in values.items():
        if name not in declared:
            raise MessageError(f"metric {name[:MAX_NUMBER_NAME]!r} is not declared")
        _require_in_range(f"metric {name}", value, declared[name])
    return {name: float(value) for name, value in values.items()}


def _require_in_range(what: str, value: object, spec: NumberSpec) -> None:
    """Check one number.

    Raises:
        MessageError: It is not a number, not finite, or out of its range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MessageError(f"{what} is {str(value)[:40]!r}, it must be a number")
    if not abs(value) <= FINITE:
        raise MessageError(f"{what} must be finite, within {FINITE:g}", "not_finite")
    if not spec.holds(value):
        raise MessageError(
            f"{what} is {float(value):.6g}, it must be {spec.lowest:g} to {spec.highest:g}",
            "out_of_range",
        )


def _json(text: object) -> object:
    try:
        return json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
