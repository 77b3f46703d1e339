"""What a compressed exchange sends beside a method's tensors, and the rules that both sides go by."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedloom.errors import MessageError
from fedloom.tensors import State, Tensors
from fedloom.wire.codecs import Generators, Pipeline, pipeline
from fedloom.wire.messages import Payload, decode, encode
from fedloom.wire.schema import Schema, TensorSpec, amount
from fedloom.wire.settings import WireSettings

PREFIX = "[wire] "
"""What names begin with of tensors of messages, and of slots of a client's store, that no method sees."""

CONTROL, MISSED, UPDATES = f"{PREFIX}control", f"{PREFIX}missed ", f"{PREFIX}updates"
"""Tensors of messages: what a request says of itself, as JSON; changes that a client has missed, each an
encoded message; and how often a client has moved its h of ``ef21``."""

SQUARES = f"{PREFIX}squares"
"""Tensor of answers under a budget: the mean square of each tensor as it is coded."""

LARGEST_SQUARE = 2.0**100
"""Largest mean square that is said, a float32."""

CodecOf = Callable[[TensorSpec], str]
"""Gives the text of the codec of a tensor, or nothing where it travels as it is."""

HELD, RESIDUAL, ESTIMATE = f"{PREFIX}held ", f"{PREFIX}residual ", f"{PREFIX}estimate "
"""Slots of a client's store, each before an action: the model that it holds; e; h of ``ef21``."""

ADAPTER = "adapter/"
"""What names of the adapter begin with in messages of several parts."""

SINCE, COUNT = f"{PREFIX}round", f"{PREFIX}count"
"""Tensors in slots: the round of a residual, and how often h of ``ef21`` was moved."""

CODING_ERROR = amount("coding_error")
"""What a client reports of its codec: squared error of what is read over the square of what it coded."""

CODED = f"{PREFIX}coded "
"""Before the codec and the name of a tensor of no fixed shape: its number of rows, and an encoded message
of it."""

ROWS = 4
"""Bytes of the number of rows."""

LONGEST_CONTROL = 4096
"""Bytes of what a request says of itself, at most."""


def is_ours(name: str) -> bool:
    """Return whether a tensor or a slot is of the compression, and of no method."""
    return name.startswith(PREFIX)


def of_methods(slots: Mapping[str, Tensors]) -> dict[str, Tensors]:
    """Return the slots of a client's store that its method sees."""
    return {name: own for name, own in slots.items() if not is_ours(name)}


def is_coded(spec: TensorSpec, settings: WireSettings) -> bool:
    """Return whether a tensor is large enough to be coded, and of a kind that can be."""
    if not spec.dtype.is_floating_point or len(spec.shape) < 2:
        return False
    return spec.elements * spec.dtype.itemsize >= settings.keep_plain_below


def coded(schema: Schema, codec: Pipeline | None, settings: WireSettings) -> Schema:
    """Return a schema of which all tensors of fixed shape are coded that can be, given a codec."""
    if codec is None:
        return schema
    return schema.coded(lambda spec: str(codec) if is_coded(spec, settings) else "")


def codecs_up(
    settings: WireSettings, codec: str = "", dealt: Mapping[str, str] | None = None
) -> CodecOf:
    """Return the codec of each tensor of an answer.

    Args:
        settings: ``[wire]``, of which parts have codecs of their own.
        codec: Of all others.
        dealt: Of those that have a budget, by name.
    """

    def codec_of(spec: TensorSpec) -> str:
        if not is_coded(spec, settings):
            return ""
        part = settings.part_of(spec.name)
        if part is not None:
            own = settings.parts[part]
            return str(pipeline(own)) if own else ""
        return codec if dealt is None else dealt.get(spec.name, "")

    return codec_of


def coded_replies(schema: Schema, codec_of: CodecOf) -> Schema:
    """Return a schema whose tensors are coded, those of no fixed shape as bytes of their own."""
    specs = []
    for spec in schema.coded(codec_of).tensors:
        codec = codec_of(spec) if spec.ragged else ""
        specs.append(_blob_of(spec, pipeline(codec)) if codec else spec)
    return replace(schema, tensors=tuple(specs))


def as_blob(name: str) -> tuple[str, str] | None:
    """Return codec and name of a tensor of no fixed shape that is bytes of its own, else ``None``."""
    if not name.startswith(CODED):
        return None
    codec, _, plain = name.removeprefix(CODED).partition(" ")
    return codec, plain


def plain_name(name: str) -> str:
    """Return the name that a tensor has before it is coded."""
    own = as_blob(name)
    return own[1] if own is not None else name


def codecs_in(schema: Schema) -> set[str]:
    """Return the texts of all codecs of an answer; "" where a tensor is as it is."""
    blobs = (as_blob(spec.name) for spec in schema.tensors)
    return {spec.codec for spec in schema.tensors} | {own[0] for own in blobs if own is not None}


def coded_names(schema: Schema) -> list[str]:
    """Return the names of the tensors of an answer that are coded, as they are before."""
    return [plain_name(s.name) for s in schema.tensors if s.codec or s.name.startswith(CODED)]


def dealt_names(schema: Schema, settings: WireSettings) -> list[str]:
    """Return the names of the tensors of an answer whose codecs a budget deals out."""
    return [name for name in coded_names(schema) if settings.part_of(name) is None]


def _blob_of(spec: TensorSpec, codec: Pipeline) -> TensorSpec:
    most = _alone(spec, spec.shape, codec).max_bytes
    return TensorSpec(f"{CODED}{codec} {spec.name}", (ROWS + most,), torch.uint8, ragged=True)


def _alone(spec: TensorSpec, shape: tuple[int, ...], codec: Pipeline) -> Schema:
    return Schema((TensorSpec(spec.name, shape, spec.dtype, codec=str(codec)),))


def packed_rows(name: str, tensor: Tensor, codec: Pipeline, rng: Generators) -> Tensor:
    """Return a tensor without a fixed shape as bytes: its rows, and an encoded message of it."""
    spec = TensorSpec(name, tuple(tensor.shape), tensor.dtype)
    data = encode(Payload({name: tensor}), _alone(spec, spec.shape, codec), rng)
    return blob(len(tensor).to_bytes(ROWS, "little") + data)


def unpacked_rows(data: Tensor, spec: TensorSpec, codec: Pipeline) -> Tensor:
    """Return a tensor of :func:`packed_rows`, of an untrusted peer.

    Args:
        data: The bytes.
        spec: With the most rows that it may have.
        codec: How it is coded.

    Raises:
        MessageError: It has more rows, or is not such a tensor.
    """
    raw = data.numpy().tobytes()
    rows = int.from_bytes(raw[:ROWS], "little")
    if len(raw) < ROWS or rows > spec.shape[0]:
        raise MessageError(
            f"tensor {spec.name} has {rows} rows, at most {spec.shape[0]} are asked for"
        )
    return decode(raw[ROWS:], _alone(spec, (rows, *spec.shape[1:]), codec)).tensors[spec.name]


def is_difference(
    name: str, tensor: Tensor, sent: Tensors, changes: tuple[str, ...] | None
) -> bool:
    """Return whether a tensor of a reply is sent as the change of what was received.

    Args:
        name: Its name.
        tensor: As it is replied, or a change of that.
        sent: What the client was sent.
        changes: As of :class:`Control`.
    """
    if changes is None or not tensor.is_floating_point() or is_change(name, changes):
        return False
    return name in sent and sent[name].shape == tensor.shape


def is_change(name: str, changes: tuple[str, ...] | None) -> bool:
    """Return whether a tensor of a reply is a change already, of what moves by what the server reads.

    What a codec loses of it is in the next one: it has no error feedback.
    """
    return bool(changes) and name.startswith(changes or ())


def moved_estimate(before: Tensors, change: Tensors, names: Iterable[str]) -> Tensors:
    """Return h of ``ef21`` after a change, computed alike by server and client.

    Args:
        before: h; a tensor that is absent, or of another shape (another rank), begins at 0.
        change: What was decoded.
        names: Of the tensors of this change that have an estimate; others in h stay.
    """
    after = {
        name: before[name] + change[name].float()
        if name in before and before[name].shape == change[name].shape
        else change[name].float()
        for name in names
    }
    return {**before, **after}


def start_of(specs: Iterable[TensorSpec], initial: Tensors) -> Tensors:
    """Return what every party holds before the first round: the adapter as initialised, and zeros."""
    found = {}
    for spec in specs:
        own = initial.get(spec.name, initial.get(spec.name.removeprefix(ADAPTER)))
        if own is None or tuple(own.shape) != spec.shape:
            own = torch.zeros(spec.shape)
        found[spec.name] = own.detach().to("cpu", spec.dtype)
    return found


def moved(held: Tensors, change: Tensors) -> Tensors:
    """Return what is held after a change, computed alike on every machine."""
    return {name: (own.float() + change[name].float()).to(own.dtype) for name, own in held.items()}


def digest(tensors: Tensors) -> str:
    """Return SHA-256 of tensors."""
    return State(tensors).digest()


def blob(data: bytes) -> Tensor:
    """Return bytes as a tensor."""
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def blob_spec(name: str, data: bytes) -> TensorSpec:
    """Return the spec of bytes as a tensor."""
    return TensorSpec(name, (len(data),), torch.uint8)


@dataclass(frozen=True)
class Control:
    """What a request says of itself.

    Attributes:
        held: SHA-256 of what the client then holds; empty where nothing is held.
        whole: Whether it is sent whole, and not as changes.
        missed: How many earlier changes come with it.
        changes: As of :class:`fedloom.wire.messages.Exchange`; ``None`` where all of a reply are changes.
        afresh: Whether the client begins its error feedback anew.
        down: Codec of the changes, where the experiment has it chosen.
    """

    held: str = ""
    whole: bool = True
    missed: int = 0
    changes: tuple[str, ...] | None = ()
    afresh: bool = False
    down: str = ""

    def packed(self) -> bytes:
        """Return it as bytes."""
        own = {key: value for key, value in self.__dict__.items() if key != "down" or value}
        return json.dumps(own, sort_keys=True).encode()

    @classmethod
    def read(cls, data: bytes) -> Control:
        """Return what a server says, checked.

        Raises:
            MessageError: It says something else.
        """
        try:
            if len(data) > LONGEST_CONTROL:
                raise ValueError("it is too long")
            found = json.loads(data)
            own = cls(**found)
            changes = own.changes if own.changes is None else tuple(own.changes)
            sound = isinstance(own.held, str) and type(own.missed) is int and own.missed >= 0
            sound = sound and isinstance(own.down, str)
            sound = sound and isinstance(own.whole, bool) and isinstance(own.afresh, bool)
            if not sound or not all(isinstance(one, str) for one in changes or ()):
                raise ValueError("a value is of another type")
        except (ValueError, TypeError, RecursionError) as error:
            raise MessageError(f"what a request says of its compression: {error}") from None
        return replace(own, changes=changes)
