"""The clients of a run between machines: expected members, their readiness, nodes and reasons of absence.

A run expects members of the federation; a client's number in the run is an index into them. A reply
is attributed to a member where the node has proven the member's key before anything of it is passed on
(:attr:`RunClients.proven`): without that, a third party may send anything in a member's name, and replay
what the member once signed. So a wrong reply to the request for registration is a violation of the member
that owns the node where that is proven, and of no member otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

from fedloom.errors import MessageError
from fedloom.federation.records import Absence, Participant
from fedloom.federation.violations import WHY, Report, one_line
from fedloom.security.audit_log import Limited, Record, no_op_recorder
from fedloom.security.client_registry import CachedMembers, Members
from fedloom.security.keys import is_signed
from fedloom.security.signing_keys import is_certified
from fedloom.wire.envelope import (
    MAX_REPLY_HEADER,
    PROTOCOL,
    Envelope,
    Joined,
    Peer,
    ReplyHeader,
    RequestHeader,
)

AGAIN = 30.0
"""Seconds until a client that could not take part is asked again."""

SILENT = 15.0
"""Seconds until a node that has not registered is asked again; later every :data:`AGAIN` seconds. The
request or its answer may have been lost with the client's process, whose successor is the same node."""


UNSEEN = (
    "not connected since this run began: its machine, its network or `fedloom client join` is down"
)
GONE = "not connected: its machine, its network or `fedloom client join` is down"
ASKED = "connected, and has not reported yet whether it can take part"
REVOKED = "no longer allowed: `fedloom members list`"
WITHDRAWN = "withdrawn: it no longer takes part in any run"
NOT_LET_IN = REVOKED, WITHDRAWN


@dataclass
class RunClients:
    """The clients of a run.

    Attributes:
        members: Returns the current registry.
        participants: The members that the run expects; a client's number is an index here.
        unseen: Unseen clients: present, but asked only when named explicitly.
        owners: Returns the number of the member that each of Flower's nodes belongs to.
        proven: Whether each node has proven its member's key.
        model: SHA-256 of the backbone and tokenizer that all must have.
        plugins: By section, SHA-256 of the file of each class that is not fedloom's; all must have it.
        private: Whether all must hide rows in their own steps.
        run: Id of the run, where its answers are summed under secure aggregation.
        audit: Audit log of clients that register and that are refused.
        report: Called with violations of clients.
        registered: The report of each client when it became ready.
        nodes: The node of each client that can be reached by a message.
        peers: Under secure aggregation, each client that was ever ready, as others are told of it.
    """

    members: Callable[[], Members]
    participants: Sequence[Participant]
    unseen: Collection[int] = ()
    owners: Callable[[], Mapping[int, int]] = dict
    proven: bool = False
    model: str = ""
    plugins: Mapping[str, str] = field(default_factory=dict)
    private: bool = False
    run: str | None = None
    audit: Record = no_op_recorder
    report: Report = lambda client, kind, reason: None
    registered: dict[int, Joined] = field(default_factory=dict)
    nodes: dict[int, int] = field(default_factory=dict)
    peers: dict[int, Peer] = field(default_factory=dict)
    _absences: dict[int, Absence] = field(default_factory=dict)
    _waits: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Keep running with the last valid registry where the file has a fault."""
        self.members = CachedMembers(
            self.members, lambda reason: self.audit("unread_members", reason=reason)
        )
        self._noted = Limited(lambda event, **facts: self.audit(event, **facts))
        self._clients = {own.number: client for client, own in enumerate(self.participants)}
        now = time.time()
        self._absences = {client: Absence(now, UNSEEN) for client in range(len(self.participants))}

    @property
    def judged(self) -> Collection[int]:
        """View of the registered clients that have held-out rows of their own."""
        return _Judged(self.registered, self.unseen)

    def title(self, client: int) -> str:
        """Return the name of a client in messages."""
        return f"{self.participants[client].name} (client {client})"

    def client_of(self, number: int) -> int | None:
        """Return the client number of a member in this run, if the run expects it."""
        return self._clients.get(number)

    def unknown(self, online: Collection[int]) -> dict[int, int]:
        """Return the online nodes that must be asked whether they are ready, with their clients.

        Nodes that are offline are forgotten.
        """
        self.nodes = {client: node for client, node in self.nodes.items() if node in online}
        self._waits = {node: own for node, own in self._waits.items() if node in online}
        now, ready = time.monotonic(), set(self.nodes.values())
        found, here = {}, set()
        for node, number in self.owners().items():
            client = self._clients.get(number)
            if client is None or node not in online:
                continue
            here.add(client)
            if node not in ready and now >= self._waits.get(node, 0.0):
                found[node] = client
        for client, absence in self._absences.items():
            if client not in here and absence.reason not in (UNSEEN, GONE, *NOT_LET_IN):
                self._absent(client, GONE)
        return dict(sorted(found.items()))

    def asked(self, node: int, client: int) -> None:
        """Record that a client has been asked whether it is ready."""
        self._wait(node, AGAIN if node in self._waits else SILENT)
        if client in self._absences and self._absences[client].reason in (UNSEEN, GONE):
            self._absent(client, ASKED)

    def _wait(self, node: int, seconds: float) -> None:
        self._waits[node] = time.monotonic() + seconds

    def lost(self, client: int, reason: str) -> None:
        """Record that a client may be gone, and why: it must register again."""
        self.nodes.pop(client, None)
        self._absent(client, reason)

    def there(self, streaming: Container[int]) -> list[int]:
        """Return the clients that are ready and can be reached: by a message, or over an open stream."""
        ready = self.registered.keys() - set(self.unseen)
        return sorted(client for client in ready if self._is_reached(client, streaming))

    def absent(self, streaming: Container[int] = ()) -> dict[int, Absence]:
        """Return the clients that cannot be asked, unseen clients included, and why."""
        found = {}
        for client in range(len(self.participants)):
            if client in self.registered and self._is_reached(client, streaming):
                self._absences.pop(client, None)
            else:
                found[client] = self._absences.setdefault(client, Absence(time.time(), GONE))
        return found

    def attendance(self, streaming: Container[int] = ()) -> list[dict[str, object]]:
        """Return each client with its member and, if it is absent, since when and why."""
        absent = self.absent(streaming)
        return [
            {
                "client": client,
                "number": own.number,
                "name": own.name,
                "since": absent[client].since if client in absent else None,
                "reason": absent[client].reason if client in absent else "",
            }
            for client, own in enumerate(self.participants)
        ]

    def withdrawn(self) -> set[int]:
        """Return the clients whose members were withdrawn: a run continues without them on purpose."""
        members, found = self.members(), set()
        for client, own in enumerate(self.participants):
            member = members.numbered(own.number)
            if member is not None and member.state == "withdrawn":
                found.add(client)
        return found

    def not_let_in(self) -> set[int]:
        """Return the clients whose members are no longer allowed, withdrawn ones included."""
        members = self.members()
        return {
            client
            for client, own in enumerate(self.participants)
            if not members.is_allowed(own.number)
        }

    def _is_reached(self, client: int, streaming: Container[int]) -> bool:
        return client in self.nodes or client in streaming

    def _absent(self, client: int, reason: str) -> None:
        since = self._absences[client].since if client in self._absences else time.time()
        self._absences[client] = Absence(since, reason)

    def revoked(self) -> list[int]:
        """Forget the clients whose members are no longer allowed; return them."""
        members, gone = self.members(), []
        for client, own in enumerate(self.participants):
            if members.is_allowed(own.number):
                if client in self._absences and self._absences[client].reason in NOT_LET_IN:
                    self._absent(client, GONE)
                continue
            if self.registered.pop(client, None) is not None:
                gone.append(client)
                self.audit("revoked", client=client)
            member = members.numbered(own.number)
            taken_back = member is not None and member.state == "withdrawn"
            self.lost(client, WITHDRAWN if taken_back else REVOKED)
        return gone

    def register(
        self, node: int, found: Envelope | MessageError | str, asked: RequestHeader
    ) -> None:
        """Register a client that reports to be ready, or record why it is refused.

        Args:
            node: Its node.
            found: Its reply, an error in it, or why there is none.
            asked: The request.
        """
        client = asked.client
        assert client is not None, "a request is to a client"
        try:
            if isinstance(found, MessageError):
                raise found
            reply = self.trusted(found, asked) if isinstance(found, Envelope) else None
        except MessageError as error:
            self._refuse(node, client, str(error))
            if self.proven:
                self.report(
                    client, error.kind, f"its answer to the request for registration: {error}"
                )
            return
        problem = str(found) if reply is None else self._problem(reply)
        if reply is None or reply.joined is None or problem is not None:
            self._refuse(node, client, problem or "it does not report its rows and model")
            return
        self.registered[client], self.nodes[client] = reply.joined, node
        self._absences.pop(client, None)
        self._waits.pop(node, None)
        facts = {"rows": reply.joined.rows, "model": reply.joined.model}
        self._noted("joined", source=client, client=client, node=node, **facts)

    def _refuse(self, node: int, client: int, reason: str) -> None:
        self._absent(client, one_line(reason, WHY))
        said = self._absences[client].reason
        self._noted("refused_join", source=node, client=client, node=node, reason=said)
        self._wait(node, AGAIN)

    def trusted(
        self, envelope: Envelope, asked: RequestHeader, stream: int | None = None
    ) -> ReplyHeader:
        """Return the header of a reply, after checking its sender and that it answers the request.

        Args:
            envelope: The reply.
            asked: The request.
            stream: The client over whose stream it came, which was authenticated when it was opened.

        Raises:
            MessageError: It is not a reply, answers another request, or is not signed by the client it
                names.
        """
        reply = envelope.read(ReplyHeader, longest=MAX_REPLY_HEADER)
        if stream != reply.client:
            key = None
            if reply.client < len(self.participants):
                key = self.members().key(self.participants[reply.client].number)
            if key is None or not is_signed(key, envelope.header, envelope.signature):
                raise MessageError(
                    f"it is not signed with the key of client {reply.client}", "forged"
                )
        expected = (asked.run, len(asked.began), asked.round, asked.number)
        found = (reply.run, reply.began, reply.round, reply.number)
        if found != expected or asked.client not in (None, reply.client):
            raise MessageError(
                f"it is of client {reply.client}, round {reply.round}, message {reply.number} of run "
                f"{reply.run[:8]}, asked was client {asked.client}, round {asked.round}, message "
                f"{asked.number} of run {asked.run[:8]}",
                "replayed",
            )
        return reply

    def _signing_problem(self, client: int, joined: Joined) -> str | None:
        """Return why others could not check a client's signatures on stages of a sum, or ``None``."""
        if joined.signing is None:
            return (
                f"it has fedloom {joined.version}, which knows no secure aggregation between machines: "
                "upgrade it"
            )
        number, own = self.participants[client].number, joined.signing
        member = self.members().numbered(number)
        raw = bytes.fromhex(own.public), bytes.fromhex(own.signature)
        if member is None or not is_certified(member.key, self.run or "", client, number, *raw):
            return "its key for secure aggregation is not certified by its own key"
        self.peers[client] = Peer(client=client, member=number, key=member.key, signing=own)
        return None

    def _problem(self, reply: ReplyHeader) -> str | None:
        """Return why a client cannot take part in this run, or ``None``; this is not a violation."""
        if reply.error is not None or reply.joined is None:
            return reply.error or "it does not report its rows and model"
        if reply.joined.protocol != PROTOCOL:
            return (
                f"it has fedloom {reply.joined.version} (protocol {reply.joined.protocol}), the server "
                f"{version('fedloom')} (protocol {PROTOCOL}): upgrade the older one"
            )
        if self.private and reply.joined.private is None:
            old = reply.joined.version
            return f"it has fedloom {old}, which would train without [privacy]: upgrade it"
        if self.run is not None and (problem := self._signing_problem(reply.client, reply.joined)):
            return problem
        if reply.joined.model != self.model:
            return (
                f"its model or tokenizer differs: SHA-256 {reply.joined.model[:12]}, the "
                f"server's is {self.model[:12]}"
            )
        for section, digest in sorted(self.plugins.items()):
            theirs = reply.joined.plugins.get(section, "")
            if theirs != digest:
                return (
                    f"its file of {section}.name is another one: SHA-256 {theirs[:12] or 'unknown'}, the "
                    f"server's is {digest[:12]}: give both the same file, then restart the client"
                )
        return None


@dataclass(frozen=True)
class _Judged(Collection[int]):
    registered: Mapping[int, Joined]
    unseen: Collection[int]

    def __contains__(self, client: object) -> bool:
        return client in set(self)

    def __iter__(self) -> Iterator[int]:
        own = (client for client, said in self.registered.items() if said.held_out)
        return (client for client in own if client not in self.unseen)

    def __len__(self) -> int:
        return sum(1 for _ in self)
