"""Gradients of each unit of privacy (a row, a pair, a person's rows), not of the batch as a whole.

Two ways. Where a unit is read by itself, its gradient is autograd's. Where several may be read at a time,
and LoRA's two factors of linear layers are all that is trained, one pass reads several rows: a factor's
input X and the gradient dY of its output are known for each token, so the gradient of a row is dY^T X
over the row's tokens. (Computing norms alone, without the gradients, would cost more: the square of a
row's tokens a layer, in place of rank times width.) Where anything else is trained (heads, DoRA's
magnitudes, biases, whole layers), or a model mixes rows in a pass, each unit has passes of its own all
the same. Both ways give the same gradients but for rounding; the model itself is asked with two short
rows whether the second does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedloom.data.batch import Batch
from fedloom.errors import first_line
from fedloom.models.adapters import AdapterModel
from fedloom.models.architecture import run_on_text
from fedloom.models.lora_factors import lora_factors
from fedloom.objectives.base import Objective

RowGradients = dict[str, Tensor]
"""By name, ``(rows, ...)``: one gradient a row in place of each trained tensor."""

TOLERANCE = 1e-3
"""Difference of gradients in float32 at most, over their norm."""


class _Mixed(Exception):
    """A layer reads something else than one row of tokens for each row of the pass."""


class _Recorded:
    """The gradients of the rows of one pass, as its backward pass finds them."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.found: RowGradients = {}

    def add(self, name: str, states: Tensor, gradient: Tensor) -> None:
        """Add a factor's gradients: of its input ``(sequences, tokens, in)`` and its output's gradient.

        Sequences are as in a batch: all rows' first ones, then all rows' second ones.
        """
        if states.ndim != 3 or len(states) % self.rows:
            raise _Mixed
        own = torch.bmm(gradient.float().transpose(1, 2), states.float())
        own = own.view(-1, self.rows, *own.shape[1:]).sum(0)
        self.found[name] = self.found[name] + own if name in self.found else own


class _RowLinear(torch.autograd.Function):
    """A linear layer whose weight's gradient is recorded row by row, and not added up."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, name: str, recorded: _Recorded) -> Tensor:
        ctx.save_for_backward(states, weight)
        ctx.name, ctx.recorded = name, recorded
        return F.linear(states, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        states, weight = ctx.saved_tensors
        ctx.recorded.add(ctx.name, states, gradient)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        return (gradient.to(weight.dtype) @ weight).to(states.dtype), None, None, None


@contextmanager
def recording(factors: dict[str, nn.Module], rows: int) -> Iterator[_Recorded]:
    """Inside, these layers record the gradients of passes over so many rows."""
    recorded = _Recorded(rows)

    def forward(states: Tensor, *, layer: Any, name: str) -> Tensor:
        found: Tensor = _RowLinear.apply(states, layer.weight, name, recorded)  # type: ignore[no-untyped-call]
        return found

    for name, layer in factors.items():
        layer.forward = partial(forward, layer=layer, name=name)
    try:
        yield recorded
    finally:
        for layer in factors.values():
            del layer.forward


def reason_for_one_by_one(model: AdapterModel) -> str:
    """Return why units are read one by one, empty where several are read in one pass. Asks the model."""
    factors = lora_factors(model)
    if set(model.parameters) - factors.keys():
        return "more is trained than LoRA's two factors of linear layers, or in another way"
    if model.row_gradients is None:
        model.row_gradients = _tried(model, factors)
    return model.row_gradients


def gradients_together(
    model: AdapterModel, objective: Objective, part: Batch
) -> tuple[Tensor, RowGradients]:
    """Return the mean loss of a pass, and the gradient of each row's own loss; one pass over all rows.

    Args:
        model: Of which :func:`reason_for_one_by_one` says nothing.
        objective: Separable, as its ``for_rows()`` returns it.
        part: What the pass reads: prompts may be read once within a row, not by several.
    """
    factors = {n: own for n, own in lora_factors(model).items() if n in model.parameters}
    with recording(factors, len(part)) as recorded:
        loss = _backward(model, objective, part)
    return loss, recorded.found


def gradient_of_one(
    model: AdapterModel, objective: Objective, part: Batch
) -> tuple[Tensor, RowGradients]:
    """Return the mean loss of a pass over rows of one unit, and their gradient ``(1, ...)`` together."""
    loss = _backward(model, objective, part)
    found = {}
    for name, parameter in model.parameters.items():
        if parameter.grad is not None:
            found[name] = parameter.grad.unsqueeze(0)
            parameter.grad = None
    return loss, found


def _backward(model: AdapterModel, objective: Objective, part: Batch) -> Tensor:
    """Work out the gradient of the sum of a pass's losses, one a row; return their mean."""
    loss, _ = objective.loss(model, part, objective.statistics(model, [part]))
    (loss * len(part)).backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def _tried(model: AdapterModel, factors: dict[str, nn.Module]) -> str:
    """Return what differs where two rows are read in one pass; empty for nothing."""
    if model.device.type == "meta":
        return ""
    training, flops = model.model.training, model.flops
    model.model.eval()
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            return "" if _alike(model, factors) else "the model mixes the rows of a pass"
    except _Mixed:
        return "some layers do not read the tokens of one row after another"
    except Exception as error:  # a model's code raises whatever it likes
        return f"it raises {type(error).__name__}: {first_line(error)}"
    finally:
        model.flops = flops
        model.model.train(training)
        for parameter in model.parameters.values():
            parameter.grad = None


def _alike(model: AdapterModel, factors: dict[str, nn.Module]) -> bool:
    """Return whether rows in one pass have the gradients that each has by itself."""
    row = run_on_text(model.model.get_base_model())[0]
    ids = row.repeat(2, 1)
    mask = torch.ones_like(ids)
    ids[1, -1], mask[1, -1] = model.pad, 0
    read = {n: own for n, own in factors.items() if n in model.parameters}
    before = {n: p.detach().clone() for n, p in model.parameters.items()}
    draw = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in model.parameters.values():  # B = 0 would hide A's gradient
                noise = torch.randn(parameter.shape, generator=draw)
                parameter.add_(noise.to(parameter.device, parameter.dtype), alpha=0.05)
        with recording(read, 2) as recorded:
            _score(model, ids, mask).sum().backward()  # type: ignore[no-untyped-call]
        for place, length in enumerate(mask.sum(1).tolist()):
            for parameter in model.parameters.values():
                parameter.grad = None
            own = slice(place, place + 1)
            _score(model, ids[own, :length], mask[own, :length]).sum().backward()  # type: ignore[no-untyped-call]
            if not _equal(model, recorded.found, place):
                return False
    finally:
        with torch.no_grad():
            for name, parameter in model.parameters.items():
                parameter.copy_(before[name])
    return True


def _score(model: AdapterModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Return a number a row that all its tokens go into."""
    logits = model(input_ids=ids, attention_mask=mask).logits.float()
    if logits.ndim == 2:  # of classes
        of_class: Tensor = logits.log_softmax(-1)[:, 0]
        return of_class
    chosen: Tensor = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (chosen * mask[:, 1:]).sum(-1)


def _equal(model: AdapterModel, found: RowGradients, place: int) -> bool:
    """Return whether the gradients of one row are those that lie in the parameters."""
    apart = whole = 0.0
    for name, parameter in model.parameters.items():
        alone = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        together = found[name][place] if name in found else torch.zeros_like(parameter)
        apart += float((alone.float() - together).square().sum())
        whole += float(alone.float().square().sum())
    tolerance = TOLERANCE if model.autocast is None else 0.1
    return whole > 0 and apart <= tolerance**2 * whole
