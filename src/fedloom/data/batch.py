"""What a model reads in one forward pass: padded sequences and what is known about them.

Built by ``batching.py``, read by ``objectives/``; neither knows the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reading:
    """How a model reads sequences: each by itself, or several that begin alike one after another.

    Attributes:
        input_ids: ``(rows, length)`` int64.
        attention_mask: ``(rows, length)`` int64, 1 on tokens and 0 on padding.
        sources: ``(completion tokens,)`` int64: the place, in all rows one after another, of the token
            before each completion token, sequence by sequence.
        ends: ``(sequences,)`` int64: likewise the place of each sequence's last token.
        position_ids: ``(rows, length)`` int64; ``None`` where they rise by one.
        branches: ``(rows, length)`` int64: 0 on what all sequences of a row begin with, then from 1 the
            number of the sequence that goes on, -1 on padding; ``None`` for one sequence a row.
        segments: Of each row, how many tokens all its sequences begin with, and where each ends; ``None``
            for one sequence a row.
    """

    input_ids: Tensor
    attention_mask: Tensor
    sources: Tensor
    ends: Tensor
    position_ids: Tensor | None = None
    branches: Tensor | None = None
    segments: tuple[tuple[int, ...], ...] | None = None

    def to(self, device: torch.device) -> Reading:
        """Return the same on ``device``."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def seen(self) -> Tensor:
        """Return ``(rows, 1, length, length)`` bool: whether a token attends to another.

        To those before it, of its own sequence and of what that begins with.
        """
        assert self.branches is not None, "one sequence a row is a causal mask"
        own, other = self.branches.unsqueeze(-1), self.branches.unsqueeze(-2)
        before = torch.ones_like(own[0] == other[0]).tril()
        return (before & ((other == 0) | (other == own))).unsqueeze(1)


@dataclass(frozen=True)
class Predicting:
    """What an output layer reads where it predicts completion tokens.

    Attributes:
        states: ``(completion tokens, hidden)``.
        logits: The output layer: ``(tokens, width)`` of some of these states.
        width: Logits of a position.
        trained: Whether the output layer has weights that are trained.
        rewards: ``(sequences,)`` float32 explicit rewards, where there is a reward head.
    """

    states: Tensor
    logits: Callable[[Tensor], Tensor]
    width: int
    trained: bool
    rewards: Tensor | None = None


@dataclass(frozen=True)
class Sequences:
    """Right-padded token sequences, each a prompt followed by a completion.

    Attributes:
        input_ids: ``(sequences, length)`` int64.
        attention_mask: ``(sequences, length)`` int64, 1 on tokens and 0 on padding.
        completion_mask: ``(sequences, length)`` bool, true on the tokens whose log-prob counts.
        first_completion: Smallest column that holds a completion token in any row (>= 1), so that
            the LM head need not be applied to columns that hold prompt alone.
        shared: How a model reads them that reads once what several begin with; ``None`` where each is
            read by itself.
        graded: Of how many completion tokens, from the first on, the log-probs are to have a gradient;
            ``None`` for all.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    first_completion: int
    shared: Reading | None = None
    graded: int | None = None

    @property
    def reading(self) -> Reading:
        """How a model reads them."""
        if self.shared is not None:
            return self.shared
        length = self.input_ids.shape[1]
        rows, columns = self.completion_mask.nonzero(as_tuple=True)
        ends = torch.arange(len(self.input_ids), device=rows.device) * length
        ends = ends + self.attention_mask.sum(-1) - 1
        return Reading(self.input_ids, self.attention_mask, rows * length + columns - 1, ends)

    def to(self, device: torch.device) -> Sequences:
        """Return the same sequences on ``device``."""
        return Sequences(
            self.input_ids.to(device, non_blocking=True),
            self.attention_mask.to(device, non_blocking=True),
            self.completion_mask.to(device, non_blocking=True),
            self.first_completion,
            None if self.shared is None else self.shared.to(device),
            self.graded,
        )


@dataclass(frozen=True)
class Rollouts:
    """What is known of the generated answers that a batch holds.

    Attributes:
        advantages: ``(sequences,)``.
        rewards: ``(sequences,)``.
        spreads: ``(sequences,)``, the standard deviation of the rewards of each one's group.
        old_logps: ``(sequences, kept)`` log-probs of tokens under the policy that generated them, in the
            columns of :func:`~fedloom.objectives.logps.completion_token_logps`; ``None`` where it is the
            policy that is trained, as it is at this step.
        reference_logps: The same under the reference model, where there is one.
    """

    advantages: Tensor
    rewards: Tensor
    spreads: Tensor
    old_logps: Tensor | None = None
    reference_logps: Tensor | None = None


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
        mismatched: Passes over mismatched completions, each behind the prompt of an example of the
            optimizer batch (KTO): one of its batches has them all. ``None`` where there are none.
        mismatched_reference_logps: ``(mismatched completions,)`` their reference log-probs, pass by pass.
        joint: ``sequences``, then the mismatched completion of each without a gradient, in one pass that
            reads once what all begin with; ``mismatched`` is empty then.
        rollouts: What is known of ``sequences``, where they were generated.
        margins: ``(examples,)`` float32, what the rewards of chosen answers are to lead by; ``None``
            where no row says it.
        teacher: ``(positions, width)`` log-probabilities to distil from: a position is an example with
            a class, or a completion token, row by row.
    """

    rows: tuple[int, ...]
    sequences: Sequences
    completion_tokens: int
    tokens: int
    labels: Tensor | None = None
    reference_logps: Tensor | None = None
    mismatched: tuple[Sequences, ...] | None = None
    mismatched_reference_logps: Tensor | None = None
    teacher: Tensor | None = None
    joint: Sequences | None = None
    rollouts: Rollouts | None = None
    margins: Tensor | None = None

    @property
    def places(self) -> int:
        """Tokens of the pass with gradients, padding counted."""
        return (self.joint or self.sequences).reading.input_ids.numel()

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.rows)
