"""A small model of clients' links and devices: how long a round takes, and sizes as people write them.

Derived, not measured: a round of a client is its bytes over its link, a round trip of latency for every
exchange, and its floating-point operations over what its device does in a second. A synchronous round
lasts as long as its slowest client. No torch here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedloom.accounting.traffic import Sent

PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}

UNITS = {"bit": r"bit(?:/s)?|bps", "B": r"B", "FLOP": r"FLOP(?:/s|S)?", "s": r"s"}
"""What may stand after a number and its prefix, by what is meant."""

EXAMPLES = {"bit": "10Mbit", "B": "8GB", "FLOP": "5TFLOP", "s": "40ms"}


@dataclass(frozen=True)
class Link:
    """A class of clients.

    Attributes:
        uplink: Bits a second from the client.
        downlink: Bits a second to it.
        latency: Seconds of a message there and back.
        speed: Floating-point operations a second that its device really does.
    """

    uplink: float
    downlink: float
    latency: float
    speed: float

    def seconds(self, sent: Sent, flops: float) -> float:
        """Return how long a client's round takes."""
        wire = 8 * sent.up / self.uplink + 8 * sent.down / self.downlink
        return wire + sent.exchanges * self.latency + flops / self.speed


def parse_quantity(text: str, unit: str) -> float:
    """Return a size that people write, such as ``10Mbit``, ``8GB``, ``40ms`` or ``5TFLOP``.

    Args:
        text: A number, a prefix of SI (``GiB`` counts in 1024s), a unit.
        unit: ``bit``, ``B``, ``FLOP`` or ``s``.

    Raises:
        ValueError: It is none; what one looks like is said.
    """
    small = "m|u" if unit == "s" else "k|M|G|T|P"
    found = re.fullmatch(rf"\s*([0-9.]+)\s*({small})?(i)?(?:{UNITS[unit]})\s*", text)
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if not found or not number > 0:
        raise ValueError(
            f"{text!r} is no quantity above 0 in {unit}; write it like {EXAMPLES[unit]}"
        )
    if unit == "s":
        return number * {None: 1.0, "m": 1e-3, "u": 1e-6}[found[2]]
    power = list(PREFIXES).index(found[2] or "")
    return number * (1024.0**power if found[3] else PREFIXES[found[2] or ""])
