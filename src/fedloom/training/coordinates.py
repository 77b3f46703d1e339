"""Coordinates: other numbers, mostly fewer, that the trained tensors are a function of.

A method that trains coordinates gives them to the loop of steps, which hands them to the optimizer in
place of the adapter's tensors. Source of the idea: Li et al. 2018, "Measuring the Intrinsic Dimension
of Objective Landscapes", https://arxiv.org/abs/1804.08838. This file knows no method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fedloom.tensors import Tensors


class Coordinates:
    """Trained numbers, of which the adapter's tensors are a differentiable function.

    Attributes:
        parameters: The coordinates by name, on the model's device: what the optimizer changes.
    """

    def __init__(
        self,
        start: Tensors,
        function: Callable[[Mapping[str, Tensor]], Tensors],
        device: torch.device,
    ) -> None:
        """Copy the coordinates that a training begins with.

        Args:
            start: Coordinates by name.
            function: Returns tensors of the adapter, by name, from coordinates by name. Those that it
                does not return are as they are.
            device: The model's.
        """
        self.parameters = {
            name: nn.Parameter(tensor.detach().to(device, copy=True))
            for name, tensor in start.items()
        }
        self.function = function
        self._tensors: Tensors = {}

    def write(self, tensors: Mapping[str, nn.Parameter]) -> None:
        """Write what the coordinates stand for into the adapter's tensors, and drop their gradients."""
        with torch.enable_grad():
            self._tensors = self.function(self.parameters)
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensors[name].copy_(tensor)
        for parameter in tensors.values():
            parameter.grad = None

    def pull_back(self, tensors: Mapping[str, nn.Parameter]) -> None:
        """Turn the gradients of the adapter's tensors into those of the coordinates (chain rule)."""
        given = {
            name: gradient for name in self._tensors if (gradient := tensors[name].grad) is not None
        }
        if given:
            torch.autograd.backward([self._tensors[name] for name in given], [*given.values()])

    def read(self) -> Tensors:
        """Return copies of the coordinates on the CPU."""
        return {n: p.detach().to("cpu", copy=True) for n, p in self.parameters.items()}
