"""Token rows to padded batches: order and padding. Shuffling draws from the generator it is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedloom.data.batch import Batch, Reading, Sequences
from fedloom.data.client_rows import Indices, TokenShare
from fedloom.data.token_set import TokenSet, common_start


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
    groups: Sequence[Indices] | None = None,
    joint: TokenSet | None = None,
) -> Batch:
    """Build the batch of the rows at ``indices``.

    Args:
        share: The client's rows.
        indices: ``(examples,)`` positions in ``share.tokens``.
        pad: Token id to pad with.
        device: Where the tensors go.
        groups: The same rows, in the same order: what the sequences of a group begin with is read once.
            ``None`` where each sequence is read by itself.
        joint: With ``groups``: each row beside its mismatched completion (:meth:`TokenSet.paired`), for
            one pass over both.
    """
    tokens = share.tokens
    numbers = sequence_numbers(tokens.width, indices)
    sequences, real, completion = pad_sequences(tokens, numbers, pad, device)
    together = None
    if groups is not None and joint is not None:
        both = pad_sequences(joint, sequence_numbers(2, indices), pad, device)[0]
        shared = read_once(joint, groups, pad).to(device)
        together = replace(both, shared=shared, graded=completion)
    elif groups is not None:
        sequences = replace(sequences, shared=read_once(tokens, groups, pad).to(device))
    labels = tokens.labels[indices]
    mismatched: tuple[Sequences, ...] | None = None if share.mismatched is None else ()
    if share.mismatched is not None and together is None:
        mismatched = (pad_sequences(share.mismatched, indices, pad, device)[0],)
    return Batch(
        rows=tuple(tokens.rows[indices].tolist()),
        sequences=sequences,
        completion_tokens=completion,
        tokens=real,
        labels=_labels(labels, completion > 0, device),
        reference_logps=pick(share.reference_logps, numbers, device),
        mismatched=mismatched,
        mismatched_reference_logps=pick(share.mismatched_reference_logps, indices, device),
        teacher=_answers(share, indices, device),
        joint=together,
        margins=_margins(tokens, indices, device),
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


def read_once(tokens: TokenSet, groups: Sequence[Indices], pad: int) -> Reading:
    """Return how the sequences of groups are read one after another behind what they begin with.

    Args:
        tokens: The tokenised rows.
        groups: Positions in ``tokens``; each group is a row of what is read.
        pad: Token id to pad with.
    """
    width = tokens.width
    numbers = [(g[:, None] * width + np.arange(width)).reshape(-1).tolist() for g in groups]
    parts = [[tokens.sequence(number)[0] for number in own] for own in numbers]
    common = [common_start(own) for own in parts]
    costs = [sum(map(len, own)) - (len(own) - 1) * n for own, n in zip(parts, common, strict=True)]
    shape = (len(groups), max(costs))
    ids, positions = np.full(shape, pad, np.int64), np.zeros(shape, np.int64)
    branches = np.full(shape, -1, np.int64)
    places: dict[int, NDArray[np.int64]] = {}
    segments = []
    count = np.arange(shape[1])
    for row, start in enumerate(common):
        end, ends = start, []
        ids[row, :start], positions[row, :start] = parts[row][0][:start], count[:start]
        branches[row, :start] = 0
        for branch, (number, own) in enumerate(zip(numbers[row], parts[row], strict=True), 1):
            begin, end = end, end + len(own) - start
            ids[row, begin:end], positions[row, begin:end] = own[start:], count[start : len(own)]
            branches[row, begin:end] = branch
            ends.append(end)
            place = count[: len(own)] + row * shape[1]
            place[start:] += begin - start
            places[number] = place
        segments.append((start, *ends))
    order = sequence_numbers(width, np.concatenate(groups)).tolist()
    sources = [places[number][:-1][tokens.mask(number)[1:]] for number in order]
    return Reading(
        torch.from_numpy(ids),
        torch.from_numpy((branches >= 0).astype(np.int64)),
        torch.from_numpy(np.concatenate(sources)),
        torch.from_numpy(np.array([places[number][-1] for number in order])),
        torch.from_numpy(positions),
        torch.from_numpy(branches),
        tuple(segments),
    )


def beside(readings: Sequence[Reading], pad: int) -> Reading:
    """Return readings, all with branches or all without, as one: their rows below each other.

    Args:
        readings: What is read; rows are padded to the longest.
        pad: Token id to pad with.
    """
    if len(readings) == 1:
        return readings[0]
    length = max(own.input_ids.shape[1] for own in readings)

    def padded(tensors: Sequence[Tensor], value: int) -> Tensor:
        wide = [F.pad(own, (0, length - own.shape[1]), value=value) for own in tensors]
        return torch.cat(wide)

    sources: list[Tensor] = []
    ends: list[Tensor] = []
    row = 0
    for own in readings:
        rows, columns = own.input_ids.shape
        for found, places in ((sources, own.sources), (ends, own.ends)):
            further = places + (places // columns) * (length - columns) + row * length
            found.append(further)
        row += rows
    positions = [own.position_ids for own in readings if own.position_ids is not None]
    branches = [own.branches for own in readings if own.branches is not None]
    segments = [row for own in readings for row in own.segments or ()]
    return Reading(
        padded([own.input_ids for own in readings], pad),
        padded([own.attention_mask for own in readings], 0),
        torch.cat(sources),
        torch.cat(ends),
        padded(positions, 0) if positions else None,
        padded(branches, -1) if branches else None,
        tuple(segments) if branches else None,
    )


def _labels(labels: NDArray[np.int64], feedback: bool, device: torch.device) -> Tensor | None:
    if (labels < 0).any():
        return None
    tensor = torch.from_numpy(labels).to(device)
    return tensor.bool() if feedback else tensor


def _margins(tokens: TokenSet, indices: Indices, device: torch.device) -> Tensor | None:
    if tokens.margins is None:
        return None
    return torch.from_numpy(tokens.margins[indices]).float().to(device)


def _answers(share: TokenShare, indices: Indices, device: torch.device) -> Tensor | None:
    if share.teacher is None:
        return None
    starts = share.positions
    places = [np.arange(starts[i], starts[i + 1]) for i in indices]
    return share.teacher.at(torch.from_numpy(np.concatenate(places))).to(device)


def pick(values: Tensor | None, numbers: Indices, device: torch.device) -> Tensor | None:
    """Return the values at ``numbers``, where there are any, on a device."""
    return None if values is None else values[torch.from_numpy(numbers)].to(device)
