"""Flower's nodes: one for each allowed member, with a key that the server creates.

Flower knows a node by a key, takes each key once and for ever, and forgets none. So the keys of nodes are
not the members' keys: the server creates one for each allowed member and keeps it only in memory; the
gateway signs the member's requests to Flower with it, once the member has proven its own key. A member
that is allowed again, has a new key, or returns after Flower's database was lost gets a new node.
"""

from __future__ import annotations

import contextlib
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from fedloom.deployment.flower_control import FlowerControl
from fedloom.errors import FedloomError, OutputError
from fedloom.security.audit_log import Record
from fedloom.security.client_registry import Member, Members
from fedloom.settings.toml import read_toml, write_toml
from fedloom.storage.files import write_atomically

RETRY = 5.0
"""Seconds until a failed update of Flower's nodes is retried."""


@dataclass(frozen=True)
class NodeKey:
    """The node of a member in Flower.

    Attributes:
        node: Flower's number.
        member: The member as it was allowed.
        private: The node's key.
    """

    node: int
    member: Member
    private: ec.EllipticCurvePrivateKey

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that authenticate a request to Flower as this node's."""
        moment = now().isoformat()
        signature = sign_message(self.private, moment.encode())
        public = public_key_to_bytes(self.private.public_key())
        return [
            (FLEET_HTTP_PUBLIC_KEY_HEADER.encode(), b64encode(public)),
            (TIMESTAMP_HEADER.encode(), moment.encode()),
            (FLEET_HTTP_SIGNATURE_HEADER.encode(), b64encode(signature)),
        ]


class FlowerNodes:
    """Keeps Flower's nodes equal to the allowed members.

    Attributes:
        problem: Why the last update failed.
    """

    def __init__(
        self, control: FlowerControl, members: Callable[[], Members], path: Path, note: Record
    ) -> None:
        """Connect to a Flower server that has no nodes yet.

        Args:
            control: Flower's server.
            members: Returns the current registry.
            path: File for the processes of runs: the node of each member's number.
            note: Audit log of members that are allowed and revoked.
        """
        self.control, self.members, self.path, self.note = control, members, path, note
        self._keys: dict[int, NodeKey] = {}
        self._orphaned: list[int] = []
        self._seen: tuple[Member, ...] | None = None
        self._doubtful = False
        self._again, self.problem = 0.0, ""

    def of(self, number: int) -> NodeKey | None:
        """Return the node of a member, once it has one; thread-safe."""
        return self._keys.get(number)

    def doubt(self) -> None:
        """Make the next update check that Flower, which was restarted, still has its nodes."""
        self._doubtful = True

    def follow(self) -> None:
        """Create nodes of newly allowed members, and remove those of revoked ones, since the last call.

        Raises:
            FedloomError: The registry cannot be read, or Flower cannot be reached; completed changes
                stay.
        """
        members = self.members().members
        if self._doubtful:
            known_to_flower = self.control.nodes().keys()
            self._keys = {n: key for n, key in self._keys.items() if key.node in known_to_flower}
            self._orphaned = [node for node in self._orphaned if node in known_to_flower]
            self._seen, self._doubtful = (), False
        if members == self._seen:
            return
        allowed = {member.number: member for member in members if member.state == "allowed"}
        failed: list[FedloomError] = []
        for number, known in list(self._keys.items()):
            if number not in allowed or allowed[number].key != known.member.key:
                del self._keys[number]  # the gateway stops passing its requests on
                self._orphaned.append(known.node)
                self.note("revoked", client=number, name=known.member.name)
        for node in list(self._orphaned):
            try:
                self.control.unregister(node)
                self._orphaned.remove(node)
            except FedloomError as error:  # the others must not wait for this one
                failed.append(error)
        for number, member in allowed.items():
            if number not in self._keys:
                try:
                    self._keys[number] = self._made(member)
                except FedloomError as error:
                    failed.append(error)
                else:
                    if self._seen is not None:
                        self.note("allowed", client=number, name=member.name)
        nodes = {str(number): str(key.node) for number, key in sorted(self._keys.items())}
        write_atomically(self.path, write_toml(nodes).encode())
        if failed:
            raise failed[0]
        if self._seen is None:
            self.note("members", allowed=len(self._keys))
        self._seen = members

    def keep_following(self) -> None:
        """Call :meth:`follow`; a failure is recorded once in the audit log and retried later."""
        if time.monotonic() < self._again:
            return
        try:
            self.follow()
            self.problem = ""
        except Exception as error:  # a failure must not stop the runs
            self._again = time.monotonic() + RETRY
            reason = f"{type(error).__name__}: {error}"
            if not self.problem:
                with contextlib.suppress(OutputError):  # a full disk may be what failed
                    self.note("nodes_failed", reason=reason)
            self.problem = reason

    def _made(self, member: Member) -> NodeKey:
        private = ec.generate_private_key(ec.SECP384R1())
        public = public_key_to_bytes(private.public_key())
        return NodeKey(self.control.register(public, member.name), member, private)


def read_nodes(path: Path) -> dict[int, int]:
    """Return the member's number of each of Flower's nodes; nothing where the file cannot be read."""
    with contextlib.suppress(FedloomError, ValueError):
        return {int(node): int(number) for number, node in read_toml(path).items()}
    return {}
