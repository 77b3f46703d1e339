"""Shamir's secret sharing of 32 bytes over a prime field.

Source: Shamir 1979, "How to Share a Secret", https://doi.org/10.1145/359168.359176. A secret is the value
at 0 of a polynomial of degree ``threshold - 1`` with random coefficients; a share is its value elsewhere.
So ``threshold`` shares give the secret, and fewer say nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from fedloom.errors import MessageError

PRIME = 2**256 + 297
"""The smallest prime above 2^256, so that every secret of 32 bytes is a number of the field."""

SECRET_BYTES, SHARE_BYTES = 32, 33
"""Bytes of a secret, and of a share of it."""

_RANDOM_BYTES = 48
"""Bytes that a random number of the field is reduced from; its bias is below 2^-127."""


def random_bytes(threshold: int) -> int:
    """Return how many random bytes :func:`split` needs."""
    return (threshold - 1) * _RANDOM_BYTES


def split(secret: bytes, places: Sequence[int], threshold: int, random: bytes) -> dict[int, bytes]:
    """Return a share of ``secret`` for each of some places.

    Args:
        secret: 32 bytes.
        places: Where the polynomial is taken, each at least 1 and all different.
        threshold: Shares that give the secret, 1 to the number of places.
        random: As many uniform bytes as :func:`random_bytes` says, used for nothing else.

    Raises:
        ValueError: An argument is not as described.
    """
    if len(secret) != SECRET_BYTES or len(random) != random_bytes(threshold):
        raise ValueError(
            "a secret has 32 bytes, and its sharing needs random_bytes(threshold) more"
        )
    if not 1 <= threshold <= len(set(places)) == len(places) or min(places) < 1:
        raise ValueError(f"{threshold} of {len(places)} shares, at places {list(places)[:5]}")
    coefficients = [
        int.from_bytes(random[start : start + _RANDOM_BYTES], "big") % PRIME
        for start in range(0, len(random), _RANDOM_BYTES)
    ]
    constant, found = int.from_bytes(secret, "big"), {}
    for place in places:
        value = 0
        for coefficient in coefficients:
            value = (value * place + coefficient) % PRIME
        found[place] = ((value * place + constant) % PRIME).to_bytes(SHARE_BYTES, "big")
    return found


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Return the secret that ``threshold`` of its shares give, by Lagrange's interpolation at 0.

    Args:
        shares: By place; those of the lowest places are used.
        threshold: As in :func:`split`.

    Raises:
        MessageError: There are fewer, or they are shares of no secret of 32 bytes.
    """
    if len(shares) < threshold:
        raise MessageError(f"{len(shares)} shares of a secret, {threshold} are needed")
    places = tuple(sorted(shares)[:threshold])
    numbers = (_number(shares[place]) for place in places)
    secret = sum(weight * number for weight, number in zip(_weights(places), numbers, strict=True))
    try:
        return (secret % PRIME).to_bytes(SECRET_BYTES, "big")
    except OverflowError:
        raise MessageError("the shares of a secret do not fit together") from None


@lru_cache(maxsize=256)
def _weights(places: tuple[int, ...]) -> tuple[int, ...]:
    """Return Lagrange's basis polynomials at 0."""
    return tuple(_weight(places, place) for place in places)


def _weight(places: tuple[int, ...], place: int) -> int:
    above = below = 1
    for other in _others(places, place):
        above = above * other % PRIME
        below = below * (other - place) % PRIME
    return above * pow(below, -1, PRIME) % PRIME


def _others(places: tuple[int, ...], place: int) -> Iterator[int]:
    return (other for other in places if other != place)


def _number(share: bytes) -> int:
    number = int.from_bytes(share, "big")
    if len(share) != SHARE_BYTES or number >= PRIME:
        raise MessageError("a share is no number of the field")
    return number
