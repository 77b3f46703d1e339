"""Synthetic inputs of a classifier: input embeddings with a class each, and training on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedloom.accounting.flops import backward_flops, forward_flops
from fedloom.data.batch import Batch, Sequences
from fedloom.data.client_rows import TokenShare
from fedloom.data.token_set import TokenSet
from fedloom.models.adapters import AdapterModel
from fedloom.models.flop_shape import model_shape
from fedloom.training.results import Gradients, RemoteGradients, Totals

SYNTHETIC_INPUTS = "synthetic_inputs"
"""Name of a tensor of messages that holds such embeddings, ``(..., positions, width)``."""

_NONE = np.zeros(0, np.int64)

NO_ROWS = TokenShare(
    TokenSet(
        1, _NONE, _NONE, np.zeros(0, np.int32), np.zeros(0, np.bool_), np.zeros(1, np.int64), _NONE,
        np.zeros((0, 2), np.int64), np.zeros(0, np.bool_), _NONE, (),
    )
)  # fmt: skip
"""Rows of who trains on synthetic inputs alone."""


def embeddings_of(model: AdapterModel) -> Tensor:
    """Return ``(vocabulary, width)``, what a model reads for each token, without a gradient.

    It is what the embedding module returns, as some scale its weights (Gemma 3), and takes as
    ``inputs_embeds``; hooks on the module, such as one that adds noise in training, are left out.
    """
    module, weight = _module(model), _weight(model)
    with torch.no_grad():
        found: Tensor = module.forward(torch.arange(len(weight), device=weight.device))
    return found.detach()


def width_of(model: AdapterModel) -> int:
    """Return how many numbers a model reads for each token."""
    return _weight(model).shape[1]


def _module(model: AdapterModel) -> Any:
    anyone: Any = model.model
    return anyone.get_input_embeddings()


def _weight(model: AdapterModel) -> Tensor:
    weight: Tensor = _module(model).weight
    return weight


def last_states(output: Any, attention_mask: Tensor) -> Tensor:
    """Return ``(rows, hidden)`` float32 last hidden states at each row's last token."""
    states = output.hidden_states[-1][:, -attention_mask.shape[1] :]
    rows = torch.arange(len(states), device=states.device)
    found: Tensor = states[rows, attention_mask.sum(-1) - 1].float()
    return found


def read_inputs(model: AdapterModel, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a classifier makes of input embeddings, and count the pass.

    Args:
        model: With a classification head.
        inputs: ``(rows, positions, width)``; a gradient flows into it where it wants one.

    Returns:
        ``(rows, hidden)`` hidden states at the last position, and ``(rows, classes)`` logits; float32.
    """
    rows, length, _ = inputs.shape
    if inputs.requires_grad:
        shape = model_shape(model.model, gradient_enters=True)
        model.allowance.check()
        model.flops += forward_flops(shape, rows, length, length)
        model.flops += backward_flops(shape, rows, length, length)
    else:
        model.count(rows, length, length)
    mask = torch.ones(rows, length, dtype=torch.int64, device=inputs.device)
    anyone: Any = model.model
    given = inputs.to(_weight(model).dtype)
    output = anyone(inputs_embeds=given, attention_mask=mask, output_hidden_states=True)
    return last_states(output, mask), output.logits.float()


@dataclass(frozen=True)
class SyntheticRows:
    """What is trained on in place of rows.

    Attributes:
        inputs: ``(rows, positions, width)``.
        labels: ``(rows,)`` int64 classes.
        weights: ``(rows,)`` above 0: what each counts.
    """

    inputs: Tensor
    labels: Tensor
    weights: Tensor

    def batches(self, size: int, rng: np.random.Generator) -> Iterator[list[Batch]]:
        """Yield batches without an end, shuffled anew in each pass; each has its rows' numbers alone."""
        while True:
            order = rng.permutation(len(self.labels))
            for start in range(0, len(order), size):
                own = order[start : start + size]
                ones = torch.ones(len(own), 1, dtype=torch.int64)
                sequences = Sequences(ones, ones, torch.zeros_like(ones, dtype=torch.bool), 1)
                yield [Batch(tuple(own.tolist()), sequences, 0, self.inputs.shape[1] * len(own))]

    def gradients(self, model: AdapterModel, parts: list[Batch], totals: Totals) -> RemoteGradients:
        """Leave the gradients of the weighted cross-entropy of a batch; for ``local_steps``."""
        (batch,) = parts
        where = torch.tensor(batch.rows)
        labels, weights = (own[where].to(model.device) for own in (self.labels, self.weights))
        logits = read_inputs(model, self.inputs[where].to(model.device))[1]
        losses = F.cross_entropy(logits, labels, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        totals.add(batch, {"loss": loss.detach()}, float(len(batch)), {})
        return Gradients(float(loss.detach()))
        yield  # nobody else is needed
