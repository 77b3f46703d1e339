"""Means of replies that are added as they come and let go of, with the bits of means over all of them.

A running mean depends on the order of what is added, so replies are added in the order of client ids. One
that comes earlier than a client before it is put aside until that one has answered or failed: in one
process and from workers answers come in order and none waits; between machines those that wait are on
disk once they are large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from fedloom.aggregation.means import RunningMean
from fedloom.federation.protocol import Replies, SummedReplies, Total
from fedloom.wire.messages import Answer, Exchange, Payload, Reply

Keep = Callable[[int, Payload], Payload]
"""Puts a client's payload aside, in memory or on disk, and returns one that reads it."""

EXAMPLES = "examples"
"""The number of a reply that is its weight."""


class StreamingMean:
    """Adds the replies to one exchange, in the order of client ids."""

    def __init__(self, exchange: Exchange, put_aside: Keep) -> None:
        """Begin with none.

        Args:
            exchange: What is asked, as its method sees it; its ``alike`` says which means are by rows.
            put_aside: Keeps payloads that come before their turn.
        """
        self._alike = exchange.alike
        self._put_aside = put_aside
        self._by_rows, self._by_clients = RunningMean(), RunningMean()
        self._ahead = iter(sorted(exchange.requests))
        self._next = next(self._ahead, None)
        self._waiting: dict[int, Payload] = {}
        self._settled: set[int] = set()

    def settling(self, answers: Iterable[Answer]) -> Iterator[Answer]:
        """Pass answers on; once the next is asked for, it is decided whether the one before counts."""
        for answer in answers:
            yield answer
            self._settled.add(answer.client)
            self._add_those_due()

    def keep(self, client: int, payload: Payload) -> Payload:
        """Take the tensors of a reply that counts; return what is left of it."""
        due = client == self._next
        self._waiting[client] = payload if due else self._put_aside(client, payload)
        return replace(payload, tensors={})

    def replies(self, replies: list[Reply], missing: dict[int, str]) -> SummedReplies:
        """Return the replies as their means, once all have come.

        Args:
            replies: What is left of them.
            missing: Each other client that was asked, and why it does not count.
        """
        while self._next is not None:
            self._settled.add(self._next)
            self._add_those_due()
        known = Replies(replies, missing)
        names = sorted({name for own in known for name in own.payload.metrics})
        reported = {name: known.reported(name) for name in names}
        metrics = {name: mean for name, mean in reported.items() if mean is not None}
        means = self._by_rows.mean() | self._by_clients.mean() if replies else {}
        return SummedReplies(Total(known.answered, means, self._alike, metrics, 0.0), missing)

    def _add_those_due(self) -> None:
        """Add replies, up to the first client of which it is not decided whether it counts."""
        while self._next is not None and self._next in self._settled:
            payload = self._waiting.pop(self._next, None)
            if payload is not None:
                self._add(payload)
            self._settled.discard(self._next)
            self._next = next(self._ahead, None)

    def _add(self, payload: Payload) -> None:
        tensors, alike = payload.tensors, self._alike
        here = [name for name in tensors if alike and name.startswith(alike)]
        rest = [name for name in tensors if name not in here]
        self._by_clients.add({name: tensors[name] for name in here}, 1.0)
        self._by_rows.add({name: tensors[name] for name in rest}, payload.numbers[EXAMPLES])
