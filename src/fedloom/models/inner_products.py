"""Inner products of what LoRA's factors A make of tokens: sums of (A x)(A x)^T, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fedloom.errors import ModelError
from fedloom.models.adapters import AdapterModel
from fedloom.tensors import Tensors

FACTOR = ".lora_A."


class InnerProducts:
    """Sums over the passes that are run while it collects; set :attr:`mask` before each.

    Attributes:
        mask: ``(rows, length)``, true on tokens and false on padding, of the pass to come.
        sums: By the name of a factor A ``(rank, rank)``, float64, on the CPU.
        tokens: Real tokens so far.
        flops: Of the products so far.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self.sums: Tensors = {}
        self.flops = 0.0
        self.tokens = 0
        self.mask = torch.zeros(0, 0, dtype=torch.bool)

    def begin(self, mask: Tensor) -> None:
        """Say which tokens of the pass to come are real."""
        self.mask = mask.bool()
        self.tokens += int(self.mask.sum())

    def add(self, name: str, made: Tensor) -> None:
        """Add what a factor made of the tokens of a pass.

        Raises:
            ModelError: The layer does not read all tokens of a row, in their order.
        """
        if made.shape[:-1] != self.mask.shape:
            raise ModelError(
                f"{name.partition(FACTOR)[0]} reads some of the tokens alone, as experts do, and inner "
                "products are of all of them; leave it out of adapter.targets"
            )
        real = made[self.mask].double()
        found = (real.T @ real).cpu()
        self.flops += 2.0 * real.numel() * real.shape[1]
        self.sums[name] = self.sums[name] + found if name in self.sums else found


@contextmanager
def collecting(model: AdapterModel) -> Iterator[InnerProducts]:
    """Inside, collect the inner products of what each factor A makes."""
    found = InnerProducts()

    def adding(name: str) -> Callable[[Any, Any, Tensor], None]:
        return lambda module, given, made: found.add(name, made)

    names = {name for name in model.parameters if FACTOR in name}
    hooks = [
        module.register_forward_hook(adding(short))
        for name, module in model.model.named_modules()
        if (short := name.replace(".default", "") + ".weight") in names
    ]
    try:
        yield found
    finally:
        model.flops += found.flops
        for hook in hooks:
            hook.remove()
