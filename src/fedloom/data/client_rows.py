"""The token rows that one client trains on, and mismatched completions among them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.data.token_set import TokenSet
from fedloom.data.truncation import truncate

Indices = NDArray[np.int64]


class Teacher(Protocol):
    """Knows answers about the positions of a share; see ``aggregation/soft_labels.py``."""

    def at(self, positions: Tensor) -> Tensor:
        """Return ``(n, width)`` log-probabilities of some positions."""
        ...


@dataclass(frozen=True)
class TokenShare:
    """The rows one client holds, and what has been computed about them once.

    Attributes:
        tokens: The tokenised rows.
        mismatched: For KTO, each row's prompt with another row's completion, in the same order;
            ``None`` where it is not needed or the client has a single row.
        reference_logps: ``(sequences,)`` under the reference model, once computed.
        mismatched_reference_logps: ``(examples,)`` of ``mismatched``, once computed.
        teacher: What is distilled from, about these rows' positions in their order.
    """

    tokens: TokenSet
    mismatched: TokenSet | None = None
    reference_logps: Tensor | None = None
    mismatched_reference_logps: Tensor | None = None
    teacher: Teacher | None = None

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.tokens)

    @property
    def positions(self) -> Indices:
        """``(examples + 1,)`` where each one's positions begin: one a text, or one a completion token."""
        lengths = self.tokens.completion_lengths
        return np.concatenate([[0], np.cumsum(np.maximum(lengths, 1))]).astype(np.int64)

    @cached_property
    def paired(self) -> TokenSet | None:
        """Each row and its mismatched completion as one example of two sequences; made once."""
        return None if self.mismatched is None else self.tokens.paired(self.mismatched)

    def take(self, rows: Indices) -> TokenShare:
        """Return the examples at ``rows`` with what was computed about them; without a teacher."""
        width = self.tokens.width
        sequences = torch.from_numpy((rows[:, None] * width + np.arange(width)).reshape(-1))
        logps, mismatched = self.reference_logps, self.mismatched_reference_logps
        return TokenShare(
            self.tokens.take(rows),
            None if self.mismatched is None else self.mismatched.take(rows),
            None if logps is None else logps[sequences],
            None if mismatched is None else mismatched[torch.from_numpy(rows)],
        )


def mismatch(
    tokens: TokenSet, rng: np.random.Generator, max_length: int, bos: int | None
) -> TokenSet | None:
    """Pair every prompt with the completion of another row, for KTO's reference point.

    The rows form one random cycle and each takes the completion of the next row in it that has
    another prompt, so that the two answers to one question are not taken for mismatched ones.

    Args:
        tokens: Feedback rows of one client.
        rng: Draws the cycle.
        max_length: Tokens a sequence may have.
        bos: The tokenizer's start token, kept when a prompt is cut.

    Returns:
        One mismatched sequence for each row, or ``None`` for fewer than two rows.
    """
    if len(tokens) < 2:
        return None
    cycle = rng.permutation(len(tokens))
    prompts = [bytes(s[:p]) for s, p in (tokens.sequence(i) for i in range(len(tokens)))]
    parts: list[NDArray[np.int32]] = [np.zeros(0, np.int32)] * len(tokens)
    masks: list[NDArray[np.bool_]] = [np.zeros(0, np.bool_)] * len(tokens)
    lengths = np.zeros(len(tokens), np.int64)
    for own, other in zip(cycle, _next_others(cycle, prompts), strict=True):
        sequence, prompt = tokens.sequence(int(own))
        donor, donor_prompt = tokens.sequence(other)
        opening, (completion,) = truncate(
            sequence[:prompt].tolist(), [donor[donor_prompt:].tolist()], max_length, bos
        )
        parts[own] = np.array(opening + completion, np.int32)
        trained = tokens.mask(other)[donor_prompt:][: len(completion)]
        masks[own] = np.concatenate([np.zeros(len(opening), np.bool_), trained])
        lengths[own] = len(opening)
    starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
    return replace(
        tokens,
        tokens=np.concatenate(parts),
        trained=np.concatenate(masks),
        starts=starts,
        prompts=lengths,
    )


def _next_others(cycle: Indices, prompts: list[bytes]) -> list[int]:
    """Return for each place of the cycle the next row with another prompt, or just the next one."""
    rows = cycle.tolist()
    following = [*rows[1:], rows[0]]
    found = list(following)
    other: int | None = None
    for place in [*range(len(rows))][::-1] * 2:  # twice round: the last ones look beyond the first
        if prompts[following[place]] != prompts[rows[place]]:
            other = following[place]
        found[place] = following[place] if other is None else other
    return found
