"""The closed form of a client's bytes in a round where tensors are compressed."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedloom.accounting.traffic import ParameterTraffic, Traffic
from fedloom.federation.compression_messages import is_coded
from fedloom.tensors import Tensors, tensor_bytes
from fedloom.wire.codecs import Pipeline
from fedloom.wire.schema import Schema
from fedloom.wire.settings import WireSettings

CONTROL = 260
"""About how many bytes a request says of its compression in, with the buffer's entry in the header."""

CHANGE = 210
"""About how many bytes the header of an encoded change has, within a request."""


def coded_bytes(tensors: Tensors, codec: Pipeline | None, settings: WireSettings) -> int:
    """Return the bytes of tensors in a codec, before its entropy stage; of the others, as they are."""
    if codec is None:
        return tensor_bytes(tensors)
    specs = Schema.of(tensors).tensors
    found, groups = 0, dict[torch.dtype, list[tuple[int, ...]]]()
    for spec in specs:
        if is_coded(spec, settings):
            groups.setdefault(spec.dtype, []).append(spec.shape)
        else:
            found += spec.elements * spec.dtype.itemsize
    dtypes = {spec.dtype for spec in specs}
    for own in dtypes & groups.keys():
        indices = codec.reduction.most_bytes(groups[own]) if codec.reduction is not None else 0
        found += codec.raw_bytes(groups[own], own) + indices
    return found


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
        down=round(traffic.down * down) + (beside if traffic.down or traffic.up else 0),
    )
