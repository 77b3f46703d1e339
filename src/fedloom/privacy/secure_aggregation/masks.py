"""Masks of 32-bit words, and packing of numbers below 2^k into k bits each."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]

_BLOCK = 1 << 16
"""Words that are masked at a time: they stay in a core's cache."""

_LANES = 32
"""Numbers that are packed side by side: as many of k bits are k whole words."""


def add_mask(words: Words, key: bytes, *, subtract: bool = False) -> None:
    """Add ChaCha20's keystream under ``key`` to ``words``, modulo 2^32, in place.

    Args:
        words: ``(d,)``, contiguous.
        key: 32 bytes, used for this alone.
        subtract: Take it off instead.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor()
    zeros = bytes(4 * _BLOCK)
    room = np.empty(4 * _BLOCK, dtype=np.uint8)
    mask: Words = room.view("<u4")
    combined = np.subtract if subtract else np.add
    for start in range(0, len(words), _BLOCK):
        part = words[start : start + _BLOCK]
        size = 4 * len(part)
        stream.update_into(zeros if size == len(zeros) else zeros[:size], room.data)
        combined(part, mask[: len(part)], out=part)


def packed(words: Words, bits: int) -> NDArray[np.uint8]:
    """Return numbers below 2^``bits`` in ``bits`` bits each, as bytes.

    They lie in 32 lanes, each a contiguous part of them, so that every step is over whole arrays.

    Args:
        words: ``(d,)``, each below 2^``bits``.
        bits: 1 to 32.
    """
    if bits == _LANES:
        return words.astype("<u4", copy=False).view(np.uint8)
    lane = -(-len(words) // _LANES)
    lanes = np.zeros((_LANES, lane), dtype=np.uint32)
    lanes.reshape(-1)[: len(words)] = words
    found = np.zeros((bits, lane), dtype=np.uint32)
    for number in range(_LANES):
        word, shift = divmod(number * bits, 32)
        found[word] |= lanes[number] << np.uint32(shift)
        if shift + bits > 32:
            found[word + 1] |= lanes[number] >> np.uint32(32 - shift)
    return found.astype("<u4", copy=False).reshape(-1).view(np.uint8)


def unpacked(data: NDArray[np.uint8], count: int, bits: int) -> Words:
    """Return ``count`` numbers that :func:`packed` packed; ``data`` has :func:`packed_bytes` bytes."""
    words: Words = data.view("<u4")
    if bits == _LANES:
        return words
    rows = words.reshape(bits, -1)
    lanes = np.empty((_LANES, rows.shape[1]), dtype=np.uint32)
    for number in range(_LANES):
        word, shift = divmod(number * bits, 32)
        lanes[number] = rows[word] >> np.uint32(shift)
        if shift + bits > 32:
            lanes[number] |= rows[word + 1] << np.uint32(32 - shift)
    lanes &= np.uint32(2**bits - 1)
    return lanes.reshape(-1)[:count]


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes of ``count`` packed numbers."""
    return 4 * (count if bits == _LANES else bits * -(-count // _LANES))
