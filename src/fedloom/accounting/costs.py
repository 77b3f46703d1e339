"""What a client, or the server, cost in one phase of a round."""

from __future__ import annotations

from dataclasses import dataclass

SERVER = -1
"""Client id under which the server's own costs are recorded."""

REFERENCE = "reference"
"""The phase in which a client scores its rows under the reference model, once in a run."""

REPEATED = "reference_again"
"""The same after a resume, by a client that had done it before the stop: recorded, but left out of every
total, so that the totals of a run do not depend on whether it was stopped."""

EVALUATE = "evaluate"
"""The phase, and the action, that trains nothing."""

ROW_LOSSES = "row_losses"
"""The phase, and the action, in which clients say what their rows lose, by which some are drawn."""

BEGIN = "begin"
"""Phase in which a client is sent the starting adapter of the run."""


@dataclass
class Cost:
    """Costs of one client (``SERVER`` for the server) in one phase of one round.

    Attributes:
        bytes_down: Encoded payload bytes from server to client.
        bytes_up: Encoded payload bytes from client to server.
        flops: Floating-point operations, derived; a multiply-add counts two.
        seconds: Wall-clock time.
        peak_memory: Highest memory during the phase in bytes: resident memory of the process, or
            allocated memory of the GPU where there is one.
        tokens: Tokens trained or evaluated on, padding not counted.
        targets: Completion tokens, or classified texts, trained on.
        examples: Examples trained or evaluated on, repetitions counted.
        steps: Optimizer steps.
        exchanges: Messages there and back.
    """

    round: int
    client: int
    phase: str
    bytes_down: int = 0
    bytes_up: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    peak_memory: int = 0
    tokens: int = 0
    targets: int = 0
    examples: int = 0
    steps: int = 0
    exchanges: int = 0

    def add(self, other: Cost) -> None:
        """Add what the same client cost in the same phase and round once more."""
        for name in SUMMED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.peak_memory = max(self.peak_memory, other.peak_memory)


SUMMED = (
    "bytes_down",
    "bytes_up",
    "flops",
    "seconds",
    "tokens",
    "targets",
    "examples",
    "steps",
    "exchanges",
)
"""Costs that add up."""
