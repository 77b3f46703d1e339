"""The server of secure aggregation: it collects, passes on, and takes the masks off a sum."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedloom.errors import MessageError, RoundFailed
from fedloom.privacy.secure_aggregation import graph, primitives, sharing
from fedloom.privacy.secure_aggregation import protocol_messages as messages
from fedloom.privacy.secure_aggregation.client import pair_info, self_info
from fedloom.privacy.secure_aggregation.masks import Words, add_mask
from fedloom.privacy.secure_aggregation.primitives import Context, agreed, derived
from fedloom.privacy.secure_aggregation.protocol_messages import Keys, Secret


@dataclass
class ServerSession:
    """One sum: what each client sends is taken by a ``take_`` method, which refuses what is malformed.

    Attributes:
        context: Run, round and number of the sum.
        elements: d, of each vector.
        registry: Public Ed25519 keys of the clients, by which it leaves out who forges; clients trust
            nothing that it has verified and verify for themselves.
        least: Fewest clients of a sum, at least 3.
    """

    context: Context
    elements: int
    registry: Mapping[int, bytes]
    least: int = graph.LEAST
    _keys: dict[int, Keys] = field(default_factory=dict)
    _order: tuple[int, ...] = ()
    _neighbours: dict[int, tuple[int, ...]] = field(default_factory=dict)
    _shares: dict[int, dict[int, bytes]] = field(default_factory=dict)
    _sum: Words | None = None
    _summed: set[int] = field(default_factory=set)
    _signatures: dict[int, bytes] = field(default_factory=dict)
    _revealed: dict[int, dict[Secret, dict[int, bytes]]] = field(default_factory=dict)

    @property
    def survivors(self) -> tuple[int, ...]:
        """Clients whose vectors are in the sum, ascending."""
        return tuple(sorted(self._summed))

    def take_keys(self, client: int, data: bytes) -> None:
        """Take a client's signed keys.

        Raises:
            MessageError: They are malformed or not signed by it; sent on, they would end the round.
        """
        self._keys[client] = Keys.verified(data, self.context, client, self.registry)

    def keys(self) -> bytes:
        """Return all keys, to be sent to each of their clients.

        Raises:
            RoundFailed: They are too few.
        """
        self._require(self._keys, max(self.least, graph.LEAST), "sent their keys")
        entries = {client: bytes(keys) for client, keys in self._keys.items()}
        self._order = graph.order_of(entries)
        self._neighbours = {own: graph.neighbours(self._order, own) for own in entries}
        return messages.listed(entries)

    def take_shares(self, client: int, data: bytes) -> None:
        """Take the encrypted shares that a client has for its neighbours."""
        found = messages.entries_of(data, messages.SEALED_BYTES)
        if tuple(found) != self._neighbours[client]:
            raise MessageError("it sent shares for others than its neighbours")
        self._shares[client] = found

    def shares(self) -> dict[int, bytes]:
        """Return, for each client whose own shares came, those that it is passed on.

        Raises:
            RoundFailed: They are too few.
        """
        self._require(self._shares, self._needed, "sent their shares")
        return {
            client: messages.listed(
                {
                    other: self._shares[other][client]
                    for other in self._neighbours[client]
                    if other in self._shares
                }
            )
            for client in sorted(self._shares)
        }

    def take_masked(self, client: int, words: Words) -> None:
        """Add a client's masked vector to the sum; nothing else of it is kept.

        Raises:
            MessageError: It was not asked for, came before, or has another length.
        """
        if client not in self._shares or client in self._summed:
            raise MessageError("it sent a masked vector twice, or without its shares", "replayed")
        if len(words) != self.elements:
            raise MessageError(f"it sent {len(words)} masked numbers in place of {self.elements}")
        if self._sum is None:
            self._sum = np.zeros(self.elements, dtype=np.uint32)
        self._sum += words
        self._summed.add(client)

    def survivors_list(self) -> bytes:
        """Return the list of the clients in the sum, to be sent to each of them.

        Raises:
            RoundFailed: They are too few.
        """
        self._require(self._summed, self._needed, "sent their masked answers")
        return messages.ids(self._summed)

    def take_signature(self, client: int, data: bytes) -> None:
        """Take a client's signature over the list of survivors.

        Raises:
            MessageError: It is none.
        """
        signed = messages.survivors_signed(self.context, self.survivors_list())
        if not primitives.is_signed(self.registry[client], data, signed):
            raise MessageError("its signature is not of the list of survivors", "forged")
        self._signatures[client] = data

    def signatures(self) -> bytes:
        """Return all signatures, to be sent to each of their clients.

        Raises:
            RoundFailed: They are too few.
        """
        self._require(self._signatures, self._needed, "signed the list of survivors")
        return messages.listed(self._signatures)

    def take_revealed(self, client: int, data: bytes) -> None:
        """Take the shares that a client reveals of its neighbours' secrets.

        Raises:
            MessageError: They are of others, or of the secret that was not asked for.
        """
        found = messages.entries_of(data, messages.REVEALED_BYTES)
        if found.keys() - {client, *self._neighbours[client]}:
            raise MessageError("it revealed shares of others than its neighbours")
        for other, entry in found.items():
            kind: Secret = "self mask" if other in self._summed else "key"
            if entry[0] != messages.SECRETS.index(kind):
                raise MessageError(f"it revealed a share of client {other} that was not asked for")
            shares = self._revealed.setdefault(other, {}).setdefault(kind, {})
            shares[client + 1] = entry[1:]

    def unmasked(self, digest: bytes) -> Words:
        """Return the sum of the survivors' vectors, modulo 2^32.

        Args:
            digest: SHA-256 of the model and configuration that all were sent.

        Raises:
            RoundFailed: Shares lack, or do not fit the keys that their client advertised.
        """
        assert self._sum is not None, "survivors_list came first"
        for client in self.survivors:
            seed = self._secret(client, "self mask")
            if primitives.commitment(self.context, client, seed) != self._keys[client].commitment:
                raise self._wrong(client)
            add_mask(
                self._sum, derived(seed, self_info(self.context, client, digest)), subtract=True
            )
        for client in sorted(self._shares.keys() - self._summed):
            self._take_off(self._sum, client, digest)
        return self._sum

    def _take_off(self, total: Words, dropped: int, digest: bytes) -> None:
        """Take off the pairwise masks of a client whose vector never came."""
        others = list(self._masked_with(dropped))
        if not others:
            return
        key = self._secret(dropped, "key")
        if primitives.public_key(key) != self._keys[dropped].masking:
            raise self._wrong(dropped)
        for other in others:
            info = pair_info(self.context, dropped, other, digest)
            pair = agreed(key, self._keys[other].masking, info)
            add_mask(total, pair, subtract=dropped > other)

    def _masked_with(self, dropped: int) -> Iterator[int]:
        return (other for other in self._neighbours[dropped] if other in self._summed)

    def _secret(self, client: int, kind: Secret) -> bytes:
        shares = self._revealed.get(client, {}).get(kind, {})
        holders = len(self._neighbours[client]) + 1
        needed = graph.threshold_of(holders)
        if len(shares) < needed:
            raise RoundFailed(
                f"{self._where}: {len(shares)} of {holders} shares of client {client}'s {kind} were "
                f"revealed, {needed} are needed: too many clients dropped out; the sum cannot be read"
            )
        try:
            return sharing.combine(shares, needed)
        except MessageError:
            raise self._wrong(client) from None

    def _wrong(self, client: int) -> RoundFailed:
        return RoundFailed(
            f"{self._where}: the shares of client {client}'s secrets do not fit its keys: it, or a "
            "client that revealed them, sent wrong ones; the sum cannot be read"
        )

    @property
    def _where(self) -> str:
        return f"round {self.context.round}: secure aggregation"

    @property
    def _needed(self) -> int:
        return max(self.least, graph.LEAST, graph.threshold_of(len(self._keys)))

    def _require(self, found: Collection[int], needed: int, what: str) -> None:
        if len(found) < needed:
            raise RoundFailed(
                f"{self._where}: {len(found)} clients {what}, {needed} must; nothing was revealed"
            )
