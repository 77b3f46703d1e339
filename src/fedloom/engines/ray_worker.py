"""What an actor of Ray is: an engine that it builds, and one request at a time.

This file imports nothing that computes, so that an actor is there as soon as a node has room for it, and
building what the run has is all that then takes time.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from fedloom.errors import FedloomError

if TYPE_CHECKING:
    from fedloom.engines.in_process import SimulationEngine


class RayWorker:
    """What runs in an actor."""

    def __init__(self) -> None:
        """Be there; everything else takes time or may fail."""
        self._engine: SimulationEngine | None = None

    def place(self) -> tuple[str, str]:
        """Return id and address of this node."""
        import ray

        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()

    def build(self, build: bytes, content: bytes) -> str:
        """Build what the run has, by a pickled function; return what was wrong, or nothing."""
        try:
            builds: Callable[[bytes], SimulationEngine] = pickle.loads(build)
            self._engine = builds(content)
        except Exception as error:
            return (
                str(error)
                if isinstance(error, FedloomError)
                else f"{type(error).__name__}: {error}"
            )
        return ""

    def work(self, packed: bytes, state: bytes) -> bytes:
        """Carry out a request whose encoded state came apart."""
        from fedloom.engines.workers import work_packed

        assert self._engine is not None
        request = pickle.loads(packed)
        requests = {client: data or state for client, data in request.exchange.requests.items()}
        exchange = replace(request.exchange, requests=requests)
        return work_packed(self._engine, replace(request, exchange=exchange))

    def live(self) -> None:
        """Do not end: what waits for this is told when the actor has ended."""
        threading.Event().wait()
