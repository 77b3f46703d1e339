"""Attention of sequences that stand one after another behind what they begin with, one at a time.

A mask of all pairs of places says the same, but what it hides is computed all the same, and kernels for
causal attention, which leave half of it out, take no mask. So the first sequence attends with what all
begin with as any sequence does, and each further one to what they begin with and to itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fedloom.data.batch import Reading

LEAST = 128
"""Places of a row at least: with fewer, one call for all costs less than a few short ones."""

NEVER = 1 << 62
"""More places than any row has."""

KIND = "sdpa"
"""Of transformers' kinds of attention, the one that this stands in for."""


@dataclass(frozen=True)
class _Tree:
    """What is read now.

    Attributes:
        mask: That a model was given: attention with another one is left as it is.
        segments: Of each row; see :class:`Reading`.
    """

    mask: Tensor
    segments: tuple[tuple[int, ...], ...]


_NOW: ContextVar[_Tree | None] = ContextVar("tree", default=None)


def applies(reading: Reading, kind: str, least: int) -> bool:
    """Return whether attention is worked out so: on a CPU, where kernels for a mask compute all of it.

    Args:
        reading: What is read.
        kind: The model's attention, by transformers' name.
        least: Places of a row at least.
    """
    rows = reading.input_ids
    known = kind == KIND and reading.segments is not None
    return known and rows.device.type == "cpu" and rows.shape[1] >= least


@contextmanager
def tree_attention(reading: Reading, mask: Tensor) -> Iterator[None]:
    """Inside, layers that are given ``mask``, which says the same, attend sequence by sequence."""
    assert reading.segments is not None, "who asks has asked whether it applies"
    _install()
    token = _NOW.set(_Tree(mask, reading.segments))
    try:
        yield
    finally:
        _NOW.reset(token)


@cache
def _install() -> None:
    """Put this before transformers' own function, which does everything else as before."""
    plain = ALL_ATTENTION_FUNCTIONS[KIND]

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,  # some models name it
        **options: Any,
    ) -> Any:
        tree = _NOW.get()
        biased = options.get("position_bias") is not None
        if tree is None or biased or not _alike(tree, query, key, attention_mask):
            return plain(module, query, key, value, attention_mask, **options)
        options["is_causal"] = None

        def part(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
            causal = {**options, "is_causal": True} if hidden is None else options
            found: Tensor = plain(module, q, k, v, hidden, **causal)[0]
            return found

        rows = []
        for row, segments in enumerate(tree.segments):
            one = slice(row, row + 1)
            rows.append(_row(part, query[one], key[one], value[one], segments))
        return torch.cat(rows), None

    ALL_ATTENTION_FUNCTIONS[KIND] = attend


def _row(part: Any, query: Tensor, key: Tensor, value: Tensor, segments: tuple[int, ...]) -> Tensor:
    """Return ``(1, length, heads, width)`` of a row of ``(1, heads, length, width)``."""
    common, first, *ends = segments
    found = [part(*(own[:, :, :first] for own in (query, key, value)), None)]
    start = first
    for end in ends:
        seen = torch.ones(end - start, common + end - start, dtype=torch.bool, device=query.device)
        keys, values = (
            torch.cat([own[:, :, :common], own[:, :, start:end]], 2) for own in (key, value)
        )
        found.append(part(query[:, :, start:end], keys, values, seen.tril(common)[None, None]))
        start = end
    padding = query.shape[2] - start
    if padding:
        found.append(found[0].new_zeros(1, padding, *found[0].shape[2:]))
    return torch.cat(found, 1)


def _alike(tree: _Tree, query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Return whether a layer attends as was told: to all places, each by the mask."""
    length = tree.mask.shape[-1]
    return (
        mask is not None
        and mask.shape == tree.mask.shape
        and mask.data_ptr() == tree.mask.data_ptr()
        and query.shape[0] == len(tree.segments)
        and query.shape[2] == key.shape[2] == length
    )
