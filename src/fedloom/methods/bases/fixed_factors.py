"""Small matrices between two fixed factors: W + s B R A, of which R alone is trained (Fed-SB).

R may be one r x r matrix, or several on the diagonal of one (RAVAN's heads,
https://arxiv.org/abs/2506.05568). PEFT knows no R: an adapter has R A in A's place and B as it is,
which is the same product.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedloom.aggregation.lora import A, B, factor_pairs, without_factors
from fedloom.methods.bases.trained_coordinates import (
    TensorFunction,
    TrainsCoordinates,
    signed_partition,
)
from fedloom.methods.contract.checks import require_linear_layers
from fedloom.methods.contract.method import ServerSide
from fedloom.objectives.sft import SFT
from fedloom.randomness import generator
from fedloom.tensors import Tensors
from fedloom.training.layout import budget_of
from fedloom.training.passes import Layout
from fedloom.training.results import Totals
from fedloom.training.steps import accumulate_gradients

R = ".lora_R."
"""What the name of a matrix has in place of A's ``.lora_A.``."""


class FixedFactors(TrainsCoordinates):
    """Averages R between factors that are random here; a subclass may have others.

    Attributes:
        name: In ``[method]``, for errors.
        heads: Matrices on R's diagonal, each ``(r / heads, r / heads)``; 0 for one without a dimension.
    """

    name: str

    two_factors = True
    no_start = (
        "it has fixed factors of its own; merge the adapter into its model (fedloom export) and give "
        "that as model.path"
    )
    heads = 0

    def __init__(self, settings: Any) -> None:
        """Have no factors yet."""
        self._random: Tensors = {}

    def setup(self, server: ServerSide) -> None:
        """Check that the factors are of linear layers."""
        super().setup(server)
        require_linear_layers(server.model.stacked, f'method.name = "{self.name}"')

    def first(self, adapter: Tensors) -> Tensors:
        """Return R = 0, and what is no factor as it is, such as a classification head."""
        found = {}
        for a in factor_pairs(adapter):
            size = len(adapter[a]) // max(1, self.heads)
            shape = (self.heads, size, size) if self.heads else (size, size)
            found[matrix_name(a)] = torch.zeros(shape)
        return found | without_factors(adapter)

    def function(self, start: Tensors, seed: int, kept: Mapping[str, Tensors]) -> TensorFunction:
        """Return R A in place of A; B is no function of R."""
        fixed = self.factors(start, seed, kept)
        device = next(iter(start.values())).device
        down = {name: tensor.to(device) for name, tensor in fixed.items() if A in name}

        def moved(coordinates: Mapping[str, Tensor]) -> Tensors:
            others = {n: t for n, t in coordinates.items() if R not in n}
            return {a: between(coordinates[matrix_name(a)], t) for a, t in down.items()} | others

        return moved

    def frozen(self, names: Collection[str]) -> list[str]:
        """Freeze B."""
        return [name for name in names if B in name]

    def fixed(self, start: Tensors, seed: int, kept: Mapping[str, Tensors]) -> Tensors:
        """Return B."""
        return {n: t for n, t in self.factors(start, seed, kept).items() if B in n}

    def function_flops(self, adapter: Tensors) -> float:
        """Return those of R A over all layers."""
        heads = max(1, self.heads)
        return sum(
            2.0 * len(adapter[a]) * adapter[a].numel() / heads for a in factor_pairs(adapter)
        )

    def factors(self, start: Tensors, seed: int, kept: Mapping[str, Tensors]) -> Tensors:
        """Return A and B; here random ones from the seed."""
        self._random = self._random or random_factors(start, seed)
        return self._random


def random_factors(adapter: Tensors, seed: int) -> Tensors:
    """Return random factors in the shapes of an adapter's: rows of A, and columns of B, orthonormal.

    Each row has the inputs of one part of a random division of all, with equal weights and random signs
    (:func:`signed_partition`): the same bits on every machine, which no decomposition promises. Rows
    beyond the width of a layer begin with a division of their own.
    """
    found = {}
    for a, b in factor_pairs(adapter).values():
        rank, inputs = adapter[a].shape
        outputs = adapter[b].shape[0]
        found[a] = _orthonormal(seed, a, rank, inputs)
        found[b] = _orthonormal(seed, b, rank, outputs).T.contiguous()
    return found


def _orthonormal(seed: int, name: str, rows: int, width: int) -> Tensor:
    """Return ``(rows, width)`` float32."""
    rng, blocks = generator(seed, f"fixed factor {name}"), []
    for begin in range(0, rows, width):
        parts = min(width, rows - begin)
        places, signs = signed_partition(rng, width, parts)
        norms = signs.square().sum(1, keepdim=True).sqrt()
        block = torch.zeros(parts, width + 1)
        block.scatter_(1, places, signs / norms)
        blocks.append(block[:, :width])
    return torch.cat(blocks)


def between(matrices: Tensor, below: Tensor) -> Tensor:
    """Return R A, for R with one matrix or several of one size on its diagonal.

    Args:
        matrices: ``(size, size)`` or ``(heads, size, size)``.
        below: A, ``(heads * size, inputs)``.
    """
    size = matrices.shape[-1]
    return (matrices @ below.view(*matrices.shape[:-2], size, -1)).reshape(below.shape)


def matrix_name(a: str) -> str:
    """Return the name of the matrix before a factor A."""
    return a.replace(A, R)


def singular_factors(weights: Tensors, like: Tensors) -> Tensors:
    """Return the first singular vectors of matrices as factors, right ones as A and left ones as B.

    Args:
        weights: ``(outputs, inputs)`` by layer.
        like: An adapter: names, widths and ranks. Beyond a layer's own width factors are 0.
    """
    found = {}
    for a, b in factor_pairs(like).values():
        left, _, right = torch.linalg.svd(weights[a.partition(A)[0]], full_matrices=False)
        rank = min(len(like[a]), len(right))
        found[a], found[b] = torch.zeros_like(like[a]), torch.zeros_like(like[b])
        found[a][:rank], found[b][:, :rank] = right[:rank], left[:, :rank]
    return found


def first_gradient(server: ServerSide) -> Tensors:
    """Return the gradient of the weights under LoRA's factors over all public rows, before any training.

    The loss is that of their completions' tokens or, of classified texts, of their labels.
    """
    model, public = server.model, server.public
    assert public is not None, "assembly gives public rows to methods that need them"
    share = public.share
    objective = SFT() if server.objective.head == "causal" else server.objective
    objective = objective.for_client(share.tokens.labels)
    parts = Layout(model, share, budget_of(server.training, model)).batches(np.arange(len(share)))
    with model.base.with_gradients() as gradients:
        accumulate_gradients(model, objective, parts, Totals(), 0)
        for parameter in model.parameters.values():
            parameter.grad = None
        return gradients()
