"""Who takes part in a run between machines: who is ready, where, and whose a reply is.

What a node sends is proven to be a client's where the node has proven the client's key before anything of
it is passed on (:attr:`Roster.owners`): without that, a third party may send anything in a client's name,
and replay what the client once signed. So what is wrong with a reply to the question who a node is, is an
offence of the client that owns the node, or nobody's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version

from fedloom.audit import Limited, Record, unheard
from fedloom.envelope import MAX_REPLY_HEADER, Envelope, Joined, ReplyHeader, RequestHeader
from fedloom.errors import MessageError
from fedloom.identity import CachedMembers, Members, is_signed
from fedloom.offences import WHY, Report, one_line

AGAIN = 30.0
"""Seconds until a client that could not join is asked again."""

SILENT = 15.0
"""Seconds until a node that does not say who it is is asked again; doubled each time. The question or its
answer may have been lost on the client's machine."""


@dataclass
class Roster:
    """The clients of a run.

    Attributes:
        members: Returns who is let in, as of now.
        newcomers: Clients that are there and no members yet: only who names them reaches them.
        model: SHA-256 of the backbone and tokenizer that all must have.
        audit: Told who joins and who is refused.
        report: Told of what clients get wrong.
        owners: Returns the client whose key each node has proven; empty where nodes prove nothing.
        joined: What each client said of itself when it was ready.
        nodes: Where a client can be reached by a message, while it can.
        problems: Why nodes that are there could not join.
    """

    members: Callable[[], Members]
    newcomers: Collection[int]
    model: str = ""
    audit: Record = unheard
    report: Report = lambda client, kind, reason: None
    owners: Callable[[], Mapping[int, int]] = dict
    joined: dict[int, Joined] = field(default_factory=dict)
    nodes: dict[int, int] = field(default_factory=dict)
    problems: dict[int, str] = field(default_factory=dict)
    _waits: dict[int, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Have a slip in the list of members end no run."""
        self.members = CachedMembers(
            self.members, lambda reason: self.audit("unread_members", reason=reason)
        )
        self._noted = Limited(lambda event, **facts: self.audit(event, **facts))

    @property
    def judged(self) -> Collection[int]:
        """Clients that have held-out rows of their own, of those met by the time it is looked at."""
        return _Judged(self.joined, self.newcomers)

    def unknown(self, online: Collection[int]) -> list[int]:
        """Return the nodes, of those online, that must be asked who they are; forget those that went."""
        self.nodes = {client: node for client, node in self.nodes.items() if node in online}
        self._waits = {node: own for node, own in self._waits.items() if node in online}
        now = time.monotonic()
        waiting = {node for node, (until, _) in self._waits.items() if now < until}
        return sorted(set(online) - waiting - set(self.nodes.values()))

    def asked(self, node: int) -> None:
        """Note that a node has been asked who it is, and has a while to say so."""
        _, before = self._waits.get(node, (0.0, SILENT / 2))
        self._wait(node, 2 * before)

    def _wait(self, node: int, seconds: float) -> None:
        self._waits[node] = time.monotonic() + seconds, seconds

    def lost(self, client: int) -> None:
        """Note that a client may be gone: it must say again that it is there."""
        self.nodes.pop(client, None)

    def there(self, streaming: Container[int]) -> list[int]:
        """Return the members that are ready and can be reached: by a message, or over an open stream."""
        ready = self.joined.keys() - set(self.newcomers)
        return sorted(client for client in ready if client in self.nodes or client in streaming)

    def revoked(self) -> list[int]:
        """Forget the clients that are let in no longer; return them."""
        members = self.members()
        gone = [client for client in self.joined if not members.lets_in(client)]
        for client in gone:
            del self.joined[client]
            self.lost(client)
            self.audit("revoked", client=client)
        return gone

    def welcome(
        self, node: int, found: Envelope | MessageError | str, asked: RequestHeader
    ) -> None:
        """Take a client in that says it is ready, or note why not.

        Args:
            node: Where it is.
            found: What it replied, what is wrong with that, or why it did not.
            asked: The question.
        """
        try:
            if isinstance(found, MessageError):
                raise found
            reply = self.trusted(found, asked) if isinstance(found, Envelope) else None
        except MessageError as error:
            self._refuse(node, str(error))
            if (owner := self.owners().get(node)) is not None:
                self.report(owner, error.kind, f"its answer to who it is: {error}")
            return
        problem = str(found) if reply is None else self._problem(reply)
        if reply is None or reply.joined is None or problem is not None:
            self._refuse(node, problem or "it does not say what it has")
            return
        self.joined[reply.client], self.nodes[reply.client] = reply.joined, node
        self.problems.pop(node, None)
        self._waits.pop(node, None)
        facts = {"rows": reply.joined.rows, "model": reply.joined.model}
        self._noted("joined", source=reply.client, client=reply.client, node=node, **facts)

    def _refuse(self, node: int, reason: str) -> None:
        self.problems[node] = one_line(reason, WHY)
        self._noted("refused_join", source=node, node=node, reason=self.problems[node])
        self._wait(node, AGAIN)

    def trusted(
        self, envelope: Envelope, asked: RequestHeader, stream: int | None = None
    ) -> ReplyHeader:
        """Return the header of a reply to what was asked, from who it says.

        Args:
            envelope: The reply.
            asked: The question.
            stream: The client over whose stream it came; that was made sure of when it was opened.

        Raises:
            MessageError: It is no reply, not to this, or not signed by the client it names.
        """
        reply = envelope.read(ReplyHeader, longest=MAX_REPLY_HEADER)
        if stream != reply.client:
            key = self.members().key(reply.client)
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

    def _problem(self, reply: ReplyHeader) -> str | None:
        """Return why a client cannot take part in this run, if so; it has not offended thereby."""
        if reply.error is not None or reply.joined is None:
            return reply.error or "it does not say what it has"
        if reply.joined.version != (own := version("fedloom")):
            return f"it has fedloom {reply.joined.version}, the server {own}: upgrade one of them"
        if reply.joined.model != self.model:
            return (
                f"its model or tokenizer is another one: SHA-256 {reply.joined.model[:12]}, the "
                f"server's is {self.model[:12]}"
            )
        return None


@dataclass(frozen=True)
class _Judged(Collection[int]):
    joined: Mapping[int, Joined]
    newcomers: Collection[int]

    def __contains__(self, client: object) -> bool:
        return client in set(self)

    def __iter__(self) -> Iterator[int]:
        own = (client for client, said in self.joined.items() if said.held_out)
        return (client for client in own if client not in self.newcomers)

    def __len__(self) -> int:
        return sum(1 for _ in self)
