"""The bytes of the protocol's messages, read strictly: they come from peers that are not trusted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from fedloom.errors import MessageError
from fedloom.privacy.secure_aggregation import primitives, sharing
from fedloom.privacy.secure_aggregation.primitives import KEY_BYTES, SIGNATURE_BYTES, Context

ID_BYTES = 4

KEYS_BYTES = 3 * KEY_BYTES + SIGNATURE_BYTES
"""Bytes of a client's signed keys."""

SEALED_BYTES = 2 * sharing.SHARE_BYTES + primitives.TAG_BYTES
"""Bytes of the shares of both secrets, encrypted for one other client."""

Secret = Literal["self mask", "key"]
"""What a share is of: the seed of a client's self mask, or its private key for pairwise masks."""

SECRETS: tuple[Secret, ...] = ("self mask", "key")

REVEALED_BYTES = 1 + sharing.SHARE_BYTES
"""Bytes of a revealed share, with the secret that it is of."""


@dataclass(frozen=True)
class Keys:
    """What a client advertises.

    Attributes:
        encryption: X25519 public key under which shares are sent to it.
        masking: X25519 public key of its pairwise masks.
        commitment: SHA-256 by which it commits to the seed of its self mask.
        signature: Ed25519 signature over these, its id, and the context.
    """

    encryption: bytes
    masking: bytes
    commitment: bytes
    signature: bytes

    @classmethod
    def read(cls, data: bytes) -> Keys:
        """Return the keys in 160 bytes."""
        if len(data) != KEYS_BYTES:
            raise MessageError(f"keys have {len(data)} bytes, they must have {KEYS_BYTES}")
        own = [data[start : start + KEY_BYTES] for start in range(0, 3 * KEY_BYTES, KEY_BYTES)]
        return cls(own[0], own[1], own[2], data[3 * KEY_BYTES :])

    @classmethod
    def verified(
        cls, data: bytes, context: Context, client: int, registry: Mapping[int, bytes]
    ) -> Keys:
        """Return a client's keys.

        Raises:
            MessageError: They are malformed, the client is not in the registry, or has not signed them.
        """
        keys, public = cls.read(data), registry.get(client)
        if public is None:
            raise MessageError(f"client {client} is not in the registry", "forged")
        if not primitives.is_signed(public, keys.signature, keys.signed(context, client)):
            raise MessageError(f"the keys of client {client} are not signed by it", "forged")
        return keys

    def signed(self, context: Context, client: int) -> bytes:
        """Return what the signature is over."""
        return context.bound("keys", client, self.encryption, self.masking, self.commitment)

    def __bytes__(self) -> bytes:
        """Return them as they travel."""
        return self.encryption + self.masking + self.commitment + self.signature


def survivors_signed(context: Context, survivors: bytes) -> bytes:
    """Return what a signature over the list of survivors is over."""
    return context.bound("survivors", hashlib.sha256(survivors).digest())


def listed(entries: Mapping[int, bytes]) -> bytes:
    """Return entries of equal length, each after its client's id, by id ascending."""
    return b"".join(
        client.to_bytes(ID_BYTES, "big") + entries[client] for client in sorted(entries)
    )


def entries_of(data: bytes, size: int) -> dict[int, bytes]:
    """Return the entries of ``size`` bytes that :func:`listed` put together.

    Raises:
        MessageError: They are not whole, not ascending, or one occurs twice.
    """
    width = ID_BYTES + size
    if len(data) % width:
        raise MessageError(f"a list has {len(data)} bytes, which is no multiple of {width}")
    found: dict[int, bytes] = {}
    last = -1
    for start in range(0, len(data), width):
        client = int.from_bytes(data[start : start + ID_BYTES], "big")
        if client <= last:
            raise MessageError(
                f"client {client} occurs twice in a list, or out of order", "replayed"
            )
        found[client] = data[start + ID_BYTES : start + width]
        last = client
    return found


def ids(clients: Iterable[int]) -> bytes:
    """Return a list of clients without entries."""
    return listed(dict.fromkeys(clients, b""))
