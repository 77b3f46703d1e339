"""Which tokens a client trained on, read from its update: the span test of DAGER.

A linear layer Y = X W^T has the gradient dL/dW = dY^T X, so that its rows are mixtures of the rows of
X, the layer's inputs. The inputs of the first block depend on the token alone (and on its place, where
places are embedded), so that a token of the vocabulary can be tested: the nearer its input lies to the
span of the update's rows, the likelier it was in the batch (Petrov et al. 2024, "DAGER: Exact Gradient
Inversion for Large Language Models", https://arxiv.org/abs/2405.15586).

Of LoRA's factors (Y = X W^T + s X A^T B^T), dA = s B^T dY^T X has r rows, which are mixtures of the
rows of X while B is not 0; dB = s dY^T X A^T has rows in r dimensions, and tests A x where A is known.
The test is exact where the distinct inputs of the step are at most the rows of the update and fewer
than its columns.

Beyond that a threshold says nothing, so tokens are ranked: among the b nearest of the vocabulary, b being
the number of distinct tokens, each one missed is one found wrongly, and precision equals recall.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fedloom.randomness import generator

TOLERANCE = 1e-5
"""Singular values below this share of the largest count as 0: rounding of float32 gradients of a step."""

CHUNK = 16_384
"""Candidates whose distances are worked out at a time."""

DRAWS = 12
"""Updates of noise alone that distances are compared with."""

FLOOR = 1e-6
"""Of the whitening: share of the largest variance below which a direction is not enlarged further."""


@dataclass(frozen=True)
class RowSpace:
    """The space that the rows of an update span.

    Attributes:
        rank: Numerical rank; 0 of an update that is 0.
        limit: The largest rank that a matrix of this shape has.
        directions: ``(limit, columns)`` float64, orthonormal, the strongest first.
        values: ``(limit,)`` float64 singular values.
    """

    rank: int
    limit: int
    directions: Tensor
    values: Tensor

    @property
    def is_exact(self) -> bool:
        """Whether the rank is below its limit, so that it counts the distinct inputs of the step."""
        return 0 < self.rank < self.limit


def row_space(update: Tensor, tolerance: float = TOLERANCE, rounding: float = 0.0) -> RowSpace:
    """Return the space of an update's rows.

    Args:
        update: ``(rows, columns)``: the gradient of a linear layer's weight, or its change.
        tolerance: Share of the largest singular value below which one counts as 0.
        rounding: Standard deviation of the rounding in each number: singular values up to the largest
            that this alone would have count as 0.
    """
    _, values, directions = torch.linalg.svd(update.double(), full_matrices=False)
    largest = float(values[0]) if len(values) else 0.0
    least = max(tolerance * largest, rounding * sum(side**0.5 for side in update.shape))
    rank = int((values > least).sum()) if largest > 0 else 0
    return RowSpace(rank, min(update.shape), directions, values)


def rounding_of(values: Tensor) -> float:
    """Return the standard deviation of the rounding of float32 numbers as large as these."""
    return float(values.double().pow(2).mean().sqrt()) * 2**-24 if values.numel() else 0.0


@dataclass(frozen=True)
class Candidates:
    """What a layer reads for each token of the vocabulary.

    Attributes:
        inputs: ``(vocabulary, places, columns)``; one place where the input does not depend on it.
    """

    inputs: Tensor
    _noise: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def whitening(self) -> Tensor:
        """``(columns, columns)`` float64: makes the vocabulary's inputs as large in all directions.

        Embeddings share a few strong directions, in which every token would be near. A linear map changes
        nothing about which inputs a row is a mixture of.
        """
        flat = self.inputs.reshape(-1, self.inputs.shape[-1])
        moment = sum(part.double().T @ part.double() for part in torch.split(flat, CHUNK))
        assert isinstance(moment, Tensor), "there is a token"
        values, vectors = torch.linalg.eigh(moment / len(flat))
        scales = values.clamp_min(FLOOR * float(values[-1])).rsqrt()
        whitening: Tensor = vectors * scales @ vectors.T
        return whitening

    def distances(self, space: RowSpace, count: int) -> tuple[Tensor, Tensor | None]:
        """Return the distances of tokens to a space, after whitening, at their best place.

        Where the space is not exact, a distance is one as a share of what it is on average to the space
        of an update of noise alone, which is nearer to some tokens than to others.

        Args:
            space: Of the rows of an update.
            count: How many inputs are looked for, at least 1.

        Returns:
            ``(vocabulary,)``, and for a space that is not exact ``(draws, vocabulary)`` of noise alone.
        """
        if space.is_exact:  # all directions are signal
            return self._to(space.directions[: space.rank], count), None
        found = self._to(space.values[: space.rank, None] * space.directions[: space.rank], count)
        key = (space.rank, count)
        if key not in self._noise:
            rng = generator(0, "span of noise")
            drawn = (
                torch.from_numpy(rng.standard_normal((space.rank, self.inputs.shape[-1])))
                for _ in range(DRAWS)
            )
            self._noise[key] = torch.stack([self._to(own, count) for own in drawn])
        noise = self._noise[key]
        typical = noise.mean(0).clamp_min(torch.finfo(torch.float64).tiny)
        return found / typical, noise / typical

    def _to(self, rows: Tensor, count: int) -> Tensor:
        """Return the distances to the strongest ``count`` directions of some rows."""
        columns = self.inputs.shape[-1]
        kept = min(len(rows), max(1, count), max(1, columns - 1))
        directions = torch.linalg.svd(rows @ self.whitening, full_matrices=False)[2][:kept]
        flat = self.inputs.reshape(-1, columns)
        found = [
            distances(part.double() @ self.whitening, directions)
            for part in torch.split(flat, CHUNK)
        ]
        return torch.cat(found).view(len(self.inputs), -1).amin(dim=1)


def distances(candidates: Tensor, directions: Tensor) -> Tensor:
    """Return how far candidates are from a space, as shares of their length.

    Args:
        candidates: ``(n, columns)``.
        directions: ``(k, columns)`` orthonormal.

    Returns:
        ``(n,)`` float64 in [0, 1]: ``||e - R^T R e|| / ||e||``; 1 of a candidate that is 0.
    """
    own = candidates.double()
    lengths = own.norm(dim=1)
    rest = own - (own @ directions.T) @ directions
    shares = rest.norm(dim=1) / lengths.clamp_min(torch.finfo(torch.float64).tiny)
    return torch.where(lengths > 0, shares.clamp(max=1.0), torch.ones_like(shares))


def nearest(found: Tensor, count: int) -> Tensor:
    """Return the ids of the ``count`` smallest distances, nearest first; equal ones by id."""
    return torch.sort(found, stable=True).indices[:count]


@dataclass(frozen=True)
class TokenRecovery:
    """What an update tells of the tokens of a training.

    Attributes:
        tokens: Distinct tokens that were trained on.
        rank: Numerical rank of the update.
        limit: The largest that it could have.
        compared: How many nearest candidates are taken: the rank where it is below its limit, and else
            the true number, which is then given to the attacker.
        recovered: How many of these were trained on.
        guessed: How many of as many commonest tokens were trained on: a guess without the update.
        chance: How many are hit by tokens drawn at random, on average.
        auc: Of nearness, trained-on tokens against all others; 0.5 is chance, ``None`` without both.
        from_rank: Whether ``compared`` is known from the rank.
        noise_auc: Mean AUC for updates of noise alone.
        deviation: Its standard deviation.
    """

    tokens: int
    rank: int
    limit: int
    compared: int
    recovered: int
    guessed: int
    chance: float
    auc: float | None
    from_rank: bool
    noise_auc: float
    deviation: float

    @property
    def share(self) -> float:
        """Share of the distinct tokens that were recovered, 0 to 1."""
        return self.recovered / self.tokens if self.tokens else 0.0

    @property
    def guessed_share(self) -> float:
        """The same of the guess by frequency."""
        return self.guessed / self.tokens if self.tokens else 0.0


def recover_tokens(
    update: Tensor,
    candidates: Candidates,
    trained: Sequence[int],
    frequencies: Mapping[int, float],
    tolerance: float = TOLERANCE,
    rounding: float = 0.0,
) -> TokenRecovery:
    """Rank the vocabulary by nearness to an update's rows, and count what that finds.

    Args:
        update: ``(rows, columns)`` change of a layer's weight, or of a factor of it.
        candidates: What the layer reads for each token; for dB of LoRA, that times A^T.
        trained: Distinct tokens that were trained on: the truth.
        frequencies: How common tokens are elsewhere, for the guess.
        tolerance: See :func:`row_space`.
        rounding: Likewise.

    Raises:
        ValueError: The columns of update and candidates differ.
    """
    vocabulary, _, columns = candidates.inputs.shape
    if update.shape[1] != columns:
        raise ValueError(f"the update has {update.shape[1]} columns and candidates {columns}")
    space = row_space(update, tolerance, rounding)
    truth = torch.tensor(sorted(set(trained)), dtype=torch.long)
    tokens = len(truth)
    known = space.is_exact and space.rank < vocabulary
    count = space.rank if known else min(tokens, vocabulary)
    typical, deviation = 0.5, _deviation(tokens, vocabulary)
    if space.rank == 0:  # nothing was sent: the order of ids is no finding
        recovered, auc = 0, 0.5 if 0 < tokens < vocabulary else None
    else:
        found, noise = candidates.distances(space, count)
        recovered = int(torch.isin(nearest(found, count), truth).sum())
        auc = _auc(found, truth)
        if noise is not None and auc is not None:
            chance = torch.tensor([_auc(own, truth) for own in noise], dtype=torch.float64)
            typical, deviation = float(chance.mean()), max(deviation, float(chance.std()))
    commonest = sorted(frequencies, key=lambda token: (-frequencies[token], token))[:count]
    guessed = len(set(commonest) & set(truth.tolist()))
    return TokenRecovery(
        tokens,
        space.rank,
        space.limit,
        count,
        recovered,
        guessed,
        count * tokens / vocabulary,
        auc,
        known,
        typical,
        deviation,
    )


def recover_from_inputs(
    inputs: Tensor, embeddings: Tensor, trained: Sequence[int], frequencies: Mapping[int, float]
) -> TokenRecovery:
    """Rank the vocabulary by nearness to input embeddings that were sent, and count what that finds.

    A token is as near as the largest cosine between its embedding and one that was sent, both after the
    whitening of :class:`Candidates`. Noise is as many normal vectors around 0, as large as embeddings.

    Args:
        inputs: ``(n, width)``, one each position.
        embeddings: ``(vocabulary, width)``, what the model reads for each token.
        trained: Distinct tokens of the client's rows: the truth.
        frequencies: How common tokens are elsewhere, for the guess.

    Raises:
        ValueError: Widths differ.
    """
    vocabulary, width = embeddings.shape
    if inputs.shape[1] != width:
        raise ValueError(f"inputs are {inputs.shape[1]} wide and embeddings {width}")
    whitening = Candidates(embeddings.unsqueeze(1)).whitening
    directions = torch.nn.functional.normalize(embeddings.double() @ whitening, dim=1)

    def apart(sent: Tensor) -> Tensor:
        own = torch.nn.functional.normalize(sent.double() @ whitening, dim=1)
        return 1 - torch.cat([part @ own.T for part in torch.split(directions, CHUNK)]).amax(1)

    space, truth = row_space(inputs), torch.tensor(sorted(set(trained)), dtype=torch.long)
    count, rng = min(len(truth), vocabulary), generator(0, "inputs of noise")
    found, scale = apart(inputs), float(embeddings.double().std())
    drawn = (
        _auc(apart(scale * torch.from_numpy(rng.standard_normal(inputs.shape))), truth)
        for _ in range(DRAWS)
    )
    noise = torch.tensor([own for own in drawn if own is not None], dtype=torch.float64)
    commonest = sorted(frequencies, key=lambda token: (-frequencies[token], token))[:count]
    return TokenRecovery(
        len(truth),
        space.rank,
        space.limit,
        count,
        int(torch.isin(nearest(found, count), truth).sum()),
        len(set(commonest) & set(truth.tolist())),
        count * len(truth) / vocabulary,
        _auc(found, truth),
        False,
        float(noise.mean()) if len(noise) else 0.5,
        max(_deviation(len(truth), vocabulary), float(noise.std()) if len(noise) > 1 else 0.0),
    )


def _deviation(tokens: int, vocabulary: int) -> float:
    """Return the standard deviation of an AUC of scores that are independent (Mann and Whitney 1947)."""
    others = vocabulary - tokens
    return ((vocabulary + 1) / (12 * tokens * others)) ** 0.5 if tokens and others else 0.0


def _auc(found: Tensor, truth: Tensor) -> float | None:
    """Return how often a trained-on token is nearer than another one; ties count one half."""
    inside = torch.zeros(len(found), dtype=torch.bool)
    inside[truth] = True
    own, other = found[inside], found[~inside].sort().values
    if not len(own) or not len(other):
        return None
    above = len(other) - torch.searchsorted(other, own, right=True)
    ties = torch.searchsorted(other, own, right=True) - torch.searchsorted(other, own)
    return float((above + ties / 2).sum()) / (len(own) * len(other))
