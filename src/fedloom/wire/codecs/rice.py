"""Indices as gaps in Rice's code: within three percent of their entropy, log2 C(d, K) / K each.

The gap before an index is how many numbers lie between it and the one before. A gap g is its low p bits
and, in unary, g >> p; p is that which makes a tensor's code shortest (the smaller of two). Of all
tensors together travel: eight bytes of length of the unary bits in bytes, a byte with p for each
tensor, all low bits, all unary bits (g >> p zeros and a one); both from the least significant bit of a
byte on. Source: Golomb (1966), Rice and Plaunt (1971).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedloom.errors import MessageError
from fedloom.wire.codecs.stage import Bytes

MAX_PARAMETER = 24
"""Largest p."""

LENGTH = 8
"""Bytes of the length."""

Indices = NDArray[np.int64]


def most_bytes(counts: Sequence[int], sizes: Sequence[int]) -> int:
    """Return an upper bound of the bytes of ``counts`` indices each below its size.

    With p = floor(log2(d / K)) they take at most K (p + 1) + d / 2^p bits, and the best p no more.
    """
    bits = 0
    for count, size in zip(counts, sizes, strict=True):
        p = min(MAX_PARAMETER, (size // max(1, count)).bit_length() - 1) if count else 0
        bits += count * (p + 1) + (size >> p)
    return LENGTH + len(counts) + 2 + bits // 8


def encode(indices: Sequence[Indices]) -> bytes:
    """Return strictly increasing indices of each tensor as bytes."""
    gaps = [np.diff(own, prepend=-1) - 1 for own in indices]
    each = np.array([_parameter(own) for own in gaps], np.int64)
    whole = np.concatenate([np.empty(0, np.int64), *gaps])
    shifts = np.repeat(each, [len(own) for own in gaps])
    starts = np.cumsum(shifts) - shifts
    low = np.zeros(int(shifts.sum()), np.uint8)
    for bit in range(int(each.max(initial=0))):
        has = shifts > bit
        low[starts[has] + bit] = (whole[has] >> bit) & 1
    ends = np.cumsum((whole >> shifts) + 1)
    unary = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    unary[ends - 1] = 1
    packed = np.packbits(unary, bitorder="little").tobytes()
    return b"".join(
        [
            len(packed).to_bytes(LENGTH, "little"),
            each.astype(np.uint8).tobytes(),
            np.packbits(low, bitorder="little").tobytes(),
            packed,
        ]
    )


def decode(data: Bytes, counts: Sequence[int], sizes: Sequence[int]) -> tuple[list[Indices], int]:
    """Return the indices of each tensor at the start of ``data``, and the bytes that they take.

    Args:
        data: Untrusted bytes.
        counts: Indices of each tensor.
        sizes: What the indices of each tensor are below.

    Raises:
        MessageError: They are not what :func:`encode` returns for so many indices below these sizes.
    """
    begin, total = LENGTH + len(counts), sum(counts)
    each = data[LENGTH:begin].astype(np.int64)
    if len(each) != len(counts) or int(each.max(initial=0)) > MAX_PARAMETER:
        raise MessageError(f"indices lack a parameter for each tensor, at most {MAX_PARAMETER}")
    low_bits = int((each * np.array(counts, np.int64)).sum())
    middle = begin + -(-low_bits // 8)
    end = middle + int.from_bytes(data[:LENGTH].tobytes(), "little")
    if end > min(len(data), most_bytes(counts, sizes)):
        raise MessageError("indices take more bytes than there are or can be", "oversized")
    low, unary = data[begin:middle], data[middle:end]
    if int(np.bitwise_count(unary).sum(dtype=np.int64)) != total:
        raise MessageError(f"there must be {total} indices")
    if (len(unary) and unary[-1] == 0) or (low_bits % 8 and low[-1] >> low_bits % 8):
        raise MessageError("bits beyond the last index are not zero")
    ends = np.flatnonzero(np.unpackbits(unary, bitorder="little"))
    shifts = np.repeat(each, counts)
    gaps = (np.diff(ends, prepend=-1) - 1) << shifts
    gaps += _low_bits(np.unpackbits(low, bitorder="little"), shifts)
    found = _split(gaps, counts)
    if any(_parameter(own) != p for own, p in zip(found, each, strict=True)):
        raise MessageError("indices are not coded with the best parameter")
    indices = [np.cumsum(own + 1) - 1 for own in found]
    if any(len(own) and own[-1] >= size for own, size in zip(indices, sizes, strict=True)):
        raise MessageError("an index is beyond the end of its tensor", "out_of_range")
    return indices, end


def _parameter(gaps: Indices) -> int:
    """Return the p that makes the code of gaps shortest."""
    if not len(gaps):
        return 0
    middle = min(MAX_PARAMETER, (int(gaps.sum()) // len(gaps) + 1).bit_length() - 1)
    tried = range(max(0, middle - 2), min(MAX_PARAMETER, middle + 1) + 1)
    return min(tried, key=lambda p: (len(gaps) * p + int((gaps >> p).sum()), p))


def _low_bits(bits: Bytes, shifts: Indices) -> Indices:
    """Return the numbers of ``shifts`` bits each."""
    starts, found = np.cumsum(shifts) - shifts, np.zeros(len(shifts), np.int64)
    for bit in range(int(shifts.max(initial=0))):
        has = shifts > bit
        found[has] |= bits[starts[has] + bit].astype(np.int64) << bit
    return found


def _split(whole: Indices, counts: Sequence[int]) -> list[Indices]:
    ends = np.cumsum(np.array(counts, np.int64))
    return [whole[end - count : end] for end, count in zip(ends, counts, strict=True)]
