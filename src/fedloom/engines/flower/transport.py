"""The Flower transport: the two parts of Flower that are used, messages and the list of nodes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from flwr.app import Message
from google.protobuf.message import DecodeError

from fedloom.engines.flower.inflation import ByteBudget
from fedloom.engines.flower.records import from_records, to_records
from fedloom.engines.flower.streams import Streams
from fedloom.errors import ConnectionFailed, MessageError
from fedloom.wire.envelope import MAX_REPLY_HEADER, PREFIX, Envelope, RequestHeader, printable, seal

UNREADABLE = (DecodeError, ValueError, LookupError, TypeError, AttributeError, AssertionError)
"""What Flower raises over a malformed reply, in contrast to a broken connection."""


SMALL = PREFIX.size + MAX_REPLY_HEADER
"""Bytes of the largest reply without a payload."""


class MessageGrid(Protocol):
    """The part of Flower's grid that is used."""

    def get_nodes(self) -> Iterable[Any]:
        """Return all nodes, each with ``node_id`` and ``status``."""
        ...

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; return their ids."""
        ...

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have arrived."""
        ...


@dataclass(frozen=True)
class FlowerTransport:
    """Sends requests to clients and receives their replies.

    Attributes:
        grid: Flower's grid.
        sign: Signs a header with the key of the server's certificate; ``None`` without TLS.
        certificate: That certificate in PEM.
        open_streams: Opens the server's end of streams of a run, given the seconds for reconnecting;
            ``None`` for no streams.
        proven: Whether each node has proven a client's key, so that its messages are attributed to that
            client.
    """

    grid: MessageGrid
    sign: Callable[[bytes], bytes] | None = None
    certificate: str | None = None
    open_streams: Callable[[str, float], Streams] | None = None
    proven: bool = False
    budget: ByteBudget = field(default_factory=lambda: ByteBudget(SMALL))

    def online(self) -> set[int]:
        """Return the nodes that can be reached."""
        return {node.node_id for node in self.grid.get_nodes() if node.status == "online"}

    def send(self, node: int, header: RequestHeader, payload: bytes) -> str:
        """Sign and send a message; return its id."""
        sealed = seal(
            header.model_copy(update={"certificate": self.certificate}), payload, self.sign
        )
        message = Message(to_records(sealed), dst_node_id=node, message_type="query")
        (id,) = self.grid.push_messages([message])
        return id

    def come(self, ids: Iterable[str]) -> set[str]:
        """Return which of these messages have replies, where the replies are no longer used."""
        self.budget.begin()
        with contextlib.suppress(*UNREADABLE, MessageError, ConnectionFailed):
            return {m.metadata.reply_to_message_id for m in self.grid.pull_messages(ids)}
        return set()

    def receive(self, ids: Iterable[str]) -> Iterator[tuple[str, Envelope | MessageError | str]]:
        """Yield the replies that have arrived, each with the id of its request.

        A reply without an envelope is returned as an error, and one that Flower cannot read, or that
        reports a failure of the client, as a text: Flower does not distinguish a broken transfer from a
        malformed reply.

        Each is pulled separately: Flower deletes the replies it returns, and an unreadable one would lose
        those read before it.
        """
        for id in ids:
            self.budget.begin()
            try:
                found = list(self.grid.pull_messages([id]))
            except MessageError as error:
                yield id, error
                continue
            except ConnectionFailed as error:
                yield id, str(error)
                continue
            except UNREADABLE as error:
                yield id, printable(f"its answer cannot be read: {type(error).__name__}: {error}")
                continue
            for message in found:
                if message.metadata.reply_to_message_id == id:  # and not an injected message
                    yield id, _read(message)


def _read(message: Message) -> Envelope | MessageError | str:
    if message.has_error():
        return printable(message.error.reason or "it failed")
    try:
        return from_records(message.content)
    except MessageError as error:
        return error
