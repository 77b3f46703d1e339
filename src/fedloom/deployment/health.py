"""Health of a server: whether it works, and problems in words that its operator can act on."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from fedloom.deployment.flower_nodes import FlowerNodes
from fedloom.deployment.gateway import Gateway
from fedloom.deployment.processes import Supervisor
from fedloom.errors import FedloomError, IdentityError
from fedloom.security.certificates import read_certificate, require_current

STUCK = 30.0
"""Seconds without an iteration of the server's loop, which takes 0.2 s, after which it counts as
stuck."""

SOON = 14 * 86_400.0
"""Seconds before the certificate's expiry at which warnings start."""

LITTLE = 256 << 20
"""Free bytes on the disk below which a warning is given."""


class Health:
    """Health of a running server; thread-safe.

    Attributes:
        expires: When the certificate expires, in seconds since 1970; ``None`` without TLS.
    """

    def __init__(
        self,
        folder: Path,
        certificate: Path | None,
        supervisor: Supervisor,
        nodes: FlowerNodes,
        gateway: Gateway,
    ) -> None:
        """Start with an iteration of the loop.

        Args:
            folder: The server's.
            certificate: The server's; ``None`` without TLS.
            supervisor: Flower's processes.
            nodes: Flower's nodes.
            gateway: The gateway.
        """
        self.folder, self.certificate = folder, certificate
        self.supervisor, self.nodes, self.gateway = supervisor, nodes, gateway
        self.expires: float | None = None
        if certificate is not None:
            self.expires = read_certificate(certificate).not_valid_after_utc.timestamp()
        self._turned = time.monotonic()

    def turn(self) -> None:
        """Record an iteration of the server's loop."""
        self._turned = time.monotonic()

    def is_alive(self) -> bool:
        """Return whether the server's loop is running."""
        return time.monotonic() < self._turned + STUCK

    def problems(self) -> list[str]:
        """Return problems that keep clients from taking part or runs from starting."""
        found = []
        for supervised in self.supervisor.processes:
            if not supervised.is_running:
                found.append(
                    f"{supervised.name} does not run, it is started again: see {supervised.log}"
                )
        if self.nodes.problem:
            found.append(f"Flower's server does not know the allowed members: {self.nodes.problem}")
        if self.certificate is not None:
            try:
                require_current(self.certificate)
            except IdentityError as error:
                found.append(str(error))
        try:
            if fault := self.gateway.members.fault:
                found.append(
                    f"the list of members is as it was when it could last be read: {fault}"
                )
        except FedloomError as error:
            found.append(str(error))
        return found

    def warnings(self) -> list[str]:
        """Return warnings about problems that will occur without action."""
        found = []
        if self.expires is not None and 0 < (left := self.expires - time.time()) < SOON:
            found.append(
                f"the certificate expires in {left / 86_400:.0f} days: `fedloom certs` with the same "
                "hosts makes a new one, which holds from the next start"
            )
        free = shutil.disk_usage(self.folder).free
        if free < LITTLE:
            found.append(f"the disk of {self.folder} has {free >> 20} MB left")
        return found
