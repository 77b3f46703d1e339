"""The client of the Control interface of Flower's server: nodes and runs.

It is called in this process, over HTTP to 127.0.0.1, so a call takes milliseconds; Flower's command line,
which does the same, takes seconds to start.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

from fedloom.display.untrusted_text import short
from fedloom.errors import ConnectionFailed

APP = Path(__file__).with_name("app")
"""The Flower app."""

LISTED = 100
"""Number of latest runs that are requested."""

T = TypeVar("T")


@dataclass(frozen=True)
class FlowerRun:
    """A run as Flower knows it.

    Attributes:
        id: Flower's number of it.
        is_over: Whether it has ended, successfully or not.
    """

    id: int
    is_over: bool


class FlowerControl:
    """Connection to the Control interface of Flower's server."""

    def __init__(self, address: str, authority: bytes) -> None:
        """Connect to the server at an address whose certificate this authority (PEM) has signed."""
        self._client = ControlHttpClient.from_server_address(
            server_address=address,
            insecure=False,
            root_certificates=authority,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close()

    def register(self, public_pem: bytes, name: str) -> int:
        """Register a node for a public key; return its number.

        Raises:
            ConnectionFailed: Flower cannot be reached, or refuses: a key may be used once.
        """
        request = RegisterNodeRequest(public_key=public_pem, name=name)
        node = int(self._asked(lambda: self._client.RegisterNode(request)).node_id)
        if not node:
            raise ConnectionFailed("Flower's server has not made a node")
        return node

    def unregister(self, node: int) -> None:
        """Remove a node.

        Raises:
            ConnectionFailed: Flower cannot be reached, or does not know it.
        """
        request = UnregisterNodeRequest(node_id=node)
        self._asked(lambda: self._client.UnregisterNode(request))

    def nodes(self) -> dict[int, str]:
        """Return the status of each node: registered, online, offline.

        Raises:
            ConnectionFailed: Flower cannot be reached.
        """
        found = self._asked(lambda: self._client.ListNodes(ListNodesRequest())).nodes_info
        return {int(own.node_id): str(own.status) for own in found if own.status != "unregistered"}

    def start(self, order: Path) -> int:
        """Start a run of our app; return Flower's number of it.

        Args:
            order: File of the run request, which is passed to the run.

        Raises:
            ConnectionFailed: Flower cannot be reached, or refuses.
        """
        config: Any = user_config_to_proto({"order": str(order)})
        request = StartRunRequest(fab=fab_to_proto(self._bundle), override_config=config)
        found = self._asked(lambda: self._client.StartRun(request))
        if not found.HasField("run_id"):
            raise ConnectionFailed(f"Flower's server has not started the run: {found.note}")
        return int(found.run_id)

    def stop(self, run: int) -> None:
        """End a run.

        Raises:
            ConnectionFailed: Flower cannot be reached, or the run is over.
        """
        self._asked(lambda: self._client.StopRun(StopRunRequest(run_id=run)))

    def runs(self) -> list[FlowerRun]:
        """Return the last runs.

        Raises:
            ConnectionFailed: Flower cannot be reached.
        """
        found = self._asked(lambda: self._client.ListRuns(ListRunsRequest(limit=LISTED))).run_dict
        return [FlowerRun(int(id), own.status.status == "finished") for id, own in found.items()]

    @cached_property
    def _bundle(self) -> Fab:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of what Flower uses to build it
            content = build_fab_from_disk(APP)
        return Fab(hashlib.sha256(content).hexdigest(), content, {})

    @staticmethod
    def _asked(call: Callable[[], T]) -> T:
        try:
            return call()
        except httpx.HTTPStatusError as error:
            raise ConnectionFailed(f"Flower's server refuses: {_said(error.response)}") from None
        except (httpx.HTTPError, OSError) as error:
            raise ConnectionFailed(f"Flower's server does not answer: {error}") from None


def _said(response: httpx.Response) -> str:
    """Return the text of an error response, which Flower wraps in JSON."""
    try:
        found = response.json()
    except (ValueError, RecursionError):
        found = None
    table = found if isinstance(found, dict) else {}
    words = [own for key in ("detail", "extra") if isinstance(own := table.get(key), str) and own]
    return short(". ".join(words) or response.text or response.reason_phrase, 400)
