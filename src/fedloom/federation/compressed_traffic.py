"""The closed form of a client's bytes in a round where tensors are compressed."""

from __future__ import annotations

from dataclasses import replace

from fedloom.accounting.traffic import ParameterTraffic, Traffic, header
from fedloom.federation.codec_choice import BitBudget
from fedloom.federation.compression_messages import codecs_up, coded, coded_replies
from fedloom.tensors import Tensors, tensor_bytes
from fedloom.wire.bit_allocation import most_sent
from fedloom.wire.schema import CodecGroup, Schema
from fedloom.wire.settings import WireSettings

CONTROL = 260
"""About how many bytes a request says of its compression in, with the buffer's entry in the header."""

CHANGE = 210
"""About how many bytes the header of an encoded change has, within a request."""


def named_parts(tensors: Tensors, parts: tuple[str, ...]) -> Tensors:
    """Return what a client sends: the tensors, or those of each part, which are as large."""
    if not parts:
        return tensors
    return {f"{part}/{name}": own for part in parts for name, own in tensors.items()}


def coded_bytes(schema: Schema) -> int:
    """Return the bytes of tensors before their codecs' entropy stage; of those without, as they are."""
    plain = sum(spec.elements * spec.dtype.itemsize for spec in schema.tensors if not spec.codec)
    return plain + sum(_before_entropy(own) for own in schema.codec_groups.values())


def _before_entropy(group: CodecGroup) -> int:
    codec = group.codec
    head = codec.reduction.most_bytes(group.shapes) if codec.reduction is not None else 0
    return head + codec.raw_bytes(group.shapes, group.dtype)


def _coded_up(tensors: Tensors, settings: WireSettings) -> Schema:
    """Return the schema of what a client sends; where codecs are chosen, of what it sends until then."""
    schema = Schema.of(tensors)
    if settings.budget is not None:
        return BitBudget(settings).coded("train", schema)
    return coded_replies(schema, codecs_up(settings, str(settings.up_codec or "")))


def _share_up(sent: Tensors, settings: WireSettings) -> float:
    """Return the bytes that a client sends over those of the tensors as they are."""
    plain, schema = tensor_bytes(sent), _coded_up(sent, settings)
    if not plain:
        return 1.0
    if settings.budget is not None and any(spec.codec for spec in schema.tensors):
        beside = header(1, 1, 2)  # which the closed form adds
        return max(0, most_sent(schema) - beside) / plain
    return coded_bytes(schema) / plain


def compressed(
    traffic: Traffic,
    sent: Tensors,
    settings: WireSettings,
    parts: tuple[str, ...] = (),
    *,
    even: Tensors | None = None,
    received: Tensors | None = None,
) -> Traffic:
    """Return the closed form of a round in which tensors are sent as ``[wire]`` says.

    It is that of a client that took part in the round before: another is sent several changes, or the
    whole. What the entropy stage saves depends on the numbers, and is not in it. Of a budget it is the
    most that an answer takes where all tensors change alike, which is within the budget; with "auto", of
    the rounds before the choice.

    Args:
        traffic: Without compression.
        sent: Tensors of the shapes that a client sends, without the names of parts.
        settings: ``[wire]``.
        parts: Of what a client sends, as the method declares them.
        even: Those that it sends in rounds 2, 4, ..., where they are others.
        received: Those that it is sent, where they are others.
    """
    adapter = sent if received is None else received
    whole = tensor_bytes(adapter)
    if not settings.compresses or not isinstance(traffic, ParameterTraffic) or not whole:
        return traffic
    up = _share_up(named_parts(sent, parts), settings)
    up_even = up if even is None else _share_up(named_parts(even, parts), settings)
    down = coded_bytes(coded(Schema.of(adapter), settings.down_codec, settings)) / whole
    beside = CONTROL + (CHANGE if settings.down else 0)
    return replace(
        traffic,
        up=round(traffic.up * up),
        up_even=round(traffic.up_even * up_even),
        down=round(traffic.down * down) + (beside if traffic.down or traffic.up else 0),
    )
