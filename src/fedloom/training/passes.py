"""The passes over one party's rows: what a model reads in each, by the layout of ``layout.py``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from fedloom.data.batch import Batch
from fedloom.data.batching import collate, pick
from fedloom.data.client_rows import Indices, TokenShare
from fedloom.models.adapters import AdapterModel
from fedloom.training.layout import (
    Budget,
    attention_cost,
    group_places,
    groups,
    passes,
    row_costs,
    saves,
)
from fedloom.training.shared_prompts import context, shares_prompts


class Layout:
    """Cuts rows of one party into passes, and makes what a model reads in each."""

    def __init__(
        self,
        model: AdapterModel,
        share: TokenShare,
        budget: Budget,
        *,
        joint: bool = False,
        by_itself: bool = False,
        apart: bool = False,
    ) -> None:
        """Look at all rows once.

        Args:
            model: Whose passes they are.
            share: The rows.
            budget: What a pass holds at most.
            joint: Whether each row is read in one pass with its mismatched completion.
            by_itself: Whether each sequence is read by itself, whatever the model may.
            apart: Whether no prompt is read once for several examples, whose gradients are told apart.
        """
        self.apart = apart
        self.model, self.share, self.budget = model, share, budget
        self.paired = share.paired if joint else None
        self.tokens = share.tokens if self.paired is None else self.paired
        self.shared = not by_itself and self._shares()
        self.plain = self.tokens.costs()
        self.costs = row_costs(share)  # where each sequence is read by itself
        self.attention = attention_cost(model.shape)
        self.context = context(model)

    def _shares(self) -> bool:
        tokens = self.tokens
        alike = tokens.width > 1 or int(tokens.prompt_numbers.max(initial=0)) + 1 < len(tokens)
        if self.apart and tokens.width == 1:
            return False
        if not alike or not tokens.trained.any():  # texts of a class have no prompts
            return False
        # of rows that are read apart one must not decide for all
        longest = 0 if self.apart else int(tokens.lengths.max(initial=0))
        return shares_prompts(self.model, longest)

    def passes(self, indices: Indices) -> list[list[Indices]]:
        """Return the passes of some rows, longest first, each as the groups whose prompt is read once."""
        if not self.shared:
            return [[own] for own in passes(self.costs, indices, self.budget)]
        found = (
            [indices[place : place + 1] for place in range(len(indices))]
            if self.apart
            else groups(self.tokens, indices, self.budget, self.attention, self.context)
        )
        costs = np.array([self._read_once(own) for own in found])
        sizes = np.array([len(own) for own in found])
        cut = passes(costs, np.arange(len(found)), self.budget, sizes)
        return [[found[place] for place in own] for own in cut]

    def places(self, indices: Indices) -> int:
        """Return how many tokens the passes of some rows have together, padding counted."""
        return self.places_of(self.passes(indices))

    def places_of(self, passes: list[list[Indices]]) -> int:
        """Return how many tokens some passes have together, padding counted."""
        return sum(map(self._places, passes))

    def batches(self, indices: Indices) -> list[Batch]:
        """Return an optimizer batch as one batch a pass."""
        return [self.batch(own) for own in self.passes(indices)]

    def batch(self, own: list[Indices]) -> Batch:
        """Return the batch of one pass."""
        model, empty = self.model, self.model.device.type == "meta"
        device = torch.device("cpu") if empty else model.device
        once = own if self._once(own) else None
        rows = np.concatenate(own)
        return collate(self.share, rows, model.pad, device, groups=once, joint=self.paired)

    def everything(self) -> Iterator[tuple[Indices, Batch]]:
        """Yield the rows of each pass over all of them, and their batch."""
        for own in self.passes(np.arange(len(self.share))):
            yield np.concatenate(own), self.batch(own)

    def _once(self, own: list[Indices]) -> bool:
        """Return whether the prompts of a pass are read once."""
        if not self.shared or self.paired is not None:
            return self.shared
        if self.apart:
            longest = int(self.tokens.lengths[np.concatenate(own)].max())
            if not shares_prompts(self.model, longest):
                return False
        return saves(self._plain(own), len(own) * max(map(self._read_once, own)))

    def _places(self, own: list[Indices]) -> int:
        once = self._once(own)
        return len(own) * max(map(self._read_once, own)) if once else self._plain(own)

    def _plain(self, own: list[Indices]) -> int:
        rows = np.concatenate(own)
        return len(rows) * int(self.plain[rows].max())

    def _read_once(self, group: Indices) -> int:
        return group_places(self.tokens, group)


class StepLayout:
    """The passes of optimizer batches: those of mismatched completions among them, or beside them."""

    def __init__(self, model: AdapterModel, share: TokenShare, budget: Budget, graphs: int) -> None:
        """Look at all rows once.

        Args:
            model: Whose passes they are.
            share: The rows.
            budget: What a pass holds at most.
            graphs: Tokens whose graphs may be held before the first backward pass.
        """
        self.graphs, self.share = graphs, share
        own = replace(share, mismatched=None, mismatched_reference_logps=None)
        self.alone = Layout(model, own, budget)
        self.mismatched = self.joint = None
        if share.mismatched is not None:
            self.mismatched = Layout(model, TokenShare(share.mismatched), budget)
            both = Layout(model, share, budget, joint=True) if graphs else None
            self.joint = both if both and both.paired is not None and both.shared else None

    def batches(self, indices: Indices) -> list[Batch]:
        """Return an optimizer batch as one batch a pass."""
        if self.mismatched is None:
            return self.alone.batches(indices)
        own_passes, beside = self.alone.passes(indices), self.mismatched.passes(indices)
        if self.joint is not None:
            joint = self.joint.passes(indices)
            places, alone = self.joint.places_of(joint), self.alone.places_of(own_passes)
            # forward and backward over both, or over rows alone and forward over the others
            apart = 2 * alone + self.mismatched.places_of(beside)
            if places <= self.graphs and saves(apart, 2 * places):
                return [self.joint.batch(own) for own in joint]
        first, *others = map(self.alone.batch, own_passes)
        rows = np.concatenate([own for read in beside for own in read])
        reference = self.share.mismatched_reference_logps
        first = replace(
            first,
            mismatched=tuple(self.mismatched.batch(own).sequences for own in beside),
            mismatched_reference_logps=pick(reference, rows, self.alone.model.device),
        )
        return [first, *(replace(own, mismatched=()) for own in others)]
