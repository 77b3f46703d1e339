"""The deployed engine: requests and replies as messages of Flower, between machines.

Of Flower it uses messages and the list of nodes, nothing else. Each message is one opaque array (the
encoded payload, bf16 and all) beside a signed header (``envelope.py``). The first message to a client
brings it all it must know of the run, and, where streams are allowed, the place where it may open one;
a client with an open stream is asked over that, any other by a message of Flower.
"""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from flwr.app import Message

from fedloom.accounting.ledger import Cost, Ledger
from fedloom.engines.records import from_records, to_records
from fedloom.engines.streams import Streams, taken
from fedloom.envelope import (
    MAX_REPLY_HEADER,
    PREFIX,
    Envelope,
    Joined,
    ReplyHeader,
    RequestHeader,
    seal,
)
from fedloom.errors import MessageError, RoundFailed
from fedloom.identity import Members, is_signed
from fedloom.messages import Answer, Exchange, Payload, Schema, encode
from fedloom.server import Briefing, FederationSettings

POLL = 0.1
"""Seconds between looks for replies."""

AGAIN = 30.0
"""Seconds until a client that could not join is asked again."""

BROKEN = "its stream broke"
LOOK = 1.0
"""Seconds between looks for clients, while a run waits for them."""


class Mail(Protocol):
    """What is used of a Flower grid."""

    def get_nodes(self) -> Iterable[Any]:
        """Return the nodes there are, each with ``node_id`` and ``status``."""
        ...

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; return their ids."""
        ...

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there by now."""
        ...


@dataclass(frozen=True)
class Post:
    """What the server needs to reach clients.

    Attributes:
        mail: Flower's messages.
        members: Returns who is let in, as of now.
        sign: Signs a header with the key of the server's certificate; ``None`` without TLS.
        certificate: That certificate in PEM.
        open_streams: Opens the place where streams of a run's clients come in; ``None`` for no streams.
    """

    mail: Mail
    members: Callable[[], Members]
    sign: Callable[[bytes], bytes] | None = None
    certificate: str | None = None
    open_streams: Callable[[str], Streams] | None = None


@dataclass
class _Asked:
    """A message that is under way."""

    header: RequestHeader
    sent: int
    """Bytes of its payload."""


@dataclass
class FlowerEngine:
    """Carries exchanges to clients on other machines.

    Attributes:
        post: How they are reached.
        federation: How many there should be, how long they have.
        newcomers: Clients that are there and no members yet: only who names them reaches them.
        late: Replies that came after their round had gone on without them.
        problems: Why nodes that are there could not join.
    """

    post: Post
    federation: FederationSettings
    newcomers: Collection[int] = ()
    late: int = 0
    problems: dict[int, str] = field(default_factory=dict)
    _joined: dict[int, Joined] = field(default_factory=dict)
    _nodes: dict[int, int] = field(default_factory=dict)
    _asked_nodes: dict[str, int] = field(default_factory=dict)
    _joins: dict[int, RequestHeader] = field(default_factory=dict)
    _refused: dict[int, float] = field(default_factory=dict)
    _forgotten: set[str] = field(default_factory=set)
    _number: int = 0
    _briefing: Briefing | None = None
    _streams: Streams | None = None
    _ledger: Ledger = field(default_factory=Ledger)

    @property
    def briefing(self) -> Briefing:
        """What clients are told of the run, from :meth:`begin` on."""
        assert self._briefing is not None, "the runner begins before it asks"
        return self._briefing

    @property
    def judged(self) -> Collection[int]:
        """Clients that have held-out rows of their own, of those met so far."""
        return _Judged(self._joined, self.newcomers)

    def begin(self, briefing: Briefing, ledger: Ledger) -> None:
        """Meet the clients; wait until enough for a quorum are ready, and a moment for the others."""
        self._briefing, self._ledger = briefing, ledger
        if self.post.open_streams is not None and self.federation.streams:
            self._streams = self.post.open_streams(briefing.run)
        self._wait_for(self.federation.clients, f"of {self.federation.clients} clients")

    def sizes(self) -> dict[int, int]:
        """Return the training rows of each client that is there now; waits for a quorum of them."""
        self._meet()
        there = self._there()
        needed = max(1, math.ceil(self.federation.quorum * self.federation.cohort_size))
        if len(there) < needed:
            self._wait_for(needed, "clients that a quorum needs")
            there = self._there()
        return {client: self._joined[client].rows for client in there}

    def exchange(self, exchange: Exchange) -> Iterator[Answer]:
        """Carry out one action on every client asked, all at once."""
        schemas = {
            "request": exchange.request_schema.to_table(),
            "reply": exchange.reply_schema.to_table(),
        }
        waiting: dict[int, _Asked] = {}
        messages: dict[str, int] = {}
        limit = exchange.reply_schema.max_bytes + PREFIX.size + MAX_REPLY_HEADER
        for client, data in exchange.requests.items():
            header = self._header("exchange", client)
            header = header.model_copy(
                update={"round": exchange.round, "action": exchange.action, **schemas}
            )
            if self._send(client, header, data, limit, messages):
                waiting[client] = _Asked(header, len(data))
            else:
                yield Answer(client, error="it is not there")
        yield from self._collect(exchange, waiting, messages)

    def finish_round(self) -> None:
        """Do nothing: clients know by the next round's messages that this one is over."""

    def end(self, keep: Payload | None) -> None:
        """Tell clients that the run is over, and wait a while for those that write models."""
        waiting: dict[int, _Asked] = {}
        messages: dict[str, int] = {}
        schema = Schema.of(keep.tensors) if keep is not None else None
        data = encode(keep, schema) if keep is not None and schema is not None else b""
        for client in self._there():
            header = self._header("end", client)
            if schema is not None:
                header = header.model_copy(update={"request": schema.to_table()})
            waiting[client] = _Asked(header, len(data))
            self._send(client, header, data, PREFIX.size + MAX_REPLY_HEADER, messages)
        end = time.monotonic() + (self.federation.deadline or self.federation.patience)
        while waiting and time.monotonic() < end:
            for client, _ in self._arrivals(waiting, messages):
                waiting.pop(client, None)

    def close(self) -> None:
        """Close all streams."""
        if self._streams is not None:
            self._streams.close()

    def _collect(
        self, exchange: Exchange, waiting: dict[int, _Asked], messages: dict[str, int]
    ) -> Iterator[Answer]:
        """Yield answers as they come, until all are there or their time is over."""
        start = time.monotonic()
        deadline = self.federation.deadline
        while waiting:
            for client, found in self._arrivals(waiting, messages):
                if client in waiting:
                    if found == BROKEN:  # it may be gone: who is there says so again
                        self._nodes.pop(client, None)
                    yield self._answer(waiting.pop(client), exchange, found)
            if deadline is not None and time.monotonic() - start > deadline:
                for client in sorted(waiting):
                    yield Answer(client, error=f"no answer within {deadline:g} seconds")
                late = {id for id, client in messages.items() if client in waiting}
                self._forgotten |= late
                for client in waiting:
                    self._nodes.pop(client, None)
                    if self._streams is not None and client not in messages.values():
                        self._streams.drop(client)  # or its answer would be taken for the next one
                return

    def _arrivals(
        self, waiting: Mapping[int, _Asked], messages: dict[str, int]
    ) -> Iterator[tuple[int, Envelope | str]]:
        """Yield what has come since the last look: envelopes, or why there is none."""
        streams = self._streams
        if streams is not None and len(waiting) > len(messages):
            try:
                client, frame = streams.arrived.get(timeout=POLL)
                while True:
                    if client not in messages.values():
                        yield client, _unpacked(frame)
                    client, frame = streams.arrived.get_nowait()
            except queue.Empty:
                pass
        else:
            time.sleep(POLL)
        if not messages and not self._forgotten and not self._asked_nodes:
            return
        for message in self.post.mail.pull_messages(
            [*messages, *self._forgotten, *self._asked_nodes]
        ):
            id = message.metadata.reply_to_message_id
            if id in self._forgotten:
                self._forgotten.discard(id)
                self.late += 1
                self.briefing.audit("late", replies=self.late)
            elif id in self._asked_nodes:
                self._welcome(self._asked_nodes.pop(id), _read(message))
            elif id in messages:
                yield messages.pop(id), _read(message)

    def _answer(self, asked: _Asked, exchange: Exchange, found: Envelope | str) -> Answer:
        client = asked.header.client
        assert client is not None, "exchanges are asked by number"
        cost = Cost(exchange.round, client, exchange.action, bytes_down=asked.sent, exchanges=1)
        self._ledger.costs.append(cost)
        if isinstance(found, str):
            return Answer(client, error=found)
        try:
            reply = self._checked(found, asked.header)
        except MessageError as error:
            return Answer(client, error=f"its answer cannot be trusted: {error}")
        for work in reply.work:
            self._ledger.costs.append(Cost(exchange.round, client, **work.model_dump()))
        if reply.error is not None:
            return Answer(client, error=reply.error)
        cost.bytes_up = len(found.payload)
        return Answer(client, found.payload)

    def _checked(self, envelope: Envelope, asked: RequestHeader) -> ReplyHeader:
        """Return the header of a reply to what was asked, from who it says.

        Raises:
            MessageError: It is none, or not signed by that client.
        """
        reply = envelope.read(ReplyHeader, longest=MAX_REPLY_HEADER)
        streams = self._streams
        streamed = streams is not None and not envelope.signature and reply.client in streams
        if not streamed:  # whose a stream is was made sure of when it was opened
            key = self.post.members().key(reply.client)
            if key is None or not is_signed(key, envelope.header, envelope.signature):
                raise MessageError(f"it is not signed with the key of client {reply.client}")
        expected = (asked.run, len(asked.began), asked.round, asked.number)
        found = (reply.run, reply.began, reply.round, reply.number)
        if found != expected or asked.client not in (None, reply.client):
            raise MessageError(
                f"it is of client {reply.client}, round {reply.round}, message {reply.number} of run "
                f"{reply.run[:8]}, asked was client {asked.client}, round {asked.round}, message "
                f"{asked.number} of run {asked.run[:8]}"
            )
        return reply

    def _header(self, kind: Any, client: int | None) -> RequestHeader:
        self._number += 1
        briefing = self.briefing
        return RequestHeader(
            kind=kind,
            run=briefing.run,
            began=list(briefing.began),
            client=client,
            number=self._number,
        )

    def _send(
        self, client: int, header: RequestHeader, data: bytes, limit: int, messages: dict[str, int]
    ) -> bool:
        """Send over the client's stream if it has one, or as a message; return whether it could."""
        streams = self._streams
        if streams is not None and client in streams:
            streams.send(client, seal(header, data).parts(), limit)
        elif client in self._nodes:
            messages[self._push(self._nodes[client], header, data)] = client
        else:
            return False
        return True

    def _push(self, node: int, header: RequestHeader, payload: bytes) -> str:
        """Send a message of Flower that says all a client must know; return its id."""
        briefing = self.briefing
        told = {
            "experiment": briefing.experiment,
            "classes": list(briefing.classes),
            "streams": self._streams is not None,
            "certificate": self.post.certificate,
        }
        sealed = seal(header.model_copy(update=told), payload, self.post.sign)
        message = Message(to_records(sealed), dst_node_id=node, message_type="query")
        (id,) = self.post.mail.push_messages([message])
        return id

    def _meet(self) -> None:
        """Ask nodes that are new here who they are, and hear those that have said so."""
        online = {n.node_id for n in self.post.mail.get_nodes() if n.status == "online"}
        for client, node in list(self._nodes.items()):
            if node not in online:
                del self._nodes[client]
        refused = {n for n, moment in self._refused.items() if time.monotonic() < moment + AGAIN}
        known = {*self._nodes.values(), *self._asked_nodes.values(), *refused}
        for node in sorted(online - known):
            header = self._header("join", None)
            self._asked_nodes[self._push(node, header, b"")] = node
            self._joins[node] = header
        if self._asked_nodes:
            for _ in self._arrivals({}, {}):
                pass

    def _welcome(self, node: int, found: Envelope | str) -> None:
        """Take a client in that says it is ready, or note why not."""
        audit, asked = self.briefing.audit, self._joins.pop(node)
        try:
            if isinstance(found, str):
                raise MessageError(found)
            reply = self._checked(found, asked)
            if reply.error is not None or reply.joined is None:
                raise MessageError(reply.error or "it does not say what it has")
            if reply.joined.version != (own := version("fedloom")):
                raise MessageError(
                    f"it has fedloom {reply.joined.version}, the server {own}: upgrade one of them"
                )
            if reply.joined.model != self.briefing.model:
                raise MessageError(
                    f"its model or tokenizer is another one: SHA-256 {reply.joined.model[:12]}, the "
                    f"server's is {self.briefing.model[:12]}"
                )
        except MessageError as error:
            audit("refused_join", node=node, reason=str(error))
            self.problems[node], self._refused[node] = str(error), time.monotonic()
            return
        self._joined[reply.client], self._nodes[reply.client] = reply.joined, node
        facts = {"rows": reply.joined.rows, "model": reply.joined.model}
        audit("joined", client=reply.client, node=node, **facts)

    def _there(self) -> list[int]:
        """Return the members that are ready and can be reached."""
        streams = self._streams
        return sorted(
            client
            for client in self._joined
            if client not in self.newcomers
            and (client in self._nodes or (streams is not None and client in streams))
        )

    def _wait_for(self, needed: int, what: str) -> None:
        """Wait until so many clients are ready, as long as patience lasts; a quorum is enough then.

        Raises:
            RoundFailed: There are fewer than a quorum.
        """
        end = time.monotonic() + self.federation.patience
        while True:
            self._meet()
            ready = len(self._there()) + len(set(self._joined) & set(self.newcomers))
            if ready >= needed:
                return
            if time.monotonic() > end:
                break
            time.sleep(LOOK)
        quorum = max(1, math.ceil(self.federation.quorum * self.federation.cohort_size))
        if ready < quorum:
            why = "; ".join(f"node {node}: {text}" for node, text in self.problems.items())
            raise RoundFailed(
                f"{ready} {what} were ready within federation.patience = "
                f"{self.federation.patience:g} seconds, federation.quorum asks for {quorum}"
                + (f". {why}" if why else "")
            )


@dataclass(frozen=True)
class _Judged(Collection[int]):
    """Members with held-out rows, as of when it is looked at."""

    joined: Mapping[int, Joined]
    newcomers: Collection[int]

    def __contains__(self, client: object) -> bool:
        return client in set(self)

    def __iter__(self) -> Iterator[int]:
        own = (client for client, said in self.joined.items() if said.held_out)
        return (client for client in own if client not in self.newcomers)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _read(message: Message) -> Envelope | str:
    """Return what a reply holds, or why there is none."""
    if message.has_error():
        return f"{message.error.reason or 'it failed'}"
    try:
        return from_records(message.content)
    except MessageError as error:
        return str(error)


def _unpacked(frame: bytes | Path | None) -> Envelope | str:
    if frame is None:
        return BROKEN
    try:
        return Envelope.unpack(taken(frame))
    except MessageError as error:
        return str(error)
