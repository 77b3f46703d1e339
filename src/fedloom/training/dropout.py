"""Dropout that belongs to a client, a round and a step, wherever they are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fedloom.models.adapters import AdapterModel
from fedloom.training.results import Gradients, RemoteGradients


class DropoutStream:
    """One party's random numbers for dropout, apart from everybody else's in this process."""

    def __init__(self, seed: int, model: AdapterModel) -> None:
        """Start at ``seed``; nothing is drawn from it but inside :meth:`drawing`."""
        self.model = model
        self.devices = [model.device] if model.device.type == "cuda" else []
        self.seed: int | None = seed
        self.states: list[Tensor] = []

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw from this stream and train; afterwards the process's own generators stand as before."""
        with torch.random.fork_rng(devices=self.devices):
            if self.seed is not None:
                if self.model.device.type == "cpu":
                    # torch.manual_seed notes the call stack for every kind of device that is absent
                    torch.default_generator.manual_seed(self.seed)
                else:
                    torch.manual_seed(self.seed)
                self.seed = None
            else:
                torch.set_rng_state(self.states[0])
                for device, state in zip(self.devices, self.states[1:], strict=True):
                    torch.cuda.set_rng_state(state, device)
            if not self.model.model.training:
                self.model.model.train()
            yield
            self.states = [torch.get_rng_state()]
            self.states += [torch.cuda.get_rng_state(device) for device in self.devices]

    def over(self, steps: RemoteGradients) -> RemoteGradients:
        """Run a generator with this stream, giving the process's own back wherever it waits."""
        sent: Any = None
        while True:
            with self.drawing():
                try:
                    given = steps.send(sent)
                except StopIteration as stop:
                    found: Gradients = stop.value
                    return found
            sent = yield given
