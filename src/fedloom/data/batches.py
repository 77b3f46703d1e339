"""Token rows to padded batches: order, mismatched completions, padding.

One :class:`TokenShare` is what a client trains on. Shuffling draws from the generator it is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.batch import Batch, Reading, Sequences
from fedloom.data.tokenize import TokenSet, fit

Indices = NDArray[np.int64]


class Teacher(Protocol):
    """Knows answers about the positions of a share; see ``aggregation/knowledge.py``."""

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
        opening, (completion,) = fit(
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


def epoch_batches(
    count: int,
    batch_size: int,
    rng: np.random.Generator,
    *,
    epochs: int | None = None,
    steps: int | None = None,
) -> Iterator[Indices]:
    """Yield the rows of each optimizer step.

    Args:
        count: Rows there are, at least 1.
        batch_size: Rows in a step; the last step of an epoch may have fewer.
        rng: Shuffles each epoch anew.
        epochs: Passes over the rows; ``None`` goes on without end.
        steps: Most steps in all, over as many epochs as it takes; ``None`` for no bound.
    """
    done = 0
    epoch = 0
    while epochs is None or epoch < epochs:
        order = rng.permutation(count)
        for start in range(0, count, batch_size):
            if steps is not None and done >= steps:
                return
            yield order[start : start + batch_size]
            done += 1
        epoch += 1


def collate(
    share: TokenShare,
    indices: Indices,
    pad: int,
    device: torch.device,
    *,
    shared_prompts: bool = False,
) -> Batch:
    """Build the batch of the rows at ``indices``.

    Args:
        share: The client's rows.
        indices: ``(examples,)`` positions in ``share.tokens``.
        pad: Token id to pad with.
        device: Where the tensors go.
        shared_prompts: Whether what the sequences of an example begin with is read once.
    """
    tokens = share.tokens
    numbers = sequence_numbers(tokens.width, indices)
    sequences, real, completion = pad_sequences(tokens, numbers, pad, device)
    if shared_prompts:
        sequences = replace(sequences, shared=read_once(tokens, indices, pad).to(device))
    labels = tokens.labels[indices]
    where = torch.from_numpy(indices)
    mismatched = None
    if share.mismatched is not None:
        mismatched = pad_sequences(share.mismatched, indices, pad, device)[0]
    return Batch(
        rows=tuple(tokens.rows[indices].tolist()),
        sequences=sequences,
        completion_tokens=completion,
        tokens=real,
        labels=_labels(labels, completion > 0, device),
        reference_logps=_pick(share.reference_logps, torch.from_numpy(numbers), device),
        mismatched=mismatched,
        mismatched_reference_logps=_pick(share.mismatched_reference_logps, where, device),
        teacher=_answers(share, indices, device),
    )


def sequence_numbers(width: int, indices: Indices) -> Indices:
    """Return the sequences of some examples: all first ones (chosen), then all second ones."""
    return (indices[None, :] * width + np.arange(width)[:, None]).reshape(-1)


def pad_sequences(
    tokens: TokenSet, numbers: Indices, pad: int, device: torch.device
) -> tuple[Sequences, int, int]:
    """Return sequences padded on the right, their real tokens and their completion tokens."""
    starts, ends = tokens.starts[numbers], tokens.starts[numbers + 1]
    lengths, prompts = ends - starts, tokens.prompts[numbers]
    columns = np.arange(int(lengths.max()))
    real = columns[None, :] < lengths[:, None]
    ids = np.full(real.shape, pad, np.int64)
    ids[real] = np.concatenate([tokens.tokens[a:b] for a, b in zip(starts, ends, strict=True)])
    completion = np.zeros_like(real)
    completion[real] = np.concatenate(
        [tokens.trained[a:b] for a, b in zip(starts, ends, strict=True)]
    )
    first = max(1, int(prompts.min()))
    sequences = Sequences(
        torch.from_numpy(ids),
        torch.from_numpy(real.astype(np.int64)),
        torch.from_numpy(completion),
        min(first, len(columns) - 1) or 1,
    )
    return sequences.to(device), int(lengths.sum()), int(completion.sum())


def read_once(tokens: TokenSet, indices: Indices, pad: int) -> Reading:
    """Return how the sequences of some examples are read one after another behind what they begin with.

    Args:
        tokens: The tokenised rows.
        indices: ``(examples,)`` positions in ``tokens``; each is a row of what is read.
        pad: Token id to pad with.
    """
    common, costs = tokens.common_starts[indices], tokens.costs(shared_prompts=True)[indices]
    shape = (len(indices), int(costs.max()))
    ids, positions = np.full(shape, pad, np.int64), np.zeros(shape, np.int64)
    branches = np.full(shape, -1, np.int64)
    places: dict[int, NDArray[np.int64]] = {}
    for row, (example, start) in enumerate(zip(indices.tolist(), common.tolist(), strict=True)):
        end = start
        for branch in range(tokens.width):
            number = example * tokens.width + branch
            own = tokens.sequence(number)[0]
            further = np.arange(end, end + len(own) - start)
            end += len(further)
            place = np.concatenate([np.arange(start), further])
            ids[row, place], positions[row, place] = own, np.arange(len(own))
            branches[row, further] = branch + 1
            places[number] = place + row * shape[1]
        branches[row, :start] = 0
    numbers = sequence_numbers(tokens.width, indices).tolist()
    sources = [places[number][:-1][tokens.mask(number)[1:]] for number in numbers]
    return Reading(
        torch.from_numpy(ids),
        torch.from_numpy((branches >= 0).astype(np.int64)),
        torch.from_numpy(np.concatenate(sources)),
        torch.from_numpy(np.array([places[number][-1] for number in numbers])),
        torch.from_numpy(positions),
        torch.from_numpy(branches),
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


def _labels(labels: NDArray[np.int64], feedback: bool, device: torch.device) -> Tensor | None:
    if (labels < 0).any():
        return None
    tensor = torch.from_numpy(labels).to(device)
    return tensor.bool() if feedback else tensor


def _answers(share: TokenShare, indices: Indices, device: torch.device) -> Tensor | None:
    if share.teacher is None:
        return None
    starts = share.positions
    places = [np.arange(starts[i], starts[i + 1]) for i in indices]
    return share.teacher.at(torch.from_numpy(np.concatenate(places))).to(device)


def _pick(values: Tensor | None, numbers: Tensor, device: torch.device) -> Tensor | None:
    return None if values is None else values[numbers].to(device)
