"""What a message of Flower may take of memory: bytes that are pulled, and arrays that are made of them.

Flower cuts an array into parts and names equal ones once, so a message of a few megabytes can stand for
as many terabytes; and it pulls a message whole before anybody can look at it. So both are counted here,
while it is pulled and before an array is put together.
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
"""Bytes that Flower's own words about an envelope may have: some hundred, and a name for each part."""


PATIENCE, SLOWEST = 5.0, 1e6
"""Seconds that the parts of a message are waited for, and bytes a second beyond that: the loop of rounds
stands still meanwhile."""


class ByteBudget:
    """Bytes that one message may have; started again for each.

    Attributes:
        limit: These bytes, of what is pulled and of what is made of it.
    """

    def __init__(self, limit: int) -> None:
        """Allow so many."""
        self.limit = limit
        self._pulled = self._made = 0
        self._end = math.inf
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Count from nothing: another message comes."""
        with self._lock:
            self._pulled = self._made = 0
            self._end = time.monotonic() + PATIENCE + self.limit / SLOWEST

    def wait(self) -> None:
        """Know that a part is not there yet.

        Raises:
            ConnectionFailed: It has been waited for long enough; others wait meanwhile.
        """
        if time.monotonic() > self._end:
            raise ConnectionFailed("its answer did not come whole in time")

    def pull(self, count: int) -> None:
        """Count bytes that came.

        Raises:
            MessageError: They are too many by now.
        """
        with self._lock:
            self._pulled += count
            self._require(self._pulled)

    def make(self, count: int) -> None:
        """Count bytes of an array before it is made.

        Raises:
            MessageError: They would be too many.
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
    """Have Flower make arrays of messages in this process only while there is room for them."""

    class Bounded:
        @staticmethod
        def inflate(content: bytes, children: dict[str, Any] | None = None) -> Array:
            """Return what Flower makes of an array's parts, if that is not too large."""
            places = json.loads(get_object_body(content, Array))["arraychunk_ids"]
            names = get_object_children_ids_from_object_content(content)
            budget.make(sum(len((children or {})[names[place]].data) for place in places))
            return Array.inflate(content, children)

    registry: dict[str, Any] = inflatable_class_registry
    registry["Array"] = Bounded


def bound_pulls(client: Any, budget: ByteBudget) -> None:
    """Count what Flower's client of a run pulls, as it comes."""
    pull: Callable[[Any], Any] = client.PullObject

    def counted(request: Any) -> Any:
        response = pull(request)
        if response.object_found and not response.object_available:
            budget.wait()
        budget.pull(len(response.object_content))
        return response

    client.PullObject = counted
