"""Gradients of rows that an attacker tries, on the model as the client was sent it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedloom.models.adapters import AdapterModel
from fedloom.models.lora_factors import lora_factors
from fedloom.tensors import Tensors
from fedloom.training.row_gradients import reason_for_one_by_one, recording


class SimulatedRows:
    """The gradients of language modelling, of some tensors; see ``Simulated`` of the inversion.

    Attributes:
        model: As the client was sent it.
        names: Of the tensors.
    """

    def __init__(self, model: AdapterModel, names: Sequence[str]) -> None:
        """Look at whether the model allows gradients of several rows from one pass."""
        self.model, self.names = model, list(names)
        self.factors = {n: own for n, own in lora_factors(model).items() if n in model.parameters}
        self.together = not reason_for_one_by_one(model)

    def of_tokens(self, tokens: Tensor, learnt: Sequence[bool]) -> Tensors:
        """Return the gradients ``(n, rows, columns)`` of rows of tokens ``(n, length)``."""
        training, flops = self.model.model.training, self.model.flops
        self.model.model.eval()
        try:
            with torch.enable_grad():
                return self._of(tokens.to(self.model.device), learnt)
        finally:
            self.model.model.train(training)
            self.model.flops = flops

    def _of(self, tokens: Tensor, learnt: Sequence[bool]) -> Tensors:
        if self.together:
            with recording(self.factors, len(tokens)) as recorded:
                self._loss(tokens, learnt).backward()  # type: ignore[no-untyped-call]
            return {n: recorded.found[n].detach().cpu() for n in self.names}
        own = [self.model.parameters[n] for n in self.names]
        each = [torch.autograd.grad(self._loss(one[None], learnt), own) for one in tokens]
        return {
            name: torch.stack(several).cpu()
            for name, several in zip(self.names, zip(*each, strict=True), strict=True)
        }

    def _loss(self, tokens: Tensor, learnt: Sequence[bool]) -> Tensor:
        """Return the sum of the losses of rows of one length."""
        places = torch.tensor(learnt[1:]).nonzero().flatten().to(tokens.device)
        read = tokens[:, :-1]  # of the last token none is predicted
        logits = self.model(input_ids=read, attention_mask=torch.ones_like(read)).logits
        scores: Tensor = logits[:, places].float().log_softmax(-1)
        return -scores.gather(-1, tokens[:, places + 1, None]).sum()
