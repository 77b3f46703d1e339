"""Tokenised examples of one kind: ragged rows in flat arrays, which may be mapped from a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

ARRAYS = ("index", "rows", "starts", "prompts", "cut", "escaped", "labels", "counted", "common")
"""What a token set holds beside its tokens: arrays with one entry an example or a sequence."""

MARGINS = "margins"
"""One more, of pairs that have some."""


@dataclass(frozen=True)
class Untokenized:
    """An example of which no tokens are trained on.

    Attributes:
        position: Where it stood in what was tokenised.
        row: Its row number in the data.
        reason: Why.
        malformed: Whether the row itself is at fault.
    """

    position: int
    row: int
    reason: str
    malformed: bool = False


@dataclass(frozen=True)
class TokenSet:
    """Tokenised examples of one kind, ragged rows in flat arrays.

    Attributes:
        width: Sequences an example has: 2 for pairs (chosen, rejected), one a choice, else 1.
        index: ``(examples,)`` position of each example in what was tokenised (some were dropped).
        rows: ``(examples,)`` row number in the data.
        tokens: ``(total,)`` int32, all sequences one after another.
        trained: ``(total,)`` bool, true on the tokens whose log-prob counts.
        starts: ``(examples * width + 1,)`` where each sequence begins.
        prompts: ``(examples * width,)`` number of tokens before the first that counts, in each sequence.
        cut: ``(examples * width, 2)`` tokens that ``max_length`` cut from prompt and completion.
        escaped: ``(examples,)`` bool, true where control tokens stand in the text, encoded as text.
        labels: ``(examples,)`` class id, number of the right choice, or 1 for desirable and 0 for not; -1
            where there is none.
        dropped: The examples of which nothing is trained on.
        counted: ``(examples * width,)`` tokens that count in each sequence, where they were counted.
        common: ``(examples,)`` tokens that all sequences of an example begin with, likewise.
        largest: The largest token id, -1 of none, likewise.
        margins: ``(examples,)`` what the reward of a pair's chosen answer is to lead by, NaN where its
            row has something else than a number there; ``None`` where no row says it.
    """

    width: int
    index: NDArray[np.int64]
    rows: NDArray[np.int64]
    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    starts: NDArray[np.int64]
    prompts: NDArray[np.int64]
    cut: NDArray[np.int64]
    escaped: NDArray[np.bool_]
    labels: NDArray[np.int64]
    dropped: tuple[Untokenized, ...]
    counted: NDArray[np.int64] | None = None
    common: NDArray[np.int64] | None = None
    largest: int | None = None
    margins: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.index)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """``(examples,)`` tokens of the longest sequence of each example."""
        lengths = np.diff(self.starts).reshape(-1, self.width)
        return lengths.max(axis=1) if len(lengths) else np.zeros(0, np.int64)

    @property
    def completion_lengths(self) -> NDArray[np.int64]:
        """``(sequences,)`` tokens that count in each sequence."""
        if self.counted is not None:
            return self.counted
        before = np.concatenate([[0], np.cumsum(self.trained)])
        return np.diff(before[self.starts]).astype(np.int64)

    @property
    def largest_token(self) -> int:
        """The largest token id, -1 where there is none."""
        return int(self.tokens.max(initial=-1)) if self.largest is None else self.largest

    def costs(self, *, shared_prompts: bool = False) -> NDArray[np.int64]:
        """Return ``(examples,)`` places that each example takes in a pass of rows as long as itself.

        Args:
            shared_prompts: Whether what all its sequences begin with is read once
                (:meth:`common_starts`).
        """
        return self._costs[shared_prompts and self.width > 1]

    @cached_property
    def _costs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Costs where each sequence is read whole, and where what several begin with is read once."""
        padded: NDArray[np.int64] = self.lengths * self.width
        if self.width == 1:
            return padded, padded
        whole = np.diff(self.starts).reshape(-1, self.width).sum(1)
        return padded, whole - (self.width - 1) * self.common_starts

    @cached_property
    def common_starts(self) -> NDArray[np.int64]:
        """``(examples,)`` tokens that all sequences of an example begin with.

        At least one token of each is beyond them.
        """
        if self.common is not None:
            return self.common
        if self.width == 1:
            return self.lengths - 1
        found = np.zeros(len(self), np.int64)
        for example in range(len(self)):
            own = [self.sequence(example * self.width + i)[0] for i in range(self.width)]
            found[example] = common_start(own)
        return found

    @cached_property
    def prompt_numbers(self) -> NDArray[np.int64]:
        """``(examples,)`` the same number for examples whose prompts have the same tokens."""
        known: dict[bytes, int] = {}
        found = np.zeros(len(self), np.int64)
        for example in range(len(self)):
            tokens, prompt = self.sequence(example * self.width)
            found[example] = known.setdefault(tokens[:prompt].tobytes(), len(known))
        return found

    def paired(self, others: TokenSet) -> TokenSet:
        """Return these examples with two sequences each: their own, and that of ``others`` in its place.

        Args:
            others: As many examples, of one sequence each as these.
        """
        count, numbers = len(self), np.arange(2 * len(self)).reshape(2, -1).T.reshape(-1)
        lengths = np.concatenate([np.diff(self.starts), np.diff(others.starts)])
        starts = np.concatenate([self.starts[:-1], len(self.tokens) + others.starts[:-1]])
        order = [np.arange(starts[n], starts[n] + lengths[n]) for n in numbers]
        places = np.concatenate(order) if count else np.zeros(0, np.int64)

        def both(name: str) -> NDArray[Any]:
            return np.concatenate([getattr(self, name), getattr(others, name)])

        return replace(
            self,
            width=2,
            tokens=both("tokens")[places],
            trained=both("trained")[places],
            starts=np.concatenate([[0], np.cumsum(lengths[numbers])]).astype(np.int64),
            prompts=both("prompts")[numbers],
            cut=both("cut")[numbers],
            counted=None,
            common=None,
            largest=None,
        )

    def sequence(self, number: int) -> tuple[NDArray[np.int32], int]:
        """Return the tokens of sequence ``number`` and how many of them are prompt."""
        return self.tokens[self.starts[number] : self.starts[number + 1]], int(self.prompts[number])

    def mask(self, number: int) -> NDArray[np.bool_]:
        """Return which tokens of sequence ``number`` count."""
        return self.trained[self.starts[number] : self.starts[number + 1]]

    def take(self, positions: NDArray[np.int64]) -> TokenSet:
        """Return the examples at ``positions`` (in this set), in that order."""
        if len(positions) and (np.diff(positions) == 1).all():
            return self.part(int(positions[0]), int(positions[-1]) + 1)
        numbers = (positions[:, None] * self.width + np.arange(self.width)).reshape(-1)
        lengths = self.starts[numbers + 1] - self.starts[numbers]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        pieces = [(self.sequence(number)[0], self.mask(number)) for number in numbers.tolist()]
        tokens = np.concatenate([np.zeros(0, np.int32), *(own for own, _ in pieces)])
        trained = np.concatenate([np.zeros(0, np.bool_), *(own for _, own in pieces)])
        return replace(
            self,
            index=self.index[positions],
            rows=self.rows[positions],
            tokens=tokens,
            trained=trained,
            starts=starts,
            prompts=self.prompts[numbers],
            cut=self.cut[numbers],
            escaped=self.escaped[positions],
            labels=self.labels[positions],
            counted=None if self.counted is None else self.counted[numbers],
            common=None if self.common is None else self.common[positions],
            margins=None if self.margins is None else self.margins[positions],
        )

    def part(self, first: int, end: int) -> TokenSet:
        """Return the examples from ``first`` to before ``end``; of the arrays nothing is copied."""
        numbers = slice(first * self.width, end * self.width)
        starts = self.starts[numbers.start : numbers.stop + 1]
        own = slice(int(starts[0]), int(starts[-1]))
        return replace(
            self,
            index=self.index[first:end],
            rows=self.rows[first:end],
            tokens=self.tokens[own],
            trained=self.trained[own],
            starts=starts - starts[0],
            prompts=self.prompts[numbers],
            cut=self.cut[numbers],
            escaped=self.escaped[first:end],
            labels=self.labels[first:end],
            counted=None if self.counted is None else self.counted[numbers],
            common=None if self.common is None else self.common[first:end],
            margins=None if self.margins is None else self.margins[first:end],
        )

    def without_tokens(self) -> TokenSet:
        """Return the same, looked at once, without the tokens themselves."""
        return replace(
            self,
            tokens=np.zeros(0, np.int32),  # a slice of none would hold all
            trained=np.zeros(0, np.bool_),
            counted=self.completion_lengths,
            common=self.common_starts,
            largest=self.largest_token,
        )


def common_start(sequences: Sequence[NDArray[np.int32]]) -> int:
    """Return how many tokens all sequences begin with; at least one token of each is beyond them."""
    most = min(map(len, sequences)) - 1
    first = sequences[0][:most]
    alike = np.logical_and.reduce([own[:most] == first for own in sequences])
    return most if alike.all() else int(alike.argmin())


def join(parts: Sequence[TokenSet], width: int) -> TokenSet:
    """Return token sets of one kind as one, in their order; each says where it stood in all.

    Args:
        parts: Which may be without their tokens.
        width: Sequences an example has, where there is no part.
    """

    def flat(name: str, kind: type = np.int64) -> NDArray[Any]:
        return np.concatenate([np.zeros(0, kind), *(getattr(part, name) for part in parts)])

    ends = np.cumsum([0, *(part.starts[-1] for part in parts)])
    begins = [part.starts[:-1] + end for part, end in zip(parts, ends, strict=False)]
    return TokenSet(
        width,
        flat("index"),
        flat("rows"),
        flat("tokens", np.int32),
        flat("trained", np.bool_),
        np.concatenate([*begins, ends[-1:]]).astype(np.int64),
        flat("prompts"),
        np.concatenate([np.zeros((0, 2), np.int64), *(part.cut for part in parts)]),
        flat("escaped", np.bool_),
        flat("labels"),
        tuple(one for part in parts for one in part.dropped),
        np.concatenate([np.zeros(0, np.int64), *(part.completion_lengths for part in parts)]),
        np.concatenate([np.zeros(0, np.int64), *(part.common_starts for part in parts)]),
        max((part.largest_token for part in parts), default=-1),
        _joined_margins(parts),
    )


def _joined_margins(parts: Sequence[TokenSet]) -> NDArray[np.float64] | None:
    """Return the margins of parts, 0 in those that have none; ``None`` where no part has any."""
    if all(part.margins is None for part in parts):
        return None
    own = (np.zeros(len(part)) if part.margins is None else part.margins for part in parts)
    return np.concatenate([*own])
