"""Bounds on the memory of a Flower message: bytes that are pulled, and arrays that are built from them.

Flower cuts an array into parts and names equal ones once, so a message of a few megabytes can stand for
as many terabytes; and it pulls a whole message before it can be checked. So both are counted here: bytes
while they are pulled, arrays before they are built.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from typing import Any

from flwr.app import Array
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_children_ids_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import inflatable_class_registry

from fedloom.errors import ConnectionFailed, MessageError

HEADS = 1 << 16
"""Bytes of Flower's metadata about an envelope: a few hundred, and a name for each part."""


PATIENCE, SLOWEST = 5.0, 1e6
"""Seconds that the server waits for the parts of a message, and bytes per second beyond that: the loop of
rounds is blocked meanwhile."""


class ByteBudget:
    """Budget of bytes of one message; reset for each message.

    Attributes:
        limit: Largest number of bytes, both of pulled data and of built arrays.
    """

    def __init__(self, limit: int) -> None:
        """Allow this number of bytes."""
        self.limit = limit
        self._pulled = self._made = 0
        self._end = math.inf
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Reset the counts for another message."""
        with self._lock:
            self._pulled = self._made = 0
            self._end = time.monotonic() + PATIENCE + self.limit / SLOWEST

    def wait(self) -> None:
        """Record that a part has not arrived yet.

        Raises:
            ConnectionFailed: The time limit of the message is over.
        """
        if time.monotonic() > self._end:
            raise ConnectionFailed("its answer did not come whole in time")

    def pull(self, count: int) -> None:
        """Count pulled bytes.

        Raises:
            MessageError: The limit is exceeded.
        """
        with self._lock:
            self._pulled += count
            self._require(self._pulled)

    def make(self, count: int) -> None:
        """Count the bytes of an array before it is built.

        Raises:
            MessageError: The limit would be exceeded.
        """
        with self._lock:
            self._made += count
            self._require(self._made)

    def _require(self, count: int) -> None:
        if count > self.limit + HEADS:
            raise MessageError(
                f"a message of {count} bytes and more, {self.limit} are allowed", "oversized"
            )


def bound_arrays(budget: ByteBudget) -> None:
    """Make Flower check the budget in this process before it builds an array of a message."""

    class Bounded:
        @staticmethod
        def inflate(content: bytes, children: dict[str, Any] | None = None) -> Array:
            """Return the array that Flower builds from its parts, if the budget allows it."""
            places = json.loads(get_object_body(content, Array))["arraychunk_ids"]
            names = get_object_children_ids_from_object_content(content)
            budget.make(sum(len((children or {})[names[place]].data) for place in places))
            return Array.inflate(content, children)

    registry: dict[str, Any] = inflatable_class_registry
    registry["Array"] = Bounded


def bound_pulls(client: Any, budget: ByteBudget) -> None:
    """Count the bytes that Flower's client of a run pulls."""
    pull: Callable[[Any], Any] = client.PullObject

    def counted(request: Any) -> Any:
        response = pull(request)
        if response.object_found and not response.object_available:
            budget.wait()
        budget.pull(len(response.object_content))
        return response

    client.PullObject = counted
