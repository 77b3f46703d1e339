"""A client of secure aggregation: what it does in each stage, and what it refuses.

Source: Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
https://eprint.iacr.org/2017/281, figure 4, the variant against an active server, with neighbours as in
``graph.py``. Beyond it, the keys of masks depend on the SHA-256 of the model and configuration that the
client received: where a server sends one client another model, masks do not cancel, and the sum is noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedloom.errors import MessageError
from fedloom.privacy.secure_aggregation import graph, primitives, sharing
from fedloom.privacy.secure_aggregation import protocol_messages as messages
from fedloom.privacy.secure_aggregation.masks import Words, add_mask
from fedloom.privacy.secure_aggregation.primitives import Context, agreed, derived
from fedloom.privacy.secure_aggregation.protocol_messages import Keys, Secret

STAGES = ("advertise", "share", "mask", "confirm", "reveal")
"""What a client does, in this order and each once."""


def pair_info(context: Context, one: int, other: int, digest: bytes) -> bytes:
    """Return what the key of a pair's mask is derived under; it is the same for both."""
    return context.bound("pairwise mask", min(one, other), max(one, other), digest)


def self_info(context: Context, client: int, digest: bytes) -> bytes:
    """Return what the key of a self mask is derived under."""
    return context.bound("self mask", client, digest)


def channel_info(context: Context, sender: int, receiver: int) -> bytes:
    """Return what the key of shares on their way is derived under, in this direction."""
    return context.bound("shares", sender, receiver)


@dataclass
class ClientSession:
    """One client in one sum; :data:`STAGES` in order.

    Attributes:
        context: Run, round and number of the sum.
        client: Its id.
        identity: Its private Ed25519 key.
        registry: Public Ed25519 keys of the clients, which it has from elsewhere than the server.
        secret: 32 bytes of the operating system's randomness for this sum alone; all of its keys follow.
        least: Fewest clients of a sum that it takes part in, at least 3.
    """

    context: Context
    client: int
    identity: bytes
    registry: Mapping[int, bytes]
    secret: bytes
    least: int = graph.LEAST
    _next: int = 0
    _keys: dict[int, Keys] = field(default_factory=dict)
    _neighbours: tuple[int, ...] = ()
    _own_shares: dict[Secret, bytes] = field(default_factory=dict)
    _received: dict[int, bytes] = field(default_factory=dict)
    _survivors: bytes = b""

    def advertise(self) -> bytes:
        """Return its signed public keys."""
        self._begin("advertise")
        seed = self._private("self mask")
        keys = Keys(
            primitives.public_key(self._private("encryption")),
            primitives.public_key(self._private("key")),
            primitives.commitment(self.context, self.client, seed),
            b"",
        )
        signature = primitives.signing_key(self.identity).sign(
            keys.signed(self.context, self.client)
        )
        self._keys[self.client] = Keys(keys.encryption, keys.masking, keys.commitment, signature)
        return bytes(self._keys[self.client])

    def share(self, keys: bytes) -> bytes:
        """Return shares of both of its secrets, encrypted for each neighbour.

        Args:
            keys: All clients' keys as the server lists them.

        Raises:
            MessageError: There are too few, they lack its own, or some are not signed by their client.
        """
        self._begin("share")
        entries = messages.entries_of(keys, messages.KEYS_BYTES)
        if entries.get(self.client) != bytes(self._keys[self.client]):
            raise MessageError("the list of keys does not have this client's own", "forged")
        if len(entries) < max(self.least, graph.LEAST):
            raise MessageError(
                f"a sum of {len(entries)} clients is refused: {max(self.least, graph.LEAST)} are the "
                "fewest"
            )
        self._keys = {
            client: Keys.verified(own, self.context, client, self.registry)
            for client, own in entries.items()
        }
        self._neighbours = graph.neighbours(graph.order_of(entries), self.client)
        holders = sorted((*self._neighbours, self.client))
        places = [holder + 1 for holder in holders]
        shares = {kind: self._split(kind, places) for kind in messages.SECRETS}
        self._own_shares = {kind: own[self.client + 1] for kind, own in shares.items()}
        sealed = {}
        for other in self._neighbours:
            info = channel_info(self.context, self.client, other)
            key = agreed(self._private("encryption"), self._keys[other].encryption, info)
            text = b"".join(shares[kind][other + 1] for kind in messages.SECRETS)
            sealed[other] = primitives.sealed(key, text, info)
        return messages.listed(sealed)

    def mask(self, received: bytes, digest: bytes, words: Words) -> None:
        """Mask ``words`` in place, modulo 2^32.

        Args:
            received: The encrypted shares of its neighbours, as the server passes them on.
            digest: SHA-256 of the model and configuration that it has received.
            words: ``(d,)``; they must be kept from the server until now.

        Raises:
            MessageError: A share is of no neighbour, or so few came that its own secrets are lost.
        """
        self._begin("mask")
        self._received = messages.entries_of(received, messages.SEALED_BYTES)
        if foreign := self._received.keys() - set(self._neighbours):
            raise MessageError(f"shares of clients {sorted(foreign)[:5]}, which are no neighbours")
        if len(self._received) + 1 < graph.threshold_of(len(self._neighbours) + 1):
            raise MessageError(
                f"{len(self._received)} of {len(self._neighbours)} neighbours are left: too few"
            )
        seed = self._private("self mask")
        add_mask(words, derived(seed, self_info(self.context, self.client, digest)))
        for other in self._received:
            info = pair_info(self.context, self.client, other, digest)
            key = agreed(self._private("key"), self._keys[other].masking, info)
            add_mask(words, key, subtract=other < self.client)

    @property
    def noise_key(self) -> bytes:
        """32 bytes from which its noise in this sum is drawn, known to nobody else."""
        return self._private("noise")

    def confirm(self, survivors: bytes) -> bytes:
        """Return its signature over the list of the clients whose masked vectors came.

        Raises:
            MessageError: They are too few, or it is not among them.
        """
        self._begin("confirm")
        found = messages.entries_of(survivors, 0).keys()
        if self.client not in found or found - self._keys.keys():
            raise MessageError(
                "the list of survivors lacks this client, or has strange ones", "forged"
            )
        if any(own in self._neighbours and own not in self._received for own in found):
            raise MessageError("a neighbour is listed whose shares never came", "forged")
        needed = max(self.least, graph.LEAST, graph.threshold_of(len(self._keys)))
        if len(found) < needed:
            raise MessageError(
                f"{len(found)} clients are left, {needed} are needed: nothing is revealed"
            )
        self._survivors = survivors
        signed = messages.survivors_signed(self.context, survivors)
        return primitives.signing_key(self.identity).sign(signed)

    def reveal(self, signatures: bytes) -> bytes:
        """Return a share of one secret of each neighbour: of a survivor's self mask, of another's key.

        Never both: which of the two follows from the list that it has signed, and this is answered once.

        Args:
            signatures: Of the survivors, over the same list.

        Raises:
            MessageError: Too few have signed the same list, or a neighbour's shares are forged.
        """
        self._begin("reveal")
        found = messages.entries_of(signatures, primitives.SIGNATURE_BYTES)
        survivors = messages.entries_of(self._survivors, 0).keys()
        needed = graph.threshold_of(len(self._keys))
        signed = messages.survivors_signed(self.context, self._survivors)
        count = 0
        for other in sorted(found.keys() & survivors):
            count += primitives.is_signed(self.registry[other], found[other], signed)
            if count == needed:
                break
        if count < needed:
            raise MessageError(
                f"{count} clients have signed the list of survivors that this client has, {needed} must: "
                "the server may have sent others another list",
                "forged",
            )
        revealed = {self.client: self._marked("self mask", self._own_shares["self mask"])}
        for other in self._received:
            kind: Secret = "self mask" if other in survivors else "key"
            revealed[other] = self._marked(kind, self._opened(other)[kind])
        return messages.listed(revealed)

    def _begin(self, stage: str) -> None:
        """Go on to a stage; a failed or repeated one is never begun again."""
        expected = STAGES[self._next] if self._next < len(STAGES) else "nothing"
        if stage != expected:
            self._next = len(STAGES)
            raise MessageError(
                f"a server asks to {stage} where {expected} is due: each stage is answered once",
                "replayed",
            )
        self._next += 1

    def _private(self, purpose: str) -> bytes:
        return derived(self.secret, self.context.bound("private", purpose.encode(), self.client))

    def _split(self, kind: Secret, places: list[int]) -> dict[int, bytes]:
        threshold = graph.threshold_of(len(places))
        key = self._private(f"sharing of {kind}")
        random = primitives.expanded(key, sharing.random_bytes(threshold))
        return sharing.split(self._private(kind), places, threshold, random)

    def _opened(self, sender: int) -> dict[Secret, bytes]:
        info = channel_info(self.context, sender, self.client)
        key = agreed(self._private("encryption"), self._keys[sender].encryption, info)
        text = primitives.opened(key, self._received[sender], info)
        size = sharing.SHARE_BYTES
        return {kind: text[n * size : (n + 1) * size] for n, kind in enumerate(messages.SECRETS)}

    @staticmethod
    def _marked(kind: Secret, share: bytes) -> bytes:
        return bytes([messages.SECRETS.index(kind)]) + share
