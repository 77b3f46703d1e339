"""The bytes of a payload: the safetensors format, written and read in one copy.

A file of safetensors is eight bytes of length, a header in JSON, and the buffers that it names, one
after the other. The library copies a payload four times on its way to bytes. Here each buffer is copied
once, out of the tensors that lie in it, and once on its way back, into memory that numpy asks large pages
for. Bytes that are read are untrusted: every field of the header is checked. This file knows no schema.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedloom.errors import MessageError

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
}
"""Names of the dtypes in the format."""

_KNOWN = {name: dtype for dtype, name in DTYPES.items()}

SMALL = 1 << 20
"""Bytes up to which the parts of a buffer are put together by torch first: one more copy, fewer calls."""

METADATA = "__metadata__"
"""Key of the metadata in a header."""


@dataclass(frozen=True)
class Buffer:
    """A sequence of numbers of one dtype.

    Attributes:
        dtype: Of each.
        shape: How many there are.
        parts: Its tensors in order, if it is to be written.
        start: Its offset among the buffers in bytes, if it was read.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Sequence[Tensor] = ()
    start: int = 0

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def pack(buffers: Mapping[str, Buffer], metadata: Mapping[str, str]) -> bytes:
    """Return buffers as bytes that safetensors reads; the same buffers are the same bytes.

    Raises:
        MessageError: A dtype that cannot be sent.
    """
    header: dict[str, object] = {METADATA: dict(sorted(metadata.items()))}
    raw: list[memoryview] = []
    start = 0
    for name in sorted(buffers, key=lambda name: (-buffers[name].dtype.itemsize, name)):
        own = buffers[name]
        if own.dtype not in DTYPES:
            raise MessageError(f"buffer {name} is {own.dtype}, which cannot be sent")
        place = [start, start + own.size]
        header[name] = {"dtype": DTYPES[own.dtype], "shape": own.shape, "data_offsets": place}
        raw += _raw(own)
        start += own.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *raw])


def header_of(data: bytes, longest: int) -> tuple[dict[str, object], int]:
    """Return the header of packed bytes, and where the buffers begin.

    Raises:
        MessageError: It is longer than ``longest``, or no JSON object.
    """
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(longest, len(data) - 8):
        raise MessageError(f"payload header is damaged or longer than {longest} bytes")
    try:
        header = json.loads(data[8 : 8 + size])
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise MessageError("payload header is not the JSON of safetensors")
    return header, 8 + size


def buffers_of(header: Mapping[str, object], size: int) -> dict[str, Buffer]:
    """Return the buffers that a header names, which fill ``size`` bytes without a gap.

    Raises:
        MessageError: They do not, or one is malformed.
    """
    found = {name: _buffer(name, entry) for name, entry in header.items() if name != METADATA}
    end = 0
    for own in sorted(found.values(), key=lambda own: (own.start, own.size)):
        if own.start != end:
            raise MessageError(f"payload has a gap or an overlap of buffers at byte {end}")
        end += own.size
    if end != size:
        raise MessageError(f"payload has {size} bytes of buffers, its header describes {end}")
    return found


def content(data: bytes, start: int, buffer: Buffer) -> Tensor:
    """Return a copy of a buffer, given where the buffers begin in ``data``."""
    if not buffer.size:
        return torch.empty(buffer.shape, dtype=buffer.dtype)
    begin = start + buffer.start
    own = np.frombuffer(data, np.uint8)[begin : begin + buffer.size].copy()
    return torch.from_numpy(own).view(buffer.dtype).view(buffer.shape)


def _raw(buffer: Buffer) -> list[memoryview]:
    parts = [part.detach().cpu().reshape(-1) for part in buffer.parts]
    if buffer.size <= SMALL:
        parts = [torch.cat(parts)]
    return [part.contiguous().view(torch.uint8).numpy().data for part in parts]


def _buffer(name: str, entry: object) -> Buffer:
    if isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}:
        dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
        known = _KNOWN.get(dtype) if isinstance(dtype, str) else None
        if known is not None and _counts(shape) and _counts(place) and len(place) == 2:
            own = Buffer(known, tuple(shape), start=place[0])
            if own.size == place[1] - place[0]:
                return own
    raise MessageError(f"payload describes its buffer {name[:64]!r} not in the form of safetensors")


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)
