"""Rules of model merging, on LoRA's factors or on their products. Pure.

================  ====================================================================================
task arithmetic   start + scale * mean of changes (Ilharco et al. 2022, https://arxiv.org/abs/2212.04089)
TIES              of each change the largest entries are kept; the sign of their sum is elected; the mean
                  is over the entries of that sign (Yadav et al. 2023, https://arxiv.org/abs/2306.01708)
DARE              entries are zeroed at random and the others divided by the share that is kept; then the
                  mean is taken (Yu et al. 2023, https://arxiv.org/abs/2311.03099)
KnOTS             TIES in coordinates that all changes have in common: with [D_1 ... D_K] = U S V^T, of
                  the blocks S V_k^T (Stoica et al. 2024, https://arxiv.org/abs/2410.19735)
================  ====================================================================================

A change D_k is what a client made less what it started from: of each factor apart ("factors"), or of a
layer's product B A ("product"), whose result is cut to a rank by a singular value decomposition. Four
things differ from the published code, on purpose. TIES keeps round(density * n) entries of each tensor
(there: one more, of all tensors together), and a sum that is exactly 0 elects no sign (there: the
majority's). Weights are normalised over the entries that count (PEFT divides by their number, which
makes results smaller by about 1 / K). ``scale`` multiplies a mean, so 1 is FedAvg's step, and the papers'
lambda times the sum of K changes is scale = K lambda. KnOTS keeps singular values that float32 can tell
from 0 beside the adapters' products (there: those above 1e-5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fedloom.aggregation.lora import factor_pairs, nearest, product_error
from fedloom.aggregation.means import weighted_mean
from fedloom.tensors import Tensors

MergeRule = Literal["task_arithmetic", "ties", "dare", "knots"]

MERGE_RULES: tuple[str, ...] = get_args(MergeRule)

Space = Literal["factors", "product"]

DENSITY = {"ties": 0.2, "knots": 0.2, "dare": 0.8}
"""Share of entries kept by default: TIES' largest fifth, DARE's p = 0.2 for merging large models."""

Draws = Callable[[int], np.random.Generator]
"""Place of a client among the updates to its random numbers."""


@dataclass(frozen=True)
class Merging:
    """How changes are merged.

    Attributes:
        rule: The rule.
        density: Share of entries that is kept, in (0, 1]; of TIES and KnOTS the largest, of DARE random
            ones. ``None``: :data:`DENSITY`.
        scale: Times the merged change, above 0.
        space: Whether changes are of factors or of products; KnOTS has products alone.
    """

    rule: MergeRule
    density: float | None = None
    scale: float = 1.0
    space: Space = "factors"

    @property
    def share(self) -> float:
        """Share of entries that is kept."""
        return DENSITY.get(self.rule, 1.0) if self.density is None else self.density

    @property
    def of_products(self) -> bool:
        """Whether changes are of products."""
        return self.space == "product" or self.rule == "knots"


def trimmed(change: Tensor, density: float) -> Tensor:
    """Return a change with its max(1, round(density * n)) largest entries, and 0 for the others.

    They are largest by absolute value; of entries of one size the first ones are kept.
    """
    sizes = change.abs().flatten()
    count = max(1, round(density * sizes.numel()))
    if count >= sizes.numel():
        return change
    least = sizes.kthvalue(sizes.numel() - count + 1).values
    above, equal = sizes > least, sizes == least
    kept = above | (equal & (equal.cumsum(0) <= count - above.sum()))
    return torch.where(kept.view_as(change), change, 0.0)


def ties(changes: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Return the TIES merge of changes of one shape, float64.

    Args:
        changes: One a client.
        weights: One each, at least 0 and not all 0; they count in the elected sign and in the mean.
        density: Share of each change that is kept, in (0, 1].
    """
    kept = torch.stack([trimmed(change.double(), density) for change in changes])
    parts = torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * (kept.ndim - 1))
    elected = (parts * kept).sum(0).sign()
    counting = parts * ((kept.sign() == elected) & (elected != 0))
    whole = counting.sum(0)
    return (counting * kept).sum(0) / torch.where(whole > 0, whole, 1.0)


def dare(change: Tensor, density: float, rng: np.random.Generator) -> Tensor:
    """Return a change of which each entry stays with probability ``density``, divided by it; float64.

    Its mean over many draws is the change; the variance of an entry is d^2 (1 - density) / density.
    """
    if density >= 1:
        return change.double()
    kept = torch.from_numpy(rng.random(tuple(change.shape)) < density)
    return torch.where(kept, change.double() / density, 0.0)


def merged_change(
    changes: Sequence[Tensor], weights: Sequence[float], own: Merging, draws: Draws
) -> Tensor:
    """Return what the rule makes of the changes of one tensor, without the scale; float64.

    KnOTS is TIES here, whose changes are coordinates.
    """
    if own.rule in ("ties", "knots"):
        return ties(changes, weights, own.share)
    if own.rule == "dare":
        changes = [dare(change, own.share, draws(k)) for k, change in enumerate(changes)]
    shares = [weight / sum(weights) for weight in weights]
    return torch.stack([p * d.double() for p, d in zip(shares, changes, strict=True)]).sum(0)


def merged(
    updates: Sequence[Tensors],
    weights: Sequence[float],
    start: Tensors | None,
    own: Merging,
    draws: Draws,
    rank: int | None = None,
) -> tuple[Tensors, float | None]:
    """Return the adapter that a rule makes of several, and what cutting it to its rank loses.

    Args:
        updates: One a client; of any ranks in product space, else with the same shapes.
        weights: One a client, at least 0, not all 0.
        start: What all began with; ``None``: zeros, and what is no factor is averaged. In factor space
            the scale is then of B alone, so that products have it once; and only the mean is of use, as
            all began with one A, whose entries TIES and DARE would drop.
        own: The rule.
        draws: Random numbers of each client, for DARE; the tensors draw in their order.
        rank: Of the result in product space (default: that of the first update).

    Returns:
        The adapter, in the dtypes of the first update, and over all layers ||B A - W||_F / ||W||_F for
        the products W that the rule made; ``None`` in factor space, or where W is 0.

    Raises:
        ValueError: No updates, lengths that differ, or weights without a positive sum.
    """
    if not updates or len(updates) != len(weights) or min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(f"{len(updates)} updates with weights {list(weights)}")
    random = [draws(place) for place in range(len(updates))] if own.rule == "dare" else []
    layers = factor_pairs(updates[0])
    pairs = layers if own.of_products else {}
    factors = {name for pair in layers.values() for name in pair}
    whole: Tensors = {}
    found: Tensors = {}
    for name, first in updates[0].items():
        if name in pairs:
            a, b = pairs[name]
            origin = None if start is None else (start[a], start[b])
            both = [(update[a], update[b]) for update in updates]
            whole[a], whole[b] = _product(both, weights, origin, own, random.__getitem__)
        elif start is None and name not in factors:
            found |= weighted_mean([{name: update[name]} for update in updates], weights)
        elif not pairs or name not in factors:
            begun = torch.zeros_like(first) if start is None else start[name]
            changes = [update[name].double() - begun.double() for update in updates]
            scale = 1.0 if start is None and name in layers else own.scale
            moved = scale * merged_change(changes, weights, own, random.__getitem__)
            found[name] = (begun.double() + moved).to(first.dtype)
    if not pairs:
        return found, None
    size = rank or len(updates[0][next(iter(pairs))])
    before = start if start is not None and len(start[next(iter(pairs))]) == size else None
    cut = {name: t.to(updates[0][name].dtype) for name, t in nearest(whole, size, before).items()}
    result = {name: cut[name] if name in cut else found[name] for name in updates[0]}
    return result, product_error(result, [whole], [1.0])


Pair = tuple[Tensor, Tensor]
"""A ``(rank, inputs)`` and B ``(outputs, rank)`` of a layer."""


def _product(
    layers: Sequence[Pair],
    weights: Sequence[float],
    start: Pair | None,
    own: Merging,
    draws: Draws,
) -> Pair:
    """Return A and B, of any rank, whose product the rule makes of a layer's products; float64."""
    wide = [(a.double(), b.double()) for a, b in layers]
    origin = [] if start is None else [(start[0].double(), start[1].double())]
    if own.rule == "knots":
        up, down = knots(wide, weights, own, origin)
    elif own.rule == "task_arithmetic":
        shares = [weight / sum(weights) for weight in weights]
        down = torch.cat([*(a for a, _ in wide), *(a for a, _ in origin)], 0)
        ups = [p * b for p, (_, b) in zip(shares, wide, strict=True)]
        up = torch.cat([*ups, *(-b for _, b in origin)], 1)
    else:
        begun = sum((b @ a for a, b in origin), torch.zeros((), dtype=torch.float64))
        dense = merged_change([b @ a - begun for a, b in wide], weights, own, draws)
        eye = torch.eye(min(dense.shape), dtype=torch.float64)
        up, down = (dense, eye) if dense.shape[0] >= dense.shape[1] else (eye, dense)
    return (
        torch.cat([down, *(a for a, _ in origin)], 0),
        torch.cat([own.scale * up, *(b for _, b in origin)], 1),
    )


def knots(
    layers: Sequence[Pair], weights: Sequence[float], own: Merging, origin: Sequence[Pair] = ()
) -> Pair:
    """Return B and A of the KnOTS merge of a layer's changes B_k A_k - B_0 A_0; no product is formed.

    With Q R the decomposition of [B_1 ... B_K B_0], all changes are Q times small matrices, and the left
    singular vectors of those side by side give the common coordinates.

    Args:
        layers: A and B of each client, float64.
        weights: One a client.
        own: Has the density; with the rule ``"task_arithmetic"`` the mean is taken.
        origin: A and B that all began with, or nothing.
    """
    basis, small = torch.linalg.qr(torch.cat([*(b for _, b in layers), *(b for _, b in origin)], 1))
    widths = [len(a) for a, _ in [*layers, *origin]]
    blocks = small.split(widths, 1)
    products = [block @ a for block, (a, _) in zip(blocks, [*layers, *origin], strict=True)]
    changes = products[: len(layers)]
    if origin:
        changes = [product - products[-1] for product in changes]
    left, values, _ = torch.linalg.svd(torch.cat(changes, 1), full_matrices=False)
    largest = max(float(product.norm()) for product in products)
    left = left[:, values > torch.finfo(torch.float32).eps * largest]
    if not left.shape[1]:  # nothing has changed
        return basis[:, :1], torch.zeros(1, layers[0][0].shape[1], dtype=torch.float64)
    coordinates = [left.T @ change for change in changes]
    return basis @ left, merged_change(coordinates, weights, own, _no_draws)


def _no_draws(place: int) -> np.random.Generator:
    raise ValueError("KnOTS draws nothing")
