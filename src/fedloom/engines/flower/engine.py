"""The deployed engine: requests and replies as messages of Flower, between machines.

It uses only two parts of Flower: messages and the list of nodes (``transport.py``). Each message is one
opaque array (the encoded payload) beside a signed header (``wire/envelope.py``). The first message to a
client holds the description of the run and, where streams are allowed, the address for opening one; a
client with an open stream is asked over it, any other client by a Flower message.

A wrong answer is a violation (``federation/violations.py``) where its sender is proven, so that no third
party can put a client in quarantine by sending in its name:

- Over a stream: its client proved its key before the stream was passed on to this process. (Without TLS,
  an attacker in the network may change the bytes, or disconnect the client.)
- By a message of Flower: where each node has proven a client's key (``FlowerTransport.proven``, with
  TLS). A wrong signature proves nothing, and a valid one proves who made a reply, not who sends it now:
  an attacker can replay an old reply. Once a reply is signed for exactly this request, its content is
  attributed to its client.
- An answer that came in two parts, before and after its client came back, may come from two processes of
  an honest client, of which the first was killed.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from fedloom.accounting.costs import BEGIN, REFERENCE, Cost
from fedloom.accounting.ledger import Ledger
from fedloom.engines.flower.run_clients import RunClients
from fedloom.engines.flower.streams import StreamRequest, StreamResponse, Streams, taken
from fedloom.engines.flower.sum_headers import bytes_beside, sum_headers
from fedloom.engines.flower.transport import SMALL, FlowerTransport
from fedloom.errors import MessageError, OutputError, RoundFailed
from fedloom.federation.engine import RunDescription
from fedloom.federation.participants import FederationSettings
from fedloom.federation.presence import Membership
from fedloom.federation.records import Absence, Participant
from fedloom.federation.violations import ViolationObserver
from fedloom.security.audit_log import SUBMITTED, Limited, no_op_recorder
from fedloom.wire.envelope import LACKS_START, Envelope, PrivateWork, RequestHeader, WorkDone, seal
from fedloom.wire.messages import Answer, Exchange, Payload, encode
from fedloom.wire.schema import Schema

POLL = 0.1
"""Seconds between checks for replies."""

LOOK = 1.0
"""Seconds between checks for clients, while a run waits for them."""

NOTICE = 30.0
"""Seconds between messages that name the clients a run waits for."""

NOT_CONNECTED = "it is not connected"

BROKEN = "its connection broke and was not restored"


@dataclass(frozen=True)
class _Asked:
    """A pending request: client, bytes of its payload, and its id if sent over a stream."""

    client: int
    header: RequestHeader
    sent: int
    question: int | None
    since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class _Found:
    """The outcome of a request: an envelope, an error in the answer, or why there is none.

    Attributes:
        content: See above.
        proven: Whether it is proven that the client sent it.
    """

    content: Envelope | MessageError | str
    proven: bool


@dataclass
class FlowerEngine:
    """Carries exchanges to clients on other machines.

    Attributes:
        transport: How clients are reached.
        federation: Number of clients, deadlines.
        run_clients: The clients of the run and their state.
        watch: Observer of violations and quarantine.
        attend: Called with the presence of each client, and the reason of its absence, whenever that
            changes.
        late: Number of replies that came after their round had continued without them.
    """

    name: ClassVar[str] = "flower"
    transport: FlowerTransport
    federation: FederationSettings
    run_clients: RunClients
    watch: ViolationObserver = field(default_factory=ViolationObserver)
    attend: Callable[[list[dict[str, object]]], object] = lambda attendance: None
    late: int = 0
    _attendance: list[dict[str, object]] = field(default_factory=list)
    _registering: dict[str, tuple[int, RequestHeader]] = field(default_factory=dict)
    _messages: dict[str, int] = field(default_factory=dict)
    _forgotten: set[str] = field(default_factory=set)
    _at_work: dict[int, tuple[_Asked, Exchange]] = field(default_factory=dict)
    """Submitted requests whose answers have not arrived, by client."""
    _arrived: deque[tuple[Answer, int]] = field(default_factory=deque)
    """Answers to submitted requests in the order in which they came, with the number of the message."""
    _number: int = 0
    _numbers: dict[int, int] = field(default_factory=dict)
    _discarded: dict[int, list[list[int]]] = field(default_factory=dict)
    _run_description: RunDescription | None = None
    _streams: Streams | None = None
    _start: tuple[Schema, bytes] | None = None
    _ledger: Ledger = field(default_factory=Ledger)
    _noted: Limited = field(default_factory=lambda: Limited(no_op_recorder))

    @property
    def run_description(self) -> RunDescription:
        """The description of the run that is sent to clients; set by :meth:`begin`."""
        assert self._run_description is not None, "the runner begins before it asks"
        return self._run_description

    @property
    def judged(self) -> Collection[int]:
        """Registered clients that have held-out rows of their own."""
        return self.run_clients.judged

    @property
    def participants(self) -> Sequence[Participant]:
        """The members that the run expects, in the order of their clients' numbers."""
        return self.run_clients.participants

    def held_out(self) -> dict[int, int]:
        """Return the number of held-out rows of each registered client."""
        return {client: own.held_out for client, own in sorted(self.run_clients.registered.items())}

    def private_work(self) -> dict[int, PrivateWork]:
        """Return what registered clients have said of their private steps."""
        registered = sorted(self.run_clients.registered.items())
        return {client: own.private for client, own in registered if own.private is not None}

    def title(self, client: int) -> str:
        """Return the name of a client in messages."""
        return self.run_clients.title(client)

    def begin(self, run_description: RunDescription, ledger: Ledger) -> None:
        """Wait for the clients: for all, or after federation.patience for the required ones."""
        self._run_description, self._ledger = run_description, ledger
        self.run_clients.model, self.run_clients.audit = (
            run_description.model,
            run_description.audit,
        )
        self.run_clients.report, self._noted = (
            run_description.report,
            Limited(run_description.audit),
        )
        self.run_clients.plugins = run_description.plugins
        self.run_clients.private = run_description.private
        self.run_clients.run = run_description.run if run_description.summed else None
        if run_description.start is not None:
            schema = Schema.of(run_description.start)
            self._start = schema, encode(Payload(run_description.start), schema)
        for client, segment, number in run_description.discarded:
            self._discarded.setdefault(client, []).append([segment, number])
        if self.transport.open_streams is not None and self.federation.streams:
            self._streams = self.transport.open_streams(
                run_description.run, self.federation.reconnect
            )
            self._streams.client_of = self.run_clients.client_of
            self._streams.report = run_description.report
            self._streams.returned = self._note_return
        everybody = set(range(len(self.participants))) - self.run_clients.withdrawn()
        needed = min(self.federation.required, len(everybody))
        self._wait_for(everybody, len(everybody), needed, "federation.require")

    def _note_return(self, client: int, held: int) -> None:
        """Record that a client has reconnected; a full disk must not end the thread of a stream."""
        with contextlib.suppress(OutputError):
            self._noted("returned", source=client, client=client, held=held)

    def sizes(self) -> dict[int, int]:
        """Return the training rows of each client that is present; waits for a quorum of them."""
        self._meet()
        there = self._there()
        if len(there) < self._quorum:
            expected = set(range(len(self.participants))) - set(self.run_clients.unseen)
            expected -= self.run_clients.withdrawn()
            self._wait_for(expected, self._quorum, self._quorum, "federation.quorum")
            there = self._there()
        return {client: self.run_clients.registered[client].rows for client in there}

    def membership(self) -> Membership:
        """Return the clients of the run, those no longer allowed, and the rows of registered ones."""
        enrolled = set(range(len(self.participants))) - set(self.run_clients.unseen)
        rows = {c: own.rows for c, own in self.run_clients.registered.items() if c in enrolled}
        left = frozenset(self.run_clients.not_let_in() & enrolled)
        return Membership(tuple(sorted(enrolled)), left, rows)

    def absent(self) -> dict[int, Absence]:
        """Return the clients that the run expects and that cannot be asked, and why."""
        return self.run_clients.absent(self._streaming())

    def exchange(self, exchange: Exchange) -> Iterator[Answer]:
        """Send one request to each client, all at once, and yield their answers.

        Clients that are at work on a submitted request are asked once they have answered that.
        """
        notice = _Notice(self.run_description.warn)
        while not self._at_work.keys().isdisjoint(exchange.requests):
            self._await_work()
            notice.look(self._work_waited_for)
        waiting: dict[int, _Asked] = {}
        self._numbers = {}
        for client, number, asked in self._requests(exchange):
            self._numbers[client] = number
            if asked is None:
                yield Answer(client, error=NOT_CONNECTED)
            else:
                waiting[client] = asked
        start, deadline = time.monotonic(), self.federation.deadline
        while waiting:
            for client, found in self._arrivals(waiting):
                yield self._answer(waiting.pop(client), exchange, found)
            notice.look(partial(self._asked_for, exchange.round, waiting))
            if time.monotonic() - start > deadline:
                for asked in waiting.values():
                    yield self._too_late(asked)
                return

    def submit(self, exchange: Exchange) -> None:
        """Send requests to clients that work at their own pace, and wait for no answer.

        The audit log says beforehand which message asks for what: a server that is started again tells
        clients to discard what they stored with messages whose answers it has not taken.
        """
        segment, note = len(self.run_description.began), self.run_description.audit

        def submitted(client: int, number: int) -> None:
            asked = {"round": exchange.round, "action": exchange.action, "client": client}
            facts = {"message": exchange.digests[client], "stretch": segment}
            note(SUBMITTED, **asked, **facts, message_number=number)

        for client, number, asked in self._requests(exchange, submitted):
            if asked is None:
                self._arrived.append((Answer(client, error=NOT_CONNECTED), number))
            else:
                self._at_work[client] = asked, exchange

    def next_answer(self) -> Answer | None:
        """Wait for the next answer to a submitted request; ``None`` where none is awaited."""
        notice = _Notice(self.run_description.warn)
        while not self._arrived:
            if not self._at_work:
                return None
            self._await_work()
            notice.look(self._work_waited_for)
        answer, self._numbers[answer.client] = self._arrived.popleft()
        return answer

    def _work_waited_for(self) -> str:
        """Return the clients at work on submitted requests, in words."""
        round = max((exchange.round for _, exchange in self._at_work.values()), default=0)
        return self._asked_for(round, {c: asked for c, (asked, _) in self._at_work.items()})

    def _await_work(self) -> None:
        """Take what has arrived of submitted work; give up what takes longer than the deadline."""
        for _ in self._arrivals({}):
            pass
        for client, (asked, _) in list(self._at_work.items()):
            if time.monotonic() - asked.since > self.federation.deadline:
                del self._at_work[client]
                self._arrived.append((self._too_late(asked), asked.header.number))

    def _too_late(self, asked: _Asked) -> Answer:
        self._give_up(asked)
        error = f"no answer within {self.federation.deadline:g} seconds"
        return Answer(asked.client, error=error)

    def _requests(
        self, exchange: Exchange, before: Callable[[int, int], object] = lambda client, number: None
    ) -> Iterator[tuple[int, int, _Asked | None]]:
        """Send each client its request; yield the message's number, and what is then awaited.

        That is ``None`` where the client cannot be reached.

        Args:
            exchange: What is asked.
            before: Called with client and number of each message before it is sent.
        """
        facts = {
            "round": exchange.round,
            "action": exchange.action,
            "request": exchange.request_schema.to_table(),
            "reply": exchange.reply_schema.to_table(),
        }
        others = {schema.digest: schema.to_table() for schema in exchange.schemas.values()}
        summed = sum_headers(exchange, self.run_clients.peers)
        limit = _longest_reply(exchange)
        for client, data in exchange.requests.items():
            own = {**facts, "payload": exchange.digests[client]}
            if client in exchange.schemas:
                own["request"] = others[exchange.schemas[client].digest]
            if client in summed:
                own["summed"] = summed[client]
            header = self._header("exchange", client).model_copy(update=own)
            before(client, header.number)
            yield client, header.number, self._ask(client, header, data, limit)
        pending = (_longest_reply(own) for _, own in self._at_work.values())
        self.transport.budget.limit = max(limit, *pending, 0)

    def _asked_for(self, round: int, waiting: Mapping[int, _Asked]) -> str:
        """Return the clients whose answers a round waits for, in words."""
        now, streaming = time.monotonic(), self._streaming()
        who = []
        for client, asked in sorted(waiting.items()):
            how = "its connection stands" if client in streaming else "its connection is gone"
            if asked.question is None:
                how = "by a message"
            who.append(f"{self.title(client)}, asked {now - asked.since:.0f} s ago, {how}")
        return f"round {round} waits for {'; '.join(who)}" if who else ""

    def discard(self, clients: Collection[int]) -> None:
        """Tell these clients with the next message to discard what they stored with the last one."""
        segment = len(self.run_description.began)
        for client, number in self._numbers.items():
            if client in clients:
                self._discarded.setdefault(client, []).append([segment, number])
                facts = {"client": client, "stretch": segment, "message_number": number}
                self.run_description.audit("undone", **facts)
            else:
                self._discarded.pop(client, None)  # it has been informed and has answered
        self._numbers = {}  # each answer is settled once

    def signing_keys(self) -> Mapping[int, bytes]:
        """Return the keys that clients had certified by their own when they registered."""
        peers = self.run_clients.peers
        return {client: bytes.fromhex(own.signing.public) for client, own in peers.items()}

    def finish_round(self) -> None:
        """Do nothing: clients learn from the next round's messages that this round is over."""

    def end(self, keep: Payload | None) -> None:
        """Tell clients that the run is over, and wait for those that write models.

        Clients that are still at work on submitted requests end that first; their answers are not used.
        """
        until = time.monotonic() + min(self.federation.deadline, self.federation.patience)
        while self._at_work and time.monotonic() < until:
            self._await_work()
        for late, _ in self._at_work.values():
            self._give_up(late)
        self._at_work.clear()
        schema = Schema.of(keep.tensors) if keep is not None else None
        data = encode(keep, schema) if keep is not None and schema is not None else b""
        facts = {"request": schema.to_table()} if schema is not None else {}
        waiting = {}
        for client in self._there():
            header = self._header("end", client).model_copy(update=facts)
            asked = self._ask(client, header, data, SMALL)
            if asked is not None:
                waiting[client] = asked
        end = time.monotonic() + min(self.federation.deadline, self.federation.patience)
        while waiting and time.monotonic() < end:
            for client, _ in self._arrivals(waiting):
                del waiting[client]

    def close(self) -> None:
        """Close all streams."""
        if self._streams is not None:
            self._streams.close()

    def _ask(self, client: int, header: RequestHeader, data: bytes, limit: int) -> _Asked | None:
        """Send a request over the client's stream or as a message; ``None`` if neither is possible."""
        question = None
        if self._streams is not None and client in self._streams:
            message = seal(header, data).parts()
            question = self._streams.send(
                client, StreamRequest(message, partial(_rest, header), limit)
            )
        if question is None:
            if client not in self.run_clients.nodes:
                return None
            self._messages[self._send(self.run_clients.nodes[client], header, data)] = client
        return _Asked(client, header, len(data) + bytes_beside(header.summed), question)

    def _send(self, node: int, header: RequestHeader, payload: bytes) -> str:
        """Send a message with the description of the run; return its id."""
        told = {
            "experiment": self.run_description.experiment,
            "classes": list(self.run_description.classes),
            "streams": self._streams is not None,
        }
        return self.transport.send(node, header.model_copy(update=told), payload)

    def _arrivals(self, waiting: Mapping[int, _Asked]) -> Iterator[tuple[int, _Found]]:
        """Yield the answers that have arrived since the last call, one per pending request.

        Those to submitted requests are put aside for :meth:`next_answer`.
        """
        at_work = {client: asked for client, (asked, _) in self._at_work.items()}
        for client, found in self._received({**at_work, **waiting}):
            if client in waiting:
                yield client, found
            elif client in self._at_work:
                asked, exchange = self._at_work.pop(client)
                self._arrived.append((self._answer(asked, exchange, found), asked.header.number))

    def _received(self, waiting: Mapping[int, _Asked]) -> Iterator[tuple[int, _Found]]:
        """Yield what has arrived, and register clients that have said that they are ready."""
        yield from self._streamed(waiting)
        for id, found in self.transport.receive([*self._messages, *self._registering]):
            if id in self._registering:
                node, asked = self._registering.pop(id)
                if self._start is not None and self._lacks_start(found, asked):
                    self._send_start(node, asked.client, *self._start)
                    continue
                self.run_clients.register(node, found, asked)
                if node in self.run_clients.nodes.values():  # however often it was asked
                    self._registering = {
                        i: own for i, own in self._registering.items() if own[0] != node
                    }
            elif id in self._messages:
                yield self._messages.pop(id), _Found(found, self.transport.proven)

    def _lacks_start(self, found: Envelope | MessageError | str, asked: RequestHeader) -> bool:
        """Return whether a client must first be sent the start of the run; at most once per request."""
        if asked.request is not None or not isinstance(found, Envelope):
            return False
        try:
            return self.run_clients.trusted(found, asked).error == LACKS_START
        except MessageError:
            return False  # registration reports what is wrong with it

    def _send_start(self, node: int, client: int, schema: Schema, data: bytes) -> None:
        """Ask a client again whether it is ready, with the start of the run."""
        told = {"request": schema.to_table()}
        header = self._header("join", client).model_copy(update=told)
        self._registering[self._send(node, header, data)] = node, header
        self._ledger.costs.append(Cost(0, client, BEGIN, bytes_down=len(data), exchanges=1))

    def _streamed(self, waiting: Mapping[int, _Asked]) -> Iterator[tuple[int, _Found]]:
        """Yield what arrived over streams; wait briefly if there is nothing."""
        streams = self._streams
        if streams is None:
            time.sleep(POLL)
            return
        for arrival in streams.take(POLL):
            asked = waiting.get(arrival.client)
            if arrival.message is None and arrival.client not in streams:
                self.run_clients.lost(arrival.client, BROKEN)  # its machine may be down
            if asked is not None and asked.question == arrival.question is not None:
                yield arrival.client, _Found(_unpacked(arrival), not arrival.resumed)
            elif isinstance(arrival.message, Path):  # it is waited for no longer
                arrival.message.unlink(missing_ok=True)

    def _answer(self, asked: _Asked, exchange: Exchange, found: _Found) -> Answer:
        client, content = asked.client, found.content
        cost = Cost(exchange.round, client, exchange.action, bytes_down=asked.sent, exchanges=1)
        self._ledger.costs.append(cost)
        if isinstance(content, str):
            return Answer(client, error=content)
        try:
            if isinstance(content, MessageError):
                raise content
            stream = None if asked.question is None else client
            reply = self.run_clients.trusted(content, asked.header, stream)
        except MessageError as error:
            return Answer(
                client,
                error=f"its answer is rejected: {error}",
                violation=error.kind if found.proven else None,
            )
        self._count(reply.work, asked, exchange)
        if reply.error is not None:
            if (
                reply.error == LACKS_START
            ):  # its copy is lost: the request is repeated with another copy
                self.run_clients.lost(client, LACKS_START)
            return Answer(client, error=reply.error)
        cost.bytes_up = len(content.payload)
        return Answer(client, content.payload, digest=reply.payload)

    def _count(self, work: Iterable[WorkDone], asked: _Asked, exchange: Exchange) -> None:
        """Record the work that a client reports.

        Only phases of the exchange count, and at most as many seconds in total as have passed here since
        the request.
        """
        left = time.monotonic() - asked.since
        for done in work:
            if done.phase in (exchange.action, REFERENCE):
                cost = Cost(exchange.round, asked.client, **done.model_dump())
                cost.seconds = min(cost.seconds, left)
                left -= cost.seconds
                self._ledger.costs.append(cost)

    def _give_up(self, asked: _Asked) -> None:
        """Stop waiting for an answer; a late one is dropped."""
        self.run_clients.lost(
            asked.client, f"gave no answer within {self.federation.deadline:g} seconds"
        )
        if asked.question is not None and self._streams is not None:
            self._streams.drop(asked.client)
        late = {id for id, client in self._messages.items() if client == asked.client}
        self._messages = {id: c for id, c in self._messages.items() if id not in late}
        self._forgotten |= late

    def _header(self, kind: Literal["join", "exchange", "end"], client: int) -> RequestHeader:
        self._number += 1
        return RequestHeader(
            kind=kind,
            run=self.run_description.run,
            began=list(self.run_description.began),
            client=client,
            number=self._number,
            undone=self._discarded.get(client, []),
        )

    def _meet(self) -> None:
        """Ask clients whether they are ready, and register those that have answered."""
        for node, client in self.run_clients.unknown(self.transport.online()).items():
            header = self._header("join", client)
            self._registering[self._send(node, header, b"")] = node, header
            self.run_clients.asked(node, client)
        if self._registering:
            for _ in self._arrivals({}):
                pass
        if self._forgotten and (late := self.transport.come(self._forgotten)):
            self._forgotten -= late
            self.late += len(late)
            self._noted("late", replies=self.late)

    def _there(self) -> list[int]:
        """Return the members that are ready and can be reached."""
        for client in self.run_clients.revoked():
            if self._streams is not None:
                self._streams.drop(client)
        attendance = self.run_clients.attendance(self._streaming())
        if attendance != self._attendance:
            self._attendance = attendance
            self.attend(attendance)
        return self.run_clients.there(self._streaming())

    def _streaming(self) -> Container[int]:
        return () if self._streams is None else self._streams

    @property
    def _quorum(self) -> int:
        quorum = math.ceil(self.federation.quorum * self.federation.cohort_size)
        return max(1, min(quorum, self.federation.required))

    def _wait_for(self, clients: Collection[int], wanted: int, needed: int, setting: str) -> None:
        """Wait until enough of these clients are ready, at most federation.patience seconds.

        Args:
            clients: Clients that count; unseen clients may be among them.
            wanted: Number that ends the wait.
            needed: Number that is enough after federation.patience.
            setting: Setting that asks for ``needed``.

        Raises:
            RoundFailed: Fewer are ready; each missing client is named with the reason.
        """
        run_clients, patience = self.run_clients, self.federation.patience
        start = time.monotonic()
        notice = _Notice(self.run_description.warn)
        while True:
            self._meet()
            self._there()
            missing = {c: own for c, own in self.absent().items() if c in clients}
            ready = len(clients) - len(missing)
            if ready >= wanted:
                return
            who = "; ".join(f"{run_clients.title(c)}: {own.reason}" for c, own in missing.items())
            notice.look(partial("waiting for {}".format, who))
            if time.monotonic() > start + patience:
                break
            self._pause()
        if ready < needed:
            raise RoundFailed(
                f"{ready} of {len(clients)} clients were ready within federation.patience = "
                f"{patience:g} seconds, {setting} asks for {needed}. Missing: {who}"
            )

    def _pause(self) -> None:
        """Wait until a client that was asked whether it is ready has answered, at most :data:`LOOK`.

        Half of the time is spent looking, however many were asked.
        """
        now = time.monotonic()
        end = now + LOOK
        while self._registering and now < end:
            began, pending = now, len(self._registering)
            for _ in self._arrivals({}):
                pass
            if len(self._registering) != pending:
                return
            now = time.monotonic()
            time.sleep(min(now - began, LOOK))
            now = time.monotonic()
        time.sleep(max(0.0, end - now))


class _Notice:
    """Reports at intervals which clients a run waits for."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn, self._next = warn, time.monotonic() + NOTICE

    def look(self, text: Callable[[], str]) -> None:
        """Report the text, unless it was reported a short time ago."""
        if time.monotonic() > self._next:
            self._next = time.monotonic() + NOTICE
            if said := text():
                self._warn(said)


def _longest_reply(exchange: Exchange) -> int:
    """Return the most bytes that a reply to an exchange may have."""
    return exchange.reply_schema.max_bytes + SMALL


def _rest(header: RequestHeader, held: int) -> tuple[bytes, ...]:
    """Return the message that requests the rest of an answer after the bytes that have arrived."""
    return seal(header.model_copy(update={"held": held, "payload": ""})).parts()


def _unpacked(arrival: StreamResponse) -> Envelope | MessageError | str:
    if arrival.fault is not None:
        return arrival.fault
    if arrival.message is None:
        return "its stream broke and was not restored in time"
    if not (
        content := taken(arrival.message)
    ):  # the client's reply where it could not make an answer
        return "it could not answer; its log says why"
    try:
        return Envelope.unpack(content)
    except MessageError as error:
        return error
