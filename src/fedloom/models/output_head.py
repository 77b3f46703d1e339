"""The output layer of a causal model apart from what comes before it, where that is known exactly.

A language model's logits are its output layer's product with the last hidden states, which some models
scale or bound (granite, Gemma, Cohere). Whoever knows what follows the product can have the hidden states
alone and work out logits where they count, a part at a time. What a model does is asked of the model: its
output layer is stood in for by one that returns known numbers, and what comes out is compared with what
each number of its configuration would make of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.models.architecture import run_on_text
from fedloom.models.configuration import text_part
from fedloom.models.heads import PersonalHead

LARGEST = 60.0
"""Of the numbers that stand for logits: beyond what a bound leaves as it is."""

Change = Callable[[Tensor, float], Tensor]

CHANGES: tuple[Change, ...] = (
    lambda logits, number: logits * number,
    lambda logits, number: logits / number,
    lambda logits, number: torch.tanh(logits / number) * number,
)
"""What models do with the product, by a number of their configuration."""


@dataclass(frozen=True)
class OutputHead:
    """How a model's logits follow from its last hidden states.

    Attributes:
        layer: The output layer, under an adapter or with a client's own parts or neither.
        width: Logits of a position.
        change: What is done with its product, ``None`` for nothing.
        number: With which number.
    """

    layer: nn.Module
    width: int
    change: Change | None = None
    number: float = 1.0

    @property
    def trained(self) -> bool:
        """Whether any of the weights that logits depend on is trained."""
        if isinstance(self.layer, PersonalHead):
            return self.layer.trains_logits
        return any(parameter.requires_grad for parameter in self.layer.parameters())

    def logits(self, states: Tensor) -> Tensor:
        """Return ``(positions, width)`` logits for ``(positions, hidden)`` states."""
        layer = self.layer
        product: Tensor = (
            layer.read_out(states) if isinstance(layer, PersonalHead) else layer(states)
        )
        return product if self.change is None else self.change(product, self.number)

    @contextmanager
    def aside(self) -> Iterator[list[Tensor]]:
        """Inside, the model's output layer computes nothing; what it reads is put into the list."""
        with _instead(self.layer, lambda states: states[..., :1]) as read:
            yield read


@torch.no_grad()
def output_head(model: Any) -> OutputHead | None:
    """Return a causal model's output head; ``None`` where its logits follow in another way.

    Args:
        model: A Hugging Face model, inside PEFT or not, with weights; of one without, what most do is
            assumed.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        layer = inner.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    if not isinstance(layer, nn.Module) or getattr(layer, "weight", None) is None:
        return None
    weight: Any = layer.weight
    width = int(weight.shape[0])
    if weight.is_meta:
        return OutputHead(layer, width)
    was_training = inner.training
    inner.eval()  # dropout draws
    known = torch.linspace(-LARGEST, LARGEST, width, device=weight.device, dtype=weight.dtype)
    try:
        row = run_on_text(inner)
        logits = inner(input_ids=row, attention_mask=torch.ones_like(row)).logits
        with _instead(layer, lambda states: known.expand(*states.shape[:-1], width)) as read:
            found = inner(input_ids=row, attention_mask=torch.ones_like(row)).logits
        if len(read) != 1 or read[0].shape[:-1] != row.shape or found.shape != logits.shape:
            return None
        head = _like(layer, known, found[0, -1], text_part(inner.config))
        alike = head is not None and _close(head.logits(read[0][0]), logits[0])
    except Exception:  # a model's code raises whatever it likes
        return None
    finally:
        inner.train(was_training)
        if isinstance(layer, PersonalHead):
            layer.states = None
    return head if alike else None


def _like(layer: nn.Module, known: Tensor, found: Tensor, config: Any) -> OutputHead | None:
    """Return the head that makes of known products what was found."""
    if _close(known, found):
        return OutputHead(layer, len(known))
    numbers = {
        float(number)
        for number in config.to_dict().values()
        if isinstance(number, int | float) and not isinstance(number, bool) and number > 0
    }
    for number in sorted(numbers):
        for change in CHANGES:
            if _close(change(known, number), found):
                return OutputHead(layer, len(known), change, number)
    return None


def _close(one: Tensor, other: Tensor) -> bool:
    tolerance = 1e-5 if one.dtype == other.dtype == torch.float32 else 1e-2
    return one.shape == other.shape and torch.allclose(
        one.float(), other.float(), rtol=tolerance, atol=tolerance
    )


@contextmanager
def _instead(layer: Any, returned: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    read: list[Tensor] = []

    def stand_in(states: Tensor, *args: Any, **options: Any) -> Tensor:
        read.append(states)
        return returned(states)

    before = vars(layer).get("forward")
    layer.forward = stand_in
    try:
        yield read
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before
