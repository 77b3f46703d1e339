"""Synthetic examples for a model: free input embeddings with free soft targets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fedloom.models.adapters import AdapterModel
from fedloom.randomness import generator
from fedloom.tensors import Tensors


class EmbeddingLoss:
    """The cross-entropy of an adapter on input embeddings with soft targets, times a factor."""

    def __init__(self, model: AdapterModel) -> None:
        """Take the model, whose own parameters stand as they are afterwards."""
        self.model = model

    def examples(self, count: int, length: int, seed: int, round: int) -> Tensors:
        """Return embeddings as large as those of tokens, random targets, and the factor's logarithm.

        Args:
            count: m, examples.
            length: L, positions of each.
            seed: The experiment's.
            round: Whose examples they are.

        Returns:
            ``inputs`` (m, L, hidden), ``targets`` (m, L, tokens) or (m, classes), and ``factor``, 0.
        """
        anyone: Any = self.model.model
        weight: Tensor = anyone.get_input_embeddings().weight
        rng, device = generator(seed, "synthetic examples", round=round), weight.device
        drawn = rng.standard_normal((count, length, weight.shape[1])).astype("float32")
        inputs = torch.from_numpy(drawn).to(device) * weight.detach().float().std()
        with torch.no_grad():
            shape = self._logits(inputs).shape
        targets = torch.from_numpy(rng.standard_normal(shape).astype("float32")).to(device)
        return {"inputs": inputs, "targets": targets, "factor": torch.zeros((), device=device)}

    def scaled(self, synthetic: Tensors, adapter: Tensors, length: float) -> Tensors:
        """Return the examples with the factor by which the adapter's gradient has a length."""
        start = {name: tensor.detach().requires_grad_() for name, tensor in adapter.items()}
        loss = self(start, synthetic)
        slopes = torch.autograd.grad(loss, list(start.values()), allow_unused=True)
        squares = sum(float(own.square().sum()) for own in slopes if own is not None)
        if not squares or not length:
            return synthetic
        factor = synthetic["factor"] + math.log(length / math.sqrt(squares))
        return {**synthetic, "factor": factor}

    def __call__(self, adapter: Tensors, synthetic: Tensors) -> Tensor:
        """Return the loss; it is differentiable by both."""
        put_back = self.model.as_it_is()
        self.model.hold(adapter)  # type: ignore[arg-type]
        try:
            logits = self._logits(synthetic["inputs"]).float()
        finally:
            put_back()
        targets = torch.softmax(synthetic["targets"], -1)
        entropy = -(targets * torch.log_softmax(logits, -1)).sum(-1).mean()
        return synthetic["factor"].exp() * entropy

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Inside, the model has no dropout."""
        was_training = self.model.model.training
        self.model.model.eval()
        try:
            yield
        finally:
            self.model.model.train(was_training)

    def _logits(self, inputs: Tensor) -> Tensor:
        rows, length, _ = inputs.shape
        mask = torch.ones(rows, length, dtype=torch.int64, device=inputs.device)
        self.model.count(rows, length, length)
        anyone: Any = self.model.model
        dtype = anyone.get_input_embeddings().weight.dtype
        logits: Tensor = anyone(inputs_embeds=inputs.to(dtype), attention_mask=mask).logits
        return logits
