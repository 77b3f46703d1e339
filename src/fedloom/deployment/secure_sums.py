"""A client's part in secure aggregation on its own machine: whose keys it trusts, and what it refuses.

Keys of a sum are drawn from this machine's entropy and are in the worker's memory alone. So a worker that
ends between two stages has dropped out of that sum: its successor has no keys for it, and says so.

Whose signatures count the owner of the client says (``[policy.privacy]`` of its file): fingerprints of
the other members' keys, had from them and not from the server, or, if said, those that it tells first.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from cryptography.hazmat.primitives.asymmetric import ec

from fedloom.deployment.folders import ClientFolder, StoredRecord
from fedloom.deployment.policy import PolicySettings
from fedloom.engines.in_process import SimulationEngine
from fedloom.errors import (
    IdentityError,
    MessageError,
    OutputError,
    PolicyError,
    Refusal,
    SumRefused,
)
from fedloom.federation.noisy_sums import width_of
from fedloom.federation.secure_exchange import KEYS, PROTOCOL, SecureClients, session_of
from fedloom.privacy.secure_aggregation.graph import LEAST
from fedloom.security.keys import public_line
from fedloom.security.signing_keys import certificate, fingerprint, is_certified, signing_secret
from fedloom.wire.envelope import Peer, RequestHeader, SigningKey, SumHeader
from fedloom.wire.messages import AddedNoise, Exchange, Masking
from fedloom.wire.schema import Schema

FILE = "peers.toml"
"""File in a client's folder: keys that were trusted at their first use."""

COUNTED = "noisy_sums.txt"
"""File in the folder of a run: a line for each sum to which this client has added noise."""

MOST_REPEATED = 2
"""Sums a round, on average, that a client takes part in where it adds noise: rounds may be repeated after
a kill."""

LINE = "policy.privacy.peers"


class KnownPeers(StoredRecord):
    """Keys that were trusted at their first use."""

    peers: dict[str, dict[str, str]] = {}
    """Fingerprint of each member's key, by HOST:PORT of the coordinator and the member's number."""


@dataclass
class SecureSums:
    """Secure aggregation of one run at its one client.

    Attributes:
        folder: The client's.
        server: HOST:PORT of the coordinator's gateway.
        key: The client's own.
        run: Id of the run.
        client: Its number in the run.
        member: Its number as a member.
        policy: Whose keys it trusts, and bounds.
        noise: What it adds to its answers by the experiment, whatever the server says; ``None``: nothing.
        seeded: Whether that is drawn from the experiment's seed.
        rounds: Of the run.
    """

    folder: ClientFolder
    server: str
    key: ec.EllipticCurvePrivateKey
    run: str
    client: int
    member: int
    policy: PolicySettings
    noise: AddedNoise | None = None
    seeded: bool = False
    rounds: int = 1
    _certified: set[tuple[object, ...]] = field(default_factory=set)
    _summed: dict[tuple[object, ...], int] = field(default_factory=dict)

    def clients(self, seed: int) -> SecureClients:
        """Return this client for the engine, without keys of others yet."""
        own = {self.client: signing_secret(self.key, self.run)}
        return SecureClients(own, seed, seeded=self.seeded)

    def signing(self) -> SigningKey:
        """Return what the server passes on to the other clients."""
        public, signature = certificate(self.key, self.run, self.client, self.member)
        return SigningKey(public=public.hex(), signature=signature.hex())

    def masking(self, header: RequestHeader) -> Masking:
        """Return how an answer is masked.

        Raises:
            SumRefused: It would not be, or the server's numbers are none.
            PolicyError: The answer is larger than the policy allows.
        """
        summed = header.summed
        if summed is None:
            raise SumRefused(
                f"{header.action[:40]!r} asks for this client's answer by itself, in a run of which the "
                "server sees sums alone"
            )
        contents, most = Schema.from_table(summed.contents), self.policy.max_bytes
        if contents.max_bytes > most:
            reason = f"{contents.max_bytes} bytes, {most} are allowed"
            raise PolicyError(Refusal("policy.max_bytes", reason))
        if summed.clients > self.policy.max_clients:
            reason = f"a sum of {summed.clients} clients, {self.policy.max_clients} are allowed"
            raise PolicyError(Refusal("policy.max_clients", reason))
        if len(summed.peers) > summed.clients:
            raise SumRefused(
                f"it lists the keys of {len(summed.peers)} clients for a sum of {summed.clients}",
                "forged",
            )
        beside = {self.client: self._shares(summed)} if summed.shares else {}
        masking = Masking(
            session_of(self.run, len(header.began)),
            summed.number,
            summed.bits,
            summed.bound,
            summed.clients,
            summed.rows,
            summed.stochastic,
            contents,
            beside,
            self.noise,
        )
        try:
            width_of(masking)
        except ValueError as error:
            raise SumRefused(str(error)) from None
        return masking

    def joined(
        self,
        exchange: Exchange,
        masking: Masking,
        header: RequestHeader,
        engine: SimulationEngine,
        note: Callable[..., None],
    ) -> Exchange:
        """Return an exchange as it is masked; at a sum's first stage, learn whose signatures count.

        Raises:
            SumRefused: As of :meth:`registry`.
            PolicyError: Likewise.
        """
        summed, secure = header.summed, engine.secure
        assert summed is not None and secure is not None, "the run is one of sums"
        if header.action == KEYS:
            secure.registry = self.registry(summed.peers, note)
        return replace(
            exchange,
            alike=tuple(summed.alike),
            replies_are_changes=summed.changes,
            masking=masking,
        )

    def require_first_sum(self, header: RequestHeader, masking: Masking, *, begun: bool) -> None:
        """Check, before it is done, that work is for one sum, and that its sum was begun.

        The same work in two sums of other clients would show one client's update as their difference.

        Args:
            header: Of a request that is no stage of its own.
            masking: Of the same.
            begun: Whether this client gave its keys for a sum that has not ended.

        Raises:
            SumRefused: It is not.
        """
        if not begun:
            raise SumRefused("this client takes part in no sum of this run and round", "replayed")
        moment = (len(header.began), header.round)
        self._summed = {work: own for work, own in self._summed.items() if work[:2] == moment}
        number = self._summed.setdefault((*moment, header.action, header.payload), masking.number)
        if number != masking.number:
            raise SumRefused("a server asks for the same work in a second sum", "replayed")
        if self.noise is not None:
            self._count(f"{len(header.began)} {header.round} {masking.number}")

    def _count(self, sum: str) -> None:
        """Write down a sum before its noise is drawn; each shows this client's rows once more.

        Raises:
            SumRefused: There were twice as many as the run has rounds: no kills explain that.
            OutputError: It cannot be written.
        """
        path = self.folder.run(self.run) / COUNTED
        try:
            before = path.read_text("ascii").splitlines() if path.exists() else []
            if len(before) >= MOST_REPEATED * self.rounds:
                raise SumRefused(
                    f"this client has added its noise to {len(before)} sums of this run, which has "
                    f"{self.rounds} rounds: each more would cost privacy that nobody accounts for"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="ascii") as file:
                file.write(sum + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error

    @staticmethod
    def _shares(summed: SumHeader) -> bytes:
        try:
            return base64.b64decode(summed.shares, validate=True)
        except binascii.Error:
            raise SumRefused("encrypted shares are not base64") from None

    def registry(self, peers: Collection[Peer], note: Callable[..., None]) -> dict[int, bytes]:
        """Return the public signing keys of the clients of a sum, each certified and trusted.

        Args:
            peers: As the server lists them.
            note: Called with a key that is trusted at its first use.

        Raises:
            SumRefused: They are fewer than three, one occurs twice, or a key is not certified.
            PolicyError: The owner of this client does not trust a key.
        """
        if len(peers) < LEAST:
            raise SumRefused(f"a sum of {len(peers)} clients is refused: {LEAST} are the fewest")
        own = public_line(self.key)
        found, seen = {}, set[str]()
        members: dict[int, tuple[str, str]] = {}
        for peer in peers:
            line = own if peer.client == self.client else peer.key
            try:
                print_ = fingerprint(line)
                sound = peer.client == self.client or self._is_certified(peer)
            except IdentityError as error:
                raise SumRefused(f"the key of client {peer.client}: {error}", "forged") from None
            if peer.client in found or print_ in seen:
                raise SumRefused(f"client {peer.client} or its key is listed twice", "forged")
            if str(peer.member) in {member for member, _ in members.values()}:
                raise SumRefused(f"member {peer.member} is listed twice", "forged")
            if not sound:
                raise SumRefused(
                    f"the signing key of client {peer.client} is not certified by its own key for this "
                    "run",
                    "forged",
                )
            seen.add(print_)
            found[peer.client] = bytes.fromhex(peer.signing.public)
            members[peer.client] = str(peer.member), print_
        if self.client not in found:
            raise SumRefused("the list of clients lacks this one", "forged")
        found[self.client] = bytes.fromhex(self.signing().public)
        del members[self.client]
        self._require_trusted(members, note)
        return found

    def _is_certified(self, peer: Peer) -> bool:
        """Return whether a peer's signing key is certified by its own key; asked once for each."""
        public, signature = peer.signing.public, peer.signing.signature
        facts = (peer.client, peer.member, peer.key, public, signature)
        if facts not in self._certified:
            raw = bytes.fromhex(public), bytes.fromhex(signature)
            if not is_certified(peer.key, self.run, peer.client, peer.member, *raw):
                return False
            self._certified.add(facts)
        return True

    def _require_trusted(
        self, members: Mapping[int, tuple[str, str]], note: Callable[..., None]
    ) -> None:
        """Check that the owner trusts the keys of other clients: member's number and fingerprint of each.

        Raises:
            PolicyError: Not of all.
        """
        trusted = self.policy.privacy
        if trusted.peers:
            foreign = {c: own for c, (_, own) in members.items() if own not in trusted.peers}
            if foreign:
                who = ", ".join(f"{own} (client {c})" for c, own in sorted(foreign.items())[:5])
                raise PolicyError(Refusal(LINE, f"it does not name {who}"))
            return
        if not trusted.trust_first_use:
            raise PolicyError(Refusal(LINE, "it names no key of another client"))
        path = self.folder.path / FILE
        known = KnownPeers.read(path) if path.exists() else KnownPeers()
        here = known.peers.setdefault(self.server, {})
        for client, (member, own) in sorted(members.items()):
            if here.get(member, own) != own:
                reason = (
                    f"client {client} has another key than before, {own} instead of {here[member]}"
                )
                raise PolicyError(Refusal("policy.privacy.trust_first_use", reason))
        fresh = {member: own for member, own in members.values() if member not in here}
        if fresh:
            here |= fresh
            known.write(path)
            note(run=self.run, client=self.client, keys=sorted(fresh.values()))


def require_stage(action: str, handlers: Collection[str], masking: Masking | None) -> bool:
    """Return whether an action is a stage of secure aggregation beside an exchange.

    Raises:
        MessageError: It is neither that nor an action of the method.
    """
    stage = masking is not None and action in PROTOCOL
    if not stage and action not in handlers:
        raise MessageError(f"there is no action {action[:40]!r}")
    return stage
