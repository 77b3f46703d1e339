"""The span test on updates of a step: which factor tells what, at which rank, and what noise hides."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fedloom.evaluation.privacy_audit.span import (
    Candidates,
    distances,
    recover_from_inputs,
    recover_tokens,
    row_space,
)

WIDTH, VOCABULARY = 256, 5000
EXACT = 1e-6


@dataclass(frozen=True)
class Step:
    """A step of a layer with LoRA: its gradients, and what it read.

    Attributes:
        full: ``(width, width)`` of the weight.
        a: ``(rank, width)``.
        b: ``(width, rank)``.
        factor: A itself.
        tokens: What was trained on.
    """

    full: Tensor
    a: Tensor
    b: Tensor
    factor: Tensor
    tokens: list[int]


@pytest.fixture(scope="module")
def embeddings() -> Tensor:
    """What the layer reads for each token."""
    return torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0)).double()


def vocabulary(embeddings: Tensor) -> Candidates:
    """Return what is read, the same at every place."""
    return Candidates(embeddings[:, None])


def step(embeddings: Tensor, rank: int, batch: int) -> Step:
    """Return the gradients of a step in which B is not 0."""
    rng = torch.Generator().manual_seed(rank * 1000 + batch)
    tokens = torch.randperm(len(embeddings), generator=rng)[:batch]
    inputs, outward = embeddings[tokens], torch.randn(batch, WIDTH, generator=rng).double()
    a = torch.randn(rank, WIDTH, generator=rng).double() / WIDTH**0.5
    b = torch.randn(WIDTH, rank, generator=rng).double() / rank**0.5
    full = outward.T @ inputs
    return Step(full, b.T @ full, full @ a.T, a, tokens.tolist())


def rates(update: Tensor, candidates: Tensor, tokens: list[int]) -> tuple[float, float]:
    """Return the true and the false positive rate of the test with a threshold."""
    space = row_space(update, EXACT)
    near = distances(candidates, space.directions[: space.rank]) < EXACT
    inside = torch.zeros(len(candidates), dtype=torch.bool)
    inside[tokens] = True
    return float(near[inside].double().mean()), float(near[~inside].double().mean())


TABLE = [
    (8, 4, (1, 0), (1, 0), (1, 0)),
    (8, 8, (1, 0), (1, 0), (1, 1)),
    (8, 16, (1, 0), (0, 0), (1, 1)),
    (64, 16, (1, 0), (1, 0), (1, 0)),
    (64, 64, (1, 0), (1, 0), (1, 1)),
    (64, 250, (1, 0), (0, 0), (1, 1)),
    (256, 250, (1, 0), (1, 0), (1, 0)),
]
"""Rank, tokens, and true and false positive rates of the whole weight, of dA and of dB."""


@pytest.mark.parametrize(("rank", "batch", "full", "of_a", "of_b"), TABLE)
def test_which_tensor_tells(
    embeddings: Tensor,
    rank: int,
    batch: int,
    full: tuple[int, int],
    of_a: tuple[int, int],
    of_b: tuple[int, int],
) -> None:
    """dA needs no more tokens than the rank, dB fewer, the weight fewer than the width."""
    own = step(embeddings, rank, batch)
    assert rates(own.full, embeddings, own.tokens) == full
    assert rates(own.a, embeddings, own.tokens) == of_a
    assert rates(own.b, embeddings @ own.factor.T, own.tokens) == of_b


def test_the_rank_says_how_many_tokens_there_were(embeddings: Tensor) -> None:
    """Below its limit, so that what is missed equals what is found wrongly; beside a guess."""
    own = step(embeddings, 64, 16)
    common = dict.fromkeys(range(100), 1.0)
    found = recover_tokens(own.a, vocabulary(embeddings), own.tokens, common, EXACT)
    assert (found.rank, found.limit, found.compared, found.from_rank) == (16, 64, 16, True)
    assert found.recovered == found.tokens == 16 and found.share == 1.0 and found.auc == 1.0
    assert found.guessed <= 1 and found.chance == pytest.approx(16 * 16 / VOCABULARY)
    perfect = recover_tokens(
        own.a, vocabulary(embeddings), own.tokens, dict.fromkeys(own.tokens, 1.0), EXACT
    )
    assert perfect.guessed == 16
    nothing = recover_tokens(0 * own.a, vocabulary(embeddings), own.tokens, common)
    assert (nothing.rank, nothing.recovered, nothing.auc) == (0, 0, 0.5)


@pytest.mark.parametrize("altered", ["sign", "bfloat16", "int8", "noise of its own size"])
def test_alterations_hide_no_tokens(embeddings: Tensor, altered: str) -> None:
    """Adam's first step, rounding and noise as large as the values raise the rank, and hide no token."""
    own = step(embeddings, 64, 16)
    update = {
        "sign": own.a.sign(),
        "bfloat16": own.a.bfloat16().double(),
        "int8": (own.a / own.a.abs().max() * 127).round(),
        "noise of its own size": own.a + own.a.pow(2).mean().sqrt() * noise(own.a),
    }[altered]
    found = recover_tokens(update, vocabulary(embeddings), own.tokens, {})
    assert found.rank == found.limit == 64 and not found.from_rank
    assert found.recovered == 16


def noise(like: Tensor) -> Tensor:
    """Return standard normal noise."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(7)).double()


def test_noise_of_differential_privacy_hides_them(embeddings: Tensor) -> None:
    """Standard deviation z ||dA||: z = 0.01 hides nothing, z = 1 leaves chance (AUC 0.4 to 0.6)."""
    aucs = []
    for seed in range(6):
        own = step(embeddings[:1500], 64, 16 + seed)
        size, read = own.a.norm(), vocabulary(embeddings[:1500])
        little = recover_tokens(own.a + 0.01 * size * noise(own.a), read, own.tokens, {})
        assert little.share == 1.0 and (little.auc or 0) - 0.5 > 4 * little.deviation
        much = recover_tokens(own.a + size * noise(own.a), read, own.tokens, {})
        assert much.recovered <= 2 and (much.auc or 0) - 0.5 < 4 * much.deviation
        aucs.append(much.auc or 0.0)
    assert 0.4 < sum(aucs) / len(aucs) < 0.6


def test_tokens_are_read_from_inputs_that_are_near_their_embeddings():
    drawn = torch.Generator().manual_seed(0)
    embeddings = torch.randn(50, 16, generator=drawn)
    near = embeddings[[3, 7, 7, 11]] + 0.1 * torch.randn(4, 16, generator=drawn)
    found = recover_from_inputs(near, embeddings, [3, 7, 11], {1: 5.0, 3: 4.0, 2: 3.0, 7: 1.0})
    assert (found.recovered, found.share, found.auc) == (3, 1.0, 1.0)
    assert found.guessed == 1 and found.compared == 3 and not found.from_rank
    noise = torch.randn(4, 16, generator=drawn)
    lost = recover_from_inputs(noise, embeddings, list(range(0, 50, 2)), {})
    assert abs(lost.auc - lost.noise_auc) < 4 * lost.deviation
    with pytest.raises(ValueError, match="16 wide"):
        recover_from_inputs(noise, embeddings[:, :8], [1], {})
