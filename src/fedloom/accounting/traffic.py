"""Bytes a client and the server exchange in a round, in closed form, to stand beside what was measured.

====================  ==================================================================================
parameters            adapter down and up: ``2 P b``
logits                soft labels up and down: ``2 N (k b + k i + s)`` for N public positions, k entries
                      of b bytes, their indices of i bytes (0 where all are sent) and a scale of s
activations           for T tokens trained on: ``T (d b_a + s) up + T (d b_g + s) down``, twice that in
                      U-shape; what the server must know of the rows; the client part down and up
====================  ==================================================================================

and for each message a header (``header``), whose length was read off real ones. A count of 4 bytes an
element is float32's. Source: ``specs/performance.md`` section 1d, with what travels beside the tensors.
No torch here: reports and ``fedloom advise`` read this file too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

ELEMENT = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
"""Bytes of a number by its encoding."""

SCALE = 4
"""Bytes of the scale of an int8 row."""


def header(buffers: int, numbers: int = 0, metrics: int = 0) -> int:
    """Return about how long a message's header is: a schema's digest, buffers, numbers, named metrics."""
    length = 56 + 64 * buffers
    length += 14 + 10 * numbers if numbers else 0
    return length + (12 + 28 * metrics if metrics else 0)


def row_bytes(width: int, encoding: str) -> int:
    """Return the bytes of a row of ``width`` numbers."""
    return width * ELEMENT[encoding] + (SCALE if encoding == "int8" else 0)


FEDLLM = "FedLLM"
"""Name of the framework that exchanges parameters (FedLLM in arXiv 2501.04436)."""


@dataclass(frozen=True)
class Done:
    """What a client did in a round.

    Attributes:
        steps: Optimizer steps on its own rows.
        rows: Sequences in them.
        tokens: Tokens in them, padding not counted.
        targets: Completion tokens, or classified texts, in them.
    """

    steps: int
    rows: int
    tokens: int
    targets: int


@dataclass(frozen=True)
class Sent:
    """What a client and the server sent each other in a round.

    Attributes:
        down: Bytes to the client.
        up: Bytes from it.
        exchanges: Messages there and back.
    """

    down: int
    up: int
    exchanges: int


@dataclass(frozen=True)
class ParameterTraffic:
    """Traffic of methods that exchange parameters (FedLLM in arXiv 2501.04436).

    Attributes:
        down: Bytes of the tensors sent to a client.
        up: Bytes of the tensors it sends.
        also_down: Bytes of the tensors sent to it in a second message, after the round's training.
        up_a_step: Bytes more that it sends for each optimizer step.
        up_even: Bytes of the tensors it sends in rounds 2, 4, ..., where they are others; else 0.
    """

    down: int
    up: int
    framework: str = FEDLLM
    also_down: int = 0
    up_a_step: int = 0
    up_even: int = 0

    def of_round(self, done: Done, round: int = 1) -> Sent:
        """Return the bytes of a round."""
        own = self.up_even if self.up_even and round % 2 == 0 else self.up
        down = self.down + header(1 if self.down else 0, 1)
        sent = own + self.up_a_step * done.steps
        up = sent + header((1 if own else 0) + (2 if self.up_a_step else 0), 1, 2)
        if not self.also_down:
            return Sent(down, up, 1)
        return Sent(down + self.also_down + header(1, 1), up + header(0, 1), 2)


@dataclass(frozen=True)
class LogitTraffic:
    """Traffic of methods that exchange logits (KD-FedLLM in arXiv 2501.04436).

    Attributes:
        positions: Public positions of a round, N.
        entries: Logits of one that travel (at most, where ``adaptive``).
        encoding: Of a logit.
        index: Bytes of an index, 0 where all logits travel.
        adaptive: Whether positions have different numbers of entries.
    """

    positions: int
    entries: int
    encoding: str
    index: int
    adaptive: bool
    framework: str = "KD-FedLLM"

    def of_round(self, done: Done, round: int = 1) -> Sent:
        """Return the bytes of a round; they do not depend on what was done in it."""
        row = row_bytes(self.entries, self.encoding) + self.entries * self.index
        soft_labels = self.positions * (row + (4 if self.adaptive else 0))
        buffers = 1 + (self.index > 0) + (self.encoding == "int8") + self.adaptive
        down = soft_labels + header(buffers, 1) + header(0, 1)
        up = soft_labels + header(buffers, 1, 2) + header(0, 0, 4)
        return Sent(down, up, 2)


@dataclass(frozen=True)
class ActivationTraffic:
    """Traffic of methods that exchange activations (Split-FedLLM in arXiv 2501.04436).

    Attributes:
        front: Bytes of the client part of the adapter.
        hidden: Numbers of an activation, d.
        activations: Their encoding.
        gradients: That of their gradients.
        facts: Bytes that describe a sequence to the server.
        targets: Whether the completions' tokens are sent to the server.
        u_shape: Whether head and labels are at the client.
        average_every: Steps between two averages, 0 for one a round.
    """

    front: int
    hidden: int
    activations: str
    gradients: str
    facts: int
    targets: bool
    u_shape: bool
    average_every: int
    framework: str = "Split-FedLLM"

    def of_round(self, done: Done, round: int = 1) -> Sent:
        """Return the bytes of a round in which a client took so many steps."""
        segments = ceil(done.steps / self.average_every) if self.average_every else 1
        forward = done.tokens * row_bytes(self.hidden, self.activations)
        backward = done.tokens * row_bytes(self.hidden, self.gradients)
        known = done.rows * self.facts + (4 * done.targets if self.targets else 0)
        answer = 1 + (self.activations == "int8") + 1 + self.targets
        gradient = 1 + (self.gradients == "int8")
        down = segments * (self.front + header(1, 1) + header(0))
        down += backward + done.steps * header(gradient, 5)
        up = segments * (self.front + header(1, 1, 1))
        up += forward + known + (done.steps + segments) * header(answer, 3)
        exchanges = done.steps + 2 * segments
        if self.u_shape:
            down += forward + done.steps * header(1 + (self.activations == "int8"))
            up += backward + done.steps * header(gradient, 2)
            exchanges += done.steps
        return Sent(down, up, exchanges)


Traffic = ParameterTraffic | LogitTraffic | ActivationTraffic

KINDS: dict[str, type[Any]] = {
    kind.framework: kind for kind in (ParameterTraffic, LogitTraffic, ActivationTraffic)
}


def to_record(traffic: Traffic) -> dict[str, Any]:
    """Return the facts of a closed form as JSON."""
    return asdict(traffic)


def from_record(record: Mapping[str, Any]) -> Traffic:
    """Return what :func:`to_record` wrote."""
    traffic: Traffic = KINDS[record["framework"]](**record)
    return traffic
