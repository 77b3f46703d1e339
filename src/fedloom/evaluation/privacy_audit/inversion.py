"""Rows read from an update by search: dummy rows whose simulated update is as the one that was sent.

Deep Leakage from Gradients (Zhu et al. 2019, https://arxiv.org/abs/1906.08935) changes dummy inputs until
their gradient is the one that was seen. Of text, LAMP (Balunovic et al. 2022,
https://arxiv.org/abs/2202.08827) does so by the cosine distance of gradients, with changes of embeddings
and of whole tokens in turns. It needs no condition on the rank, so that it is tried where the span test
(:mod:`fedloom.evaluation.privacy_audit.span`) is not exact.

Reconstructed here for language models, and not LAMP's in these points. Tokens alone are changed: from
mixtures of embeddings, gradient descent on the distance ended far from the row. What a row adds to a
gradient is a sum over its predicted tokens, each of which depends on those before it alone, so that a
beginning of a row has a part of the gradient: rows are made token by token, those whose part is
nearest being kept (a beam). Then single tokens are replaced, and tokens swapped and moved as LAMP
does, while that brings the whole nearer. The prior is the order in which the span test ranks tokens,
and no other language model; of one step of Adam the gradient is looked for that was read back from it,
and what it makes of the gradients of several steps is simulated, all of them at the weights that the
client was sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedloom.tensors import Tensors

KEPT = 3
"""Beginnings of a row that are made longer at a time."""

SWEEPS = 8
"""Times that all places of all rows are gone through at the end, at most."""

MOVES = 64
"""Swaps and moves of each row that are tried in a sweep."""

MOST_READ = 400_000
"""Tokens that are simulated for an update while rows are made token by token: then the rest is drawn."""

TOGETHER = 1024
"""Tokens that are simulated in one pass."""


@dataclass(frozen=True)
class Shape:
    """What is known of the rows of an update beforehand.

    Attributes:
        learnt: Of each row, of each of its tokens whether it is predicted; in the order of the steps.
        steps: Optimizer steps, of as many rows each.
    """

    learnt: tuple[tuple[bool, ...], ...]
    steps: int

    def __post_init__(self) -> None:
        """Check that the rows can be divided.

        Raises:
            ValueError: They cannot, or a row predicts nothing.
        """
        if not self.learnt or self.steps < 1 or len(self.learnt) % self.steps:
            raise ValueError(f"{len(self.learnt)} rows in {self.steps} steps")
        if not all(any(own[1:]) for own in self.learnt):
            raise ValueError("a row of which no token is predicted from another has no gradient")


class Simulated(Protocol):
    """Gradients of rows that are tried, as a client would compute them."""

    def of_tokens(self, tokens: Tensor, learnt: Sequence[bool]) -> Tensors:
        """Return the gradients ``(n, rows, columns)`` of the summed losses of rows.

        Args:
            tokens: ``(n, length)`` token ids.
            learnt: Of each place whether its token is predicted; the first never is.
        """


Rule = Callable[[Sequence[Tensor]], Tensor]
"""From the gradients of each step, of one tensor, to the direction of its change."""


def descent(gradients: Sequence[Tensor]) -> Tensor:
    """Return SGD's change: less the sum of the gradients."""
    return -torch.stack([*gradients]).sum(0)


@dataclass(frozen=True)
class AdamRule:
    """Adam's change (Kingma and Ba 2015, algorithm 1) over the learning rate, of a new optimizer.

    Attributes:
        first: beta 1.
        second: beta 2.
        epsilon: Above 0.
        scale: What gradients are divided by: predicted tokens of a step.
    """

    first: float
    second: float
    epsilon: float
    scale: float

    def __call__(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return it."""
        mean = square = change = torch.zeros_like(gradients[0])
        for step, own in enumerate(gradients, 1):
            gradient = own / self.scale
            mean = self.first * mean + (1 - self.first) * gradient
            square = self.second * square + (1 - self.second) * gradient.square()
            root = (square / (1 - self.second**step)).sqrt()
            change = change - mean / (1 - self.first**step) / (root + self.epsilon)
        return change


def distance(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, by_rows: bool = False
) -> Tensor:
    """Return ``(n,)`` the mean over tensors of 1 - cosine, in [0, 2]; 1 of one that is 0.

    Args:
        found: Tensors ``(n, rows, columns)``.
        wanted: Tensors ``(rows, columns)``, none of which is 0.
        by_rows: Whether the rows of wanted tensors are scaled by what they are known with
            (:mod:`fedloom.evaluation.privacy_audit.adam`): then cosines are of rows, and their mean has
            the squares of the wanted rows' lengths as weights.
    """
    apart = []
    for name, own in wanted.items():
        one, other = found[name], own
        if not by_rows:
            one, other = one.flatten(1)[:, None], own.flatten()[None]
        lengths = other.norm(dim=1)
        tiny = torch.finfo(one.dtype).tiny
        cosines = (one * other).sum(2) / (one.norm(dim=2) * lengths).clamp_min(tiny)
        weights = lengths.square() / lengths.square().sum()
        apart.append(1 - cosines @ weights)
    return torch.stack(apart).mean(0)


@dataclass(frozen=True)
class Inverted:
    """What was found.

    Attributes:
        rows: Of each row, its tokens.
        distance: Of their simulated update to the one that was sent.
        read: Tokens that were simulated.
    """

    rows: tuple[tuple[int, ...], ...]
    distance: float
    read: int


class Inversion:
    """One update, of which rows are looked for."""

    def __init__(
        self,
        wanted: Tensors,
        simulated: Simulated,
        rule: Rule,
        shape: Shape,
        candidates: Tensor,
        rng: np.random.Generator,
        *,
        by_rows: bool = False,
    ) -> None:
        """Begin with what is known.

        Args:
            wanted: The update by tensor; those that are 0 tell nothing and are left out.
            simulated: Gradients of rows.
            rule: The optimizer.
            shape: Of the rows.
            candidates: ``(n,)`` tokens of which rows are made.
            rng: Draws the start, and swaps and moves.
            by_rows: See :func:`distance`.

        Raises:
            ValueError: Nothing was sent.
        """
        self.wanted = {n: own for n, own in wanted.items() if bool(own.any())}
        if not self.wanted:
            raise ValueError("an update that is 0 tells nothing")
        self.simulated, self.rule, self.shape = simulated, rule, shape
        self.candidates, self.rng, self.by_rows = candidates, rng, by_rows
        self.read = 0
        self.gradients: list[Tensors] = [
            {n: torch.zeros_like(own)[None] for n, own in self.wanted.items()} for _ in shape.learnt
        ]

    def find(self) -> Inverted:
        """Return the nearest rows that were found."""
        rows = [self._made(row) for row in range(len(self.shape.learnt))]
        for _ in range(SWEEPS):
            nearer = [self._improved(rows, row) for row in range(len(rows))]
            if not any(nearer):
                break
        found = self.distance_of(rows)
        return Inverted(tuple(tuple(own.tolist()) for own in rows), found, self.read)

    def distance_of(self, rows: Sequence[Tensor]) -> float:
        """Return the distance of rows, each ``(length,)`` tokens."""
        own = [
            self.simulated.of_tokens(tokens[None], learnt)
            for tokens, learnt in zip(rows, self.shape.learnt, strict=True)
        ]
        return float(self._apart(own)[0])

    def _apart(self, gradients: Sequence[Tensors]) -> Tensor:
        """Return the distance of the gradients of all rows, each ``(n or 1, rows, columns)``."""
        each = len(gradients) // self.shape.steps
        found = {}
        for name in self.wanted:
            steps = []
            for start in range(0, len(gradients), each):
                whole = gradients[start][name]
                for own in gradients[start + 1 : start + each]:
                    whole = whole + own[name]
                steps.append(whole)
            found[name] = self.rule(torch.broadcast_tensors(*steps))  # type: ignore[no-untyped-call]
        return distance(found, self.wanted, by_rows=self.by_rows)

    def _tries(self, row: int, tries: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the distances of tries ``(n, length)`` for a row beside the others, and the nearest one.

        Its gradient is kept where it is nearer than the row's own; then it is returned, else ``None``.
        """
        learnt = self.shape.learnt[row][: tries.shape[1]]
        least, best, apart = self._now, None, []
        for part in torch.split(tries, max(1, TOGETHER // tries.shape[1])):
            found = self.simulated.of_tokens(part, learnt)
            self.read += part.numel()
            before, behind = self.gradients[:row], self.gradients[row + 1 :]
            own = self._apart([*before, found, *behind])
            apart.append(own)
            at = int(own.argmin())
            if float(own[at]) < least:
                least, best = float(own[at]), (part[at], {n: g[at, None] for n, g in found.items()})
        if best is None:
            return torch.cat(apart), None
        self.gradients[row] = best[1]
        return torch.cat(apart), best[0]

    @property
    def _now(self) -> float:
        return float(self._apart(self.gradients)[0])

    def _made(self, row: int) -> Tensor:
        """Return a row that was made token by token, beside those before it.

        A token is judged as what is read, beside the best of those that may be predicted from it: what
        it adds where it is itself predicted tells little. At its first place a token attends to itself
        alone, so that none is left out there.
        """
        learnt, count = self.shape.learnt[row], len(self.candidates)
        first = learnt.index(True, 1)
        last, kept = self.candidates[:1], self.candidates[:, None]
        if first > 1:  # of what comes before the first token that is predicted nothing is known
            drawn = self.rng.integers(count, size=(KEPT, first - 1))
            kept = self.candidates[torch.from_numpy(drawn)]
        pairs = torch.cartesian_prod(self.candidates, self.candidates)
        for place in range(kept.shape[1], len(learnt) - 1):
            if self.read + len(kept) * len(pairs) * (place + 2) > MOST_READ:
                more = self.rng.integers(count, size=len(learnt) - 1 - place)
                kept = torch.cat([kept[:1], self.candidates[torch.from_numpy(more)][None]], 1)
                break
            tries = torch.cat(
                [kept.repeat_interleave(len(pairs), 0), pairs.repeat(len(kept), 1)], 1
            )
            apart, labels = self._tries(row, tries)[0].view(-1, count).min(1)
            order = torch.sort(apart, stable=True).indices[:KEPT]
            kept = tries.view(-1, count, place + 2)[order, 0, :-1]
            last = self.candidates[labels[order[:1]]]
        whole = torch.cat([kept[0], last])
        self._tries(row, whole[None])
        return whole

    def _improved(self, rows: list[Tensor], row: int) -> bool:
        """Replace and move tokens of a row while that brings it nearer; return whether it did."""
        nearer = False
        for place in range(len(rows[row]) + 1):
            if place < len(rows[row]):
                tries = rows[row].repeat(len(self.candidates), 1)
                tries[:, place] = self.candidates
            else:
                tries = self._moved(rows[row])
            _, found = self._tries(row, tries)
            if found is not None:
                rows[row], nearer = found, True
        return nearer

    def _moved(self, own: Tensor) -> Tensor:
        """Return a row with two tokens swapped, or a stretch of tokens moved (LAMP)."""
        tries, length = [own], len(own)
        for n in range(MOVES if length > 2 else 0):
            first, second, third = sorted(self.rng.choice(length + 1, 3, replace=False).tolist())
            if n % 2:
                parts = own[:first], own[second:third], own[first:second], own[third:]
                tries.append(torch.cat(parts))
            else:
                one, two = self.rng.choice(length, 2, replace=False).tolist()
                tries.append(own.clone())
                tries[-1][[one, two]] = own[[two, one]]
        return torch.stack(tries)
