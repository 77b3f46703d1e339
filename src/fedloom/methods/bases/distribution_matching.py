"""Synthetic inputs that come to look to nearby models as rows do, and a bound on training on them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedloom.data.batch import Batch
from fedloom.objectives.classification import classification_loss
from fedloom.objectives.matching import class_means, matching_loss
from fedloom.randomness import generator
from fedloom.tensors import Tensors
from fedloom.training.coordinates import Coordinates
from fedloom.training.results import Gradients, LocalResult, RemoteGradients, Totals
from fedloom.training.steps import Training, count, finished, local_steps
from fedloom.training.synthetic_inputs import (
    SYNTHETIC_INPUTS,
    SyntheticRows,
    last_states,
    read_inputs,
)
from fedloom.wire.messages import Reply

CLASSES = "classes"
"""Tensor of a reply: ``(classes,)`` uint8, 1 where the client has rows of the class."""

MATCHING = "matching_loss"
"""Metric: what is minimised over synthetic rows, the mean over steps."""


@dataclass
class Matching:
    """Makes the steps of one training of synthetic inputs; the adapter stands as it was afterwards.

    Attributes:
        rows: The inputs, ``(classes, rows of a class, positions, width)``, in units of ``scale``.
        scale: Standard deviation of embeddings.
        adapter: The model's trained tensors, which are frozen meanwhile.
        radius: Distance of drawn models from it at most.
    """

    rows: Coordinates
    scale: float
    adapter: Mapping[str, nn.Parameter]
    radius: float

    def train(self, training: Training) -> LocalResult:
        """Carry out a training; the loss it reports is that of the rows under the drawn models."""
        model, options = training.model, training.options
        plain = {"weight_decay": 0.0, "max_grad_norm": 0.0, "head_learning_rate": None}
        settings = training.settings.model_copy(update=plain)
        rng = generator(options["seed"], "nearby models", options["client"], options["round"])
        start = {name: own.detach().clone() for name, own in self.adapter.items()}
        was_training = model.model.training
        model.model.eval()

        def gradients(parts: list[Batch], totals: Totals) -> RemoteGradients:
            self._draw(start, rng)
            return self._match(training, parts, totals)
            yield  # nobody else is needed

        try:
            return finished(local_steps(model, training.share, gradients, settings, **options))
        finally:
            model.model.train(was_training)
            self._write(start)

    def _draw(self, start: Tensors, rng: np.random.Generator) -> None:
        """Move the adapter in a random direction, up to the radius."""
        drawn = {n: torch.from_numpy(rng.standard_normal(t.shape)) for n, t in start.items()}
        length = math.sqrt(sum(float(own.square().sum()) for own in drawn.values()))
        far = self.radius * rng.random() / max(length, 1e-12)
        self._write({n: t + (far * drawn[n]).to(t) for n, t in start.items()})

    def _write(self, tensors: Tensors) -> None:
        with torch.no_grad():
            for name, own in self.adapter.items():
                own.copy_(tensors[name])

    def _match(self, training: Training, parts: list[Batch], totals: Totals) -> Gradients:
        """Leave the gradients of the matching loss of a batch's classes in the inputs."""
        model, features, labels, shown = training.model, [], [], []
        for part in parts:
            assert part.labels is not None, "labelled examples carry labels"
            ids, mask = part.sequences.input_ids, part.sequences.attention_mask
            with torch.no_grad():
                output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
                loss, metrics = classification_loss(output.logits, part.labels)
                features.append(torch.cat([last_states(output, mask), output.logits.float()], 1))
            labels.append(part.labels)
            shown.append((part, {"loss": loss, **metrics}))
        inputs = self.rows.parameters[SYNTHETIC_INPUTS]
        real, counts = class_means(torch.cat(features), torch.cat(labels), len(inputs))
        own = inputs[counts > 0] * self.scale
        states, logits = read_inputs(model, own.flatten(0, 1))
        synthetic = torch.cat([states, logits], 1).view(*own.shape[:2], -1).mean(1)
        apart = matching_loss(real[counts > 0], synthetic)
        apart.backward()  # type: ignore[no-untyped-call]
        for part, metrics in shown:
            found = {**metrics, MATCHING: apart.detach()}
            count(totals, training.objective, part, found)
        return Gradients(float(apart.detach()))


@dataclass
class Edge:
    """Keeps a training within a distance of its start, and ends it there.

    Attributes:
        start: The tensors before the first step.
        radius: The distance.
        reached: Whether a step has led there.
    """

    start: Tensors
    radius: float
    reached: bool = False

    def keep_within(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put parameters that are farther away back to the distance; for ``after_step``."""
        moved = {n: own.detach() - self.start[n] for n, own in parameters.items()}
        far = math.sqrt(sum(float(own.double().square().sum()) for own in moved.values()))
        if far < self.radius:
            return
        self.reached = True
        with torch.no_grad():
            for name, own in parameters.items():
                own.copy_(self.start[name] + moved[name] * (self.radius / far))

    def until_reached(self, batches: Iterator[list[Batch]], steps: int) -> Iterator[list[Batch]]:
        """Yield so many batches at most, none after the distance has been reached."""
        for _ in range(steps):
            if self.reached:
                return
            yield next(batches)


def together(replies: Sequence[Reply]) -> SyntheticRows:
    """Return the synthetic rows of all clients, each client counting by its rows.

    Args:
        replies: With :data:`SYNTHETIC_INPUTS` and :data:`CLASSES`, one class at least.
    """
    inputs, labels, weights = [], [], []
    for reply in replies:
        present = reply.payload.tensors[CLASSES].bool()
        own: Tensor = reply.payload.tensors[SYNTHETIC_INPUTS][present]
        inputs.append(own.flatten(0, 1))
        labels.append(torch.nonzero(present)[:, 0].repeat_interleave(own.shape[1]))
        each = reply.payload.numbers["examples"] / len(labels[-1])
        weights.append(torch.full((len(labels[-1]),), each))
    return SyntheticRows(torch.cat(inputs), torch.cat(labels), torch.cat(weights))
