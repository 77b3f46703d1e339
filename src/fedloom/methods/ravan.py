"""RAVAN: several frozen pairs of factors beside a layer, each with a small matrix that is trained.

    y = W x + s sum_i t_i B_i H_i A_i x,    H_i <- sum_k p_k t_ik H_ik,  t_i <- 1,

for i = 1..h, with B_i and A_i fixed and equal everywhere, H_i of (r / h) x (r / h) numbers that begin
with 0, and scales t_i that begin with 1 in every round. A client trains both and sends t_i H_i, of
which the mean is exact with any weights. With N numbers a layer the rank is sqrt(N h); with one head
and no scales it is Fed-SB. Source: Raje et al. 2025, "Ravan: Multi-Head Low-Rank Adaptation for
Federated Fine-Tuning", https://arxiv.org/abs/2506.05568; a reconstruction after its abstract and third
parties' notes, as no official code was found.

The rank of ``[adapter]`` is that of all heads together. Bases are orthonormal over all heads, from the
seed, so that none is sent. All clients train all heads; the paper's choice of some heads for weak
clients is not there. A saved adapter has B = [B_1 ... B_h] and the stack of H_i A_i as A: ordinary
LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fedloom.methods.bases.fixed_factors import FixedFactors, R
from fedloom.methods.bases.trained_coordinates import TensorFunction
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import ADAPTERS_ALONE
from fedloom.methods.declaration import averaging
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import Tensors

SCALE = ".lora_t."
"""What the name of a layer's scales has in place of R's."""


class RavanSettings(NamedSettings):
    """``[method] name = "ravan"``."""

    name: Literal["ravan"] = "ravan"
    heads: int = Field(default=4, ge=1)
    """Pairs of factors beside a layer, h; adapter.rank is a multiple of it."""
    scales: bool = True
    """Whether a scale of each head is trained too."""


class Ravan(FixedFactors):
    """Averages the matrices of all heads."""

    declares = averaging(
        "RAVAN",
        "https://arxiv.org/abs/2506.05568",
        "reconstructed",
        "orthonormal bases from the seed; all clients train all heads",
        travels="h matrices of (r / h) x (r / h) numbers a layer, down and up",
    )
    reveals = ADAPTERS_ALONE
    taken = ("heads", "scales")
    name = "ravan"

    def __init__(self, settings: RavanSettings) -> None:
        """Keep how many heads there are."""
        super().__init__(settings)
        self.heads, self.scales = settings.heads, settings.scales

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also that the rank cannot be divided among the heads."""
        yield from super().check(view)
        heads = view.method.heads
        if view.adapter is not None and view.adapter.rank % heads:
            rank = view.adapter.rank
            yield (
                f"adapter.rank = {rank} is that of all heads together, and no multiple of method.heads "
                f"= {heads}: set it to {heads * max(1, round(rank / heads))}"
            )

    def trained(self, coordinates: Tensors) -> Tensors:
        """Return also the scales, which begin with 1."""
        if not self.scales:
            return coordinates
        ones = {n.replace(R, SCALE): torch.ones(len(t)) for n, t in coordinates.items() if R in n}
        return {**coordinates, **ones}

    def answer(self, coordinates: Tensors) -> Tensors:
        """Return the products of scales and matrices."""
        return _scaled(coordinates)

    def function(self, start: Tensors, seed: int, kept: Mapping[str, Tensors]) -> TensorFunction:
        """Return the stack of t_i H_i A_i in place of A."""
        plain = super().function(start, seed, kept)
        return lambda coordinates: plain(_scaled(coordinates))


def _scaled(coordinates: Mapping[str, Tensor]) -> Tensors:
    """Return t_i H_i where there are scales, and all else as it is, without them."""
    found = {}
    for name, tensor in coordinates.items():
        scales = coordinates.get(name.replace(R, SCALE)) if R in name else None
        if SCALE not in name:
            found[name] = tensor if scales is None else scales.view(-1, 1, 1) * tensor
    return found
