"""The entropy stage: one frame of Zstandard (RFC 8878).

Its Huffman coder is within one percent of the entropy of packed codes. The decoder takes one frame whose
header declares exactly the size that the schema gives; ``max_output_size`` of the library is no bound,
since it is not looked at where the header declares a size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import zstandard

from fedloom.errors import MessageError
from fedloom.wire.codecs.stage import Bytes, EntropyCodec, Options

MAGIC = b"\x28\xb5\x2f\xfd"
"""The first bytes of a frame; those of frames to be skipped, and of older versions, differ."""

WINDOW = 1 << 23
"""Largest window of a frame that is larger than this, in bytes; the format asks decoders for 8 MiB."""


@dataclass(frozen=True)
class Zstd(EntropyCodec):
    """Zstandard.

    Attributes:
        level: How hard it tries, 1 to 19; more gains nothing on packed codes.
    """

    name = "zstd"
    level: int = 1

    @classmethod
    def read(cls, options: Options) -> Zstd:
        """Return the codec of a text: ``zstd``, ``zstd:level=3``."""
        own = cls(options.whole("level", 1, 1, 19))
        options.end()
        return own

    def __str__(self) -> str:
        return self.name if self.level == 1 else f"{self.name}:level={self.level}"

    def most_bytes(self, size: int) -> int:
        """Return the bound of the library (``ZSTD_compressBound``)."""
        return size + (size >> 8) + max(0, (1 << 17) - size >> 11) + 64

    def encode(self, data: Bytes) -> bytes:
        """Return one frame, which declares its size."""
        return zstandard.ZstdCompressor(level=self.level).compress(data.data)

    def decode(self, data: Bytes, size: int) -> Bytes:
        """Return the content of a frame that declares ``size`` bytes."""
        raw = data.tobytes()
        try:
            frame = zstandard.get_frame_parameters(raw)
        except zstandard.ZstdError:
            frame = None
        if frame is None or raw[:4] != MAGIC or frame.dict_id or frame.has_checksum:
            raise MessageError("a coded buffer is not one frame of zstd as it is sent")
        if frame.content_size == zstandard.CONTENTSIZE_UNKNOWN:
            raise MessageError("a frame of zstd does not declare its size")
        if frame.content_size != size:
            raise MessageError(
                f"a frame of zstd declares {frame.content_size} bytes, the schema gives {size}",
                "oversized" if frame.content_size > size else "malformed",
            )
        if frame.window_size > max(size, WINDOW):
            raise MessageError(
                f"a frame of zstd has a window of {frame.window_size} bytes", "oversized"
            )
        return np.frombuffer(_content(raw, size), np.uint8)


def _content(raw: bytes, size: int) -> bytes:
    """Return the content of a frame whose header was checked."""
    reader = zstandard.ZstdDecompressor()
    try:
        found = reader.decompress(raw, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError:
        raise MessageError("a frame of zstd is damaged, or bytes follow it") from None
    if len(found) != size:
        raise MessageError(f"a frame of zstd holds {len(found)} bytes, not the {size} it declares")
    return found
