"""The closed form of a client's bytes in a round where tensors are compressed."""

from __future__ import annotations

from dataclasses import replace

from fedloom.accounting.traffic import ParameterTraffic, Traffic
from fedloom.federation.compression_messages import coded
from fedloom.tensors import Tensors, tensor_bytes
from fedloom.wire.codecs import Pipeline
from fedloom.wire.schema import CodecGroup, Schema
from fedloom.wire.settings import WireSettings

CONTROL = 260
"""About how many bytes a request says of its compression in, with the buffer's entry in the header."""

CHANGE = 210
"""About how many bytes the header of an encoded change has, within a request."""


def coded_bytes(tensors: Tensors, codec: Pipeline | None, settings: WireSettings) -> int:
    """Return the bytes of tensors in a codec, before its entropy stage; of the others, as they are."""
    if codec is None:
        return tensor_bytes(tensors)
    schema = coded(Schema.of(tensors), codec, settings)
    plain = sum(spec.elements * spec.dtype.itemsize for spec in schema.tensors if not spec.codec)
    return plain + sum(_before_entropy(own) for own in schema.codec_groups.values())


def _before_entropy(group: CodecGroup) -> int:
    codec = group.codec
    head = codec.reduction.most_bytes(group.shapes) if codec.reduction is not None else 0
    return head + codec.raw_bytes(group.shapes, group.dtype)


def compressed(traffic: Traffic, adapter: Tensors, settings: WireSettings) -> Traffic:
    """Return the closed form of a round in which tensors are sent as ``[wire]`` says.

    It is that of a client that took part in the round before: another is sent several changes, or the
    whole. What the entropy stage saves depends on the numbers, and is not in it.

    Args:
        traffic: Without compression.
        adapter: Tensors of the shapes that travel.
        settings: ``[wire]``.
    """
    whole = tensor_bytes(adapter)
    if not settings.compresses or not isinstance(traffic, ParameterTraffic) or not whole:
        return traffic
    up, down = (
        coded_bytes(adapter, codec, settings) / whole
        for codec in (settings.up_codec, settings.down_codec)
    )
    beside = CONTROL + (CHANGE if settings.down else 0)
    return replace(
        traffic,
        up=round(traffic.up * up),
        up_even=round(traffic.up_even * up),
        down=round(traffic.down * down) + (beside if traffic.down or traffic.up else 0),
    )
