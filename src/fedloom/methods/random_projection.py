"""A baseline that sends little: the adapter's update lies in a random subspace that a seed names.

    w = w_0 + S u,

w all n trained numbers as one vector, w_0 their start, u the d' numbers that are trained, sent and
averaged. S divides the n places into d' parts as equal as can be, at random, and has one entry in each
row, a random sign: HashedNets (Chen et al. 2015, https://arxiv.org/abs/1504.04788) with signs, trained
as the subspaces of Li et al. 2018, "Measuring the Intrinsic Dimension of Objective Landscapes",
https://arxiv.org/abs/1804.08838, which has dense Gaussian columns: these would take n d' numbers.

The estimator: u moves along S^T g, so w along S S^T g, with the expected value g over the draw of S,
and with the variance E |S S^T g - g|^2 = (n / d' - 1) |g|^2 where d' divides n: two different places
are in one part with probability (n / d' - 1) / (n - 1), and their signs are independent. S is drawn
once: no round makes up for the directions that it lacks, and with n / d' far above 1 a step goes
elsewhere than down the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fedloom.methods.bases.trained_coordinates import (
    TensorFunction,
    TrainsCoordinates,
    signed_partition,
)
from fedloom.methods.contract.method import ADAPTERS_ALONE
from fedloom.methods.declaration import averaging
from fedloom.randomness import generator
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import Tensors

SUBSPACE = "subspace"
"""Name of the coordinates u."""


class RandomProjectionSettings(NamedSettings):
    """``[method] name = "random_projection"``."""

    name: Literal["random_projection"] = "random_projection"
    dimension: int = Field(default=1024, ge=1, le=1 << 24)
    """d': numbers that are trained and sent, 4 bytes each; no more than the adapter has count."""


class RandomProjection(TrainsCoordinates):
    """Averages coordinates in a random subspace."""

    declares = averaging(
        "Random projection",
        "https://arxiv.org/abs/1804.08838",
        "adapted",
        "one signed entry in each row in place of dense Gaussian columns; on the adapter",
        travels="coordinates in a random subspace, down and up",
    )
    reveals = ADAPTERS_ALONE
    taken = ("dimension",)

    def __init__(self, settings: RandomProjectionSettings) -> None:
        """Keep the settings."""
        self.settings = settings
        self._drawn: tuple[Tensor, Tensor] | None = None

    def first(self, adapter: Tensors) -> Tensors:
        """Return zeros: nothing is moved."""
        size = sum(tensor.numel() for tensor in adapter.values())
        return {SUBSPACE: torch.zeros(min(self.settings.dimension, size))}

    def function(self, start: Tensors, seed: int, kept: Mapping[str, Tensors]) -> TensorFunction:
        """Return w_0 + S u, cut into the adapter's tensors."""
        names = sorted(start)
        shapes = [start[name].shape for name in names]
        sizes = [shape.numel() for shape in shapes]
        device = start[names[0]].device
        signs, order = (own.to(device) for own in self._subspace(sum(sizes), seed))
        before = torch.cat([start[name].flatten() for name in names])

        def moved(coordinates: Mapping[str, Tensor]) -> Tensors:
            by_part = (signs * coordinates[SUBSPACE][:, None]).flatten()
            parts = torch.split(before + by_part[order], sizes)
            found = zip(names, parts, shapes, strict=True)
            return {name: part.view(shape) for name, part, shape in found}

        return moved

    def _subspace(self, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return the signs in each part, and where among them, flattened, that of each place is."""
        if self._drawn is None or len(self._drawn[1]) != size:
            parts = min(self.settings.dimension, size)
            places, signs = signed_partition(generator(seed, SUBSPACE), size, parts)
            self._drawn = signs, torch.argsort(places.flatten())[:size]  # gaps are last
        return self._drawn
