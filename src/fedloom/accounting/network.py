"""A small model of clients' links and devices: how long a round takes.

Derived, not measured: a round of a client is its bytes over its link, a round trip of latency for every
exchange, and its floating-point operations over what its device does in a second. A synchronous round
lasts as long as its slowest client. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedloom.accounting.traffic import Sent


@dataclass(frozen=True)
class Link:
    """A class of clients.

    Attributes:
        uplink: Bits a second from the client.
        downlink: Bits a second to it.
        latency: Seconds of a message there and back.
        speed: Floating-point operations per second that its device reaches in practice.
    """

    uplink: float
    downlink: float
    latency: float
    speed: float

    def seconds(self, sent: Sent, flops: float) -> float:
        """Return how long a client's round takes."""
        wire = 8 * sent.up / self.uplink + 8 * sent.down / self.downlink
        return wire + sent.exchanges * self.latency + flops / self.speed
