"""Zeroth-order steps: the loss at two points along a known direction, in place of its gradient.

    g = (L(w + eps z_j) - L(w - eps z_j)) / (2 eps),    w <- w - eta g z_j

(Spall 1992, https://doi.org/10.1109/9.119632; on language models Malladi et al. 2023, "Fine-Tuning
Language Models with Just Forward Passes", https://arxiv.org/abs/2305.17333). z_j is the j-th of K
directions that a seed names. As coordinates (``coordinates.py``): w = w_0 + sum_j a_j z_j, of which one
a_j at a time is stepped. It is a driver of the one loop of steps; a step is two forward passes, without
graphs and without dropout. This file knows no federation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedloom.data.batch import Batch
from fedloom.objectives.base import Objective
from fedloom.randomness import derive_seed, portable_normals
from fedloom.tensors import Tensors
from fedloom.training.coordinates import Coordinates
from fedloom.training.results import Gradients, LocalResult, RemoteGradients, Totals
from fedloom.training.steps import (
    WITHOUT_GRAPHS,
    Training,
    count,
    finished,
    local_steps,
    step_losses,
)

SUMS = "sums"
"""Name of the coordinates a."""

SEEDS, SCALARS = "seeds", "scalars"
"""A history: of each step, j as int16, and by how much a_j moved, float32."""

Floats = NDArray[np.float32]


class ZerothOrder(Coordinates):
    """The a_j of a training, which begin at 0, and steps along one of them at a time."""

    def __init__(
        self,
        start: Floats,
        seed: int,
        epsilon: float,
        probabilities: NDArray[np.float64],
        rng: np.random.Generator,
        device: torch.device,
    ) -> None:
        """Begin.

        Args:
            start: ``(n,)`` w, which is moved in place.
            seed: Of the directions.
            epsilon: eps, above 0.
            probabilities: ``(K,)`` of the directions.
            rng: Draws them.
            device: The model's.
        """
        self.parameters = {SUMS: nn.Parameter(torch.zeros(len(probabilities), device=device))}
        self.whole, self.seed, self.epsilon = start, seed, epsilon
        self.probabilities, self.rng = probabilities, rng
        self.along: tuple[int, Floats] | None = None
        self.steps: list[tuple[int, float]] = []

    @property
    def history(self) -> Tensors:
        """Seed and scalar of each step."""
        seeds, scalars = [j for j, _ in self.steps], [scalar for _, scalar in self.steps]
        return {
            SEEDS: torch.tensor(seeds, dtype=torch.int16),
            SCALARS: torch.tensor(scalars, dtype=torch.float32),
        }

    def train(self, training: Training) -> LocalResult:
        """Carry out a training with these steps; see :class:`fedloom.training.steps.Driver`."""
        objective = training.objective.for_client(training.share.tokens.labels)

        def gradients(parts: list[Batch], totals: Totals) -> RemoteGradients:
            with training.model.evaluating():
                return self._derivative(training, objective, parts, totals)
            yield  # nobody else is needed

        plain = training.settings.model_copy(update={"optimizer": "sgd"})
        steps = local_steps(training.model, training.share, gradients, plain, **training.options)
        return finished(steps)

    def write(self, tensors: Mapping[str, nn.Parameter]) -> None:
        """Move w along the direction of the last step, and write it into the adapter's tensors."""
        if self.along is not None:
            j, z = self.along
            with torch.no_grad():
                scalar = float(self.parameters[SUMS][j])
                self.parameters[SUMS].zero_()
            self.steps.append((j, scalar))
            self.whole += np.float32(scalar) * z
            self.along = None
        put(self.whole, tensors)

    def pull_back(self, tensors: Mapping[str, nn.Parameter]) -> None:
        """Do nothing: the derivative is that of a coordinate already."""

    def _derivative(
        self, training: Training, objective: Objective, parts: list[Batch], totals: Totals
    ) -> Gradients:
        """Draw a seed, and leave the derivative along its direction as the gradient of its sum."""
        j = int(self.rng.choice(len(self.probabilities), p=self.probabilities))
        z, epsilon = direction(self.seed, j, len(self.whole)), self.epsilon
        losses = []
        for sign, known in ((1, totals), (-1, None)):
            put(self.whole + np.float32(sign * epsilon) * z, training.model.parameters)
            terms = []
            for part, term, metrics in step_losses(
                training.model, objective, parts, WITHOUT_GRAPHS
            ):
                terms.append(float(term))
                if known is not None:
                    count(known, objective, part, metrics)
            if not terms:
                return Gradients(0.0, none=True)
            losses.append(sum(terms))
        self.along = j, z
        derivative = torch.zeros_like(self.parameters[SUMS])
        derivative[j] = (losses[0] - losses[1]) / (2 * epsilon)
        self.parameters[SUMS].grad = derivative
        return Gradients(sum(losses) / 2)


def direction(seed: int, j: int, size: int) -> Floats:
    """Return z_j, ``(size,)``: the same bits on every machine."""
    return portable_normals(derive_seed(seed, f"direction {j}"), size)


def moved(
    start: Tensors, seed: int, sums: Tensor, each: Callable[[], None] = lambda: None
) -> Floats:
    """Return w_0 + sum_j a_j z_j as one vector, added up one by one: the same bits on every machine.

    Args:
        start: w_0.
        seed: Of the directions.
        sums: ``(K,)`` a.
        each: Called before each direction that is drawn; what it raises ends the work.
    """
    whole = flattened(start)
    for j in sums.nonzero().flatten().tolist():
        each()
        whole += np.float32(sums[j]) * direction(seed, j, len(whole))
    return whole


def flattened(tensors: Mapping[str, Tensor]) -> Floats:
    """Return tensors as one vector, in the order of their names."""
    parts = [tensors[name].detach().float().cpu().numpy().ravel() for name in sorted(tensors)]
    return np.concatenate(parts)


def unflattened(whole: Floats, like: Mapping[str, Tensor]) -> Tensors:
    """Undo :func:`flattened`: return tensors of the names and shapes of ``like`` on the CPU."""
    names, found = sorted(like), {}
    parts = torch.split(torch.from_numpy(whole), [like[name].numel() for name in names])
    for name, part in zip(names, parts, strict=True):
        found[name] = part.view(like[name].shape).to(like[name].dtype)
    return {name: found[name] for name in like}


def put(whole: Floats, tensors: Mapping[str, nn.Parameter]) -> None:
    """Write a vector into parameters."""
    with torch.no_grad():
        for name, tensor in unflattened(whole, tensors).items():
            tensors[name].copy_(tensor)


def probabilities(magnitudes: Tensor) -> NDArray[np.float64]:
    """Return ``(K,)`` softmax of the mean |g| of each seed, brought to [0, 1]."""
    means = magnitudes.double().numpy()
    spread = np.ptp(means)
    whole = np.exp((means - means.min()) / spread if spread else np.zeros_like(means))
    return np.asarray(whole / whole.sum())
