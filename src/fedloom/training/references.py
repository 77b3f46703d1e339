"""Log-probs of a client's rows under the reference model, once for all rounds."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fedloom.data.batching import sequence_numbers
from fedloom.data.client_rows import TokenShare
from fedloom.models.adapters import AdapterModel
from fedloom.objectives.logps import completion_logps
from fedloom.tensors import Tensors
from fedloom.training.layout import Budget
from fedloom.training.passes import Layout
from fedloom.training.reference_cache import ReferenceCache


def add_reference_logps(
    model: AdapterModel,
    share: TokenShare,
    budget: Budget,
    start: Tensors | None = None,
    cache: ReferenceCache | None = None,
) -> TokenShare:
    """Return ``share`` with the log-probs of its completions under the reference model.

    Computed once per client: the reference does not change over the rounds.

    Args:
        model: Holds anything.
        share: The rows.
        budget: What a forward pass holds at most.
        start: What the reference model has for an adapter and own parts; by default it is the base model.
        cache: Where they are looked for first, and kept. Their FLOPs are counted all the same: costs do
            not depend on what was computed before.
    """
    known = cache.model(model, start) if cache is not None else None
    # layouts first: a model without its adapter cannot be asked for gradients
    layouts = _layouts(model, share, budget)
    with model.reference(start):
        found = [_all_logps(layout, cache, known) for layout in layouts]
    if share.mismatched is None:
        return replace(share, reference_logps=found[0])
    own, mismatched = found if len(found) == 2 else found[0].view(-1, 2).T
    return replace(share, reference_logps=own, mismatched_reference_logps=mismatched)


def _layouts(model: AdapterModel, share: TokenShare, budget: Budget) -> list[Layout]:
    """Return the layout of rows and mismatched completions together, or of each by themselves."""
    if share.mismatched is None or share.paired is None:
        return [Layout(model, TokenShare(share.tokens), budget)]
    together = Layout(model, TokenShare(share.paired), budget)
    if together.shared:
        return [together]
    return [Layout(model, TokenShare(own), budget) for own in (share.tokens, share.mismatched)]


def _all_logps(layout: Layout, cache: ReferenceCache | None, known: str | None) -> Tensor:
    """Return ``(sequences,)`` log-probs in the order of the token set's sequences."""
    tokens, model = layout.share.tokens, layout.model
    result = torch.zeros(len(tokens.prompts))
    for indices, batch in layout.everything():
        numbers = sequence_numbers(tokens.width, indices)
        score = partial(completion_logps, model, batch.sequences)
        before = model.flops
        if cache is None or known is None:
            logps = score().cpu()
        else:
            logps = cache.logps(known, batch.sequences, score)
            if model.flops == before and model.head is not None:
                model.count_reading(batch.sequences)
        result[torch.from_numpy(numbers)] = logps
    return result
