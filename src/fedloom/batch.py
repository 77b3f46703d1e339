"""What a model reads in one forward pass: padded sequences and what is known about them.

Built by ``data/batches.py``, read by ``objectives/``; neither knows the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Right-padded token sequences, each a prompt followed by a completion.

    Attributes:
        input_ids: ``(sequences, length)`` int64.
        attention_mask: ``(sequences, length)`` int64, 1 on tokens and 0 on padding.
        completion_mask: ``(sequences, length)`` bool, true on the tokens whose log-prob counts.
        first_completion: Smallest column that holds a completion token in any row (>= 1), so that
            the LM head need not be applied to columns that hold prompt alone.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    first_completion: int

    def to(self, device: torch.device) -> Sequences:
        """Return the same sequences on ``device``."""
        return Sequences(
            self.input_ids.to(device, non_blocking=True),
            self.attention_mask.to(device, non_blocking=True),
            self.completion_mask.to(device, non_blocking=True),
            self.first_completion,
        )


@dataclass(frozen=True)
class Batch:
    """Some examples of one client, ready for an objective.

    Attributes:
        rows: Row number of each example in the data, for error messages.
        sequences: One sequence an example; for pairs all chosen ones, then all rejected ones.
        completion_tokens: Number of completion tokens in ``sequences``.
        tokens: Number of tokens that are not padding in ``sequences``.
        labels: ``(examples,)``: class ids (int64), or desirable (bool); ``None`` where there are none.
        reference_logps: ``(sequences,)`` log-probs of the completions under the reference model.
        mismatched: Each example's prompt with another example's completion (KTO), or ``None``.
        mismatched_reference_logps: ``(examples,)`` their reference log-probs.
        teacher: ``(positions, width)`` log-probabilities to distil from: a position is an example with
            a class, or a completion token, row by row.
    """

    rows: tuple[int, ...]
    sequences: Sequences
    completion_tokens: int
    tokens: int
    labels: Tensor | None = None
    reference_logps: Tensor | None = None
    mismatched: Sequences | None = None
    mismatched_reference_logps: Tensor | None = None
    teacher: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.rows)
