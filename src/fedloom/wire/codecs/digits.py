"""Digits of a base below 256, as many to a byte as fit: five of base 3, two of base 15, eight of base 2.

The first digit is the least significant. A byte that no digits make, and digits beyond the last one that
are not zero, are refused: there is one way to write a sequence of digits.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from fedloom.errors import MessageError
from fedloom.wire.codecs.stage import Bytes, Floats


def per_byte(base: int) -> int:
    """Return how many digits of a base fit in a byte."""
    count = 1
    while base ** (count + 1) <= 256:
        count += 1
    return count


def packed_bytes(count: int, base: int) -> int:
    """Return the bytes of ``count`` digits."""
    return -(-count // per_byte(base))


def pack(digits: Bytes, base: int) -> Bytes:
    """Return digits, each below ``base``, as bytes."""
    each = per_byte(base)
    if each == 1:
        return digits
    if base == 2:
        return np.packbits(digits, bitorder="little")
    whole = len(digits) // each * each
    packed = digits[each - 1 : whole : each] * np.uint8(base)
    for place in range(each - 2, 0, -1):
        packed += digits[place:whole:each]
        packed *= np.uint8(base)
    packed += digits[0:whole:each]
    if whole == len(digits):
        return packed
    last = sum(int(digit) * base**i for i, digit in enumerate(digits[whole:]))
    return np.append(packed, np.uint8(last))


def check(data: Bytes, count: int, base: int) -> None:
    """Check bytes of ``count`` digits.

    Raises:
        MessageError: A byte stands for no digits, or digits beyond the last are not zero.
    """
    each = per_byte(base)
    if len(data) and int(data.max()) >= base**each:
        raise MessageError(f"a coded byte is {int(data.max())}, which stands for no code")
    if (over := count % each) and int(data[-1]) >= base**over:
        raise MessageError("bits beyond the last code are not zero")


def values(data: Bytes, count: int, levels: Floats) -> Floats:
    """Return the level of each of ``count`` digits in checked bytes.

    Args:
        data: As :func:`pack` returns it.
        count: How many digits.
        levels: What each digit stands for, (base,).
    """
    if per_byte(len(levels)) == 1 and np.array_equal(np.diff(levels), np.ones(len(levels) - 1)):
        # whole numbers in a row: less than a third of a table's time
        found: Floats = np.add(data[:count], levels[0], dtype=np.float32)
        return found
    table = _table(levels.tobytes())
    if table.shape[1] == 2:  # pairs of float32 are moved as one number: five times as fast as rows
        return np.take(table.view(np.uint64)[:, 0], data).view(np.float32)[:count]
    return np.take(table, data, axis=0).reshape(-1)[:count]


@cache
def _table(levels: bytes) -> NDArray[np.float32]:
    """Return the levels of the digits of every byte, (256, digits to a byte)."""
    own = np.frombuffer(levels, np.float32)
    each = per_byte(len(own))
    digits = np.arange(256)[:, None] // len(own) ** np.arange(each) % len(own)
    return np.ascontiguousarray(own[digits])
