"""Steps that hide each unit of a client's rows: clipped gradients, Gaussian noise, batches by coins.

DP-SGD (Abadi et al. 2016, "Deep Learning with Differential Privacy", https://arxiv.org/abs/1607.00133,
algorithm 1), a third driver of the one loop of steps. A unit is a row of the data, all of it: a
preference pair is one unit, its two halves' gradients are added before they are clipped, and so are the
two single answers that a pair was made into; or it is all rows with one value of ``privacy.column``. In
each step

1. each unit is in the batch by a coin of its own with probability q = min(1, batch_size / units);
2. the gradient of each unit's loss, over all trained tensors as one vector, is scaled down to the norm C;
3. their sum gets noise of the standard deviation z C, whoever is in the batch, if anybody;
4. it is divided by q units, the expected size and not the real one, and the optimizer makes its step.

Presence or absence of one unit moves the sum by at most C. A unit is read by itself, so that its gradient
is the same bits whoever else is in the batch: in a pass of several, rounding couples them, by 1e-6 of C
under ordinary adapters and by several C under one whose numbers are large enough
(``RowPrivacy.units_per_pass``). What is not finite is left out. The sum is rounded to a grid of C / 2^24,
and the noise is the discrete Gaussian on this grid, so that its last bits tell nothing of the sum. Coins
and noise come from the client's :class:`NoiseSource`, in a stream of their own for each release: that of
a step's coins is named by the adapter that it starts from, so that a training which differs in anything
draws its batches anew, as the accountant takes for granted; that of the noise by the adapter that
training starts from, and the sum.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.data.batch import Batch
from fedloom.data.client_rows import Indices, TokenShare
from fedloom.errors import SettingsError
from fedloom.models.adapters import AdapterModel
from fedloom.objectives.base import Objective
from fedloom.privacy.noise import NoiseSource, NoiseStream
from fedloom.privacy.row_ledger import RowLedger
from fedloom.training.layout import Budget, budget_of
from fedloom.training.passes import Layout
from fedloom.training.results import Gradients, LocalResult, RemoteGradients, Totals
from fedloom.training.row_gradients import (
    RowGradients,
    gradient_of_one,
    gradients_together,
    reason_for_one_by_one,
)
from fedloom.training.settings import Work
from fedloom.training.steps import Training, finished, local_steps

GRID = 24
"""Steps of the grid in C, as a power of 2; float32 has no more bits."""

SLACK = 1e-4
"""By how much the noise is larger than z C, for what float32 may add to the norm of a unit's gradient,
and for what passes of several units couple under ordinary adapters."""

HUGE = 1e20
"""Norm over C above which a gradient counts as not finite: float32 has no precise factor for it."""

GRADIENTS = 1 << 30
"""Bytes at most of the gradients of the rows of one pass."""


def expected_batch(units: int, batch_size: int) -> int:
    """Return how many units a batch has on average, q times all of them."""
    return min(units, batch_size)


def private_steps(work: Work, units: int, batch_size: int, width: int) -> int:
    """Return how many steps a training has, which must not depend on which units are drawn.

    Args:
        work: How much is to be done; a number of tokens says nothing here.
        units: Units of the client.
        batch_size: Units of a batch on average.
        width: Answers that an example counts for.

    Raises:
        SettingsError: It is bounded by tokens alone.
    """
    bounds = [work.steps] if work.steps is not None else []
    if work.epochs is not None:
        bounds.append(work.epochs * math.ceil(units / batch_size))
    if work.examples is not None:
        bounds.append(max(1, work.examples // (expected_batch(units, batch_size) * width)))
    if not bounds:
        raise SettingsError(
            [
                'privacy.unit = "row": training.local_tokens would have the number of steps depend on '
                "which rows are drawn; give training.local_steps, local_examples or local_epochs"
            ]
        )
    return min(bounds)


def units_of(share: TokenShare, values: dict[int, str] | None = None) -> Indices:
    """Return ``(examples,)``: the number of each example's unit, from 0.

    Args:
        share: The client's rows.
        values: Of each row of the data by its number, what makes rows one unit (default: each is one).
    """
    rows = share.tokens.rows.tolist()
    keys = rows if values is None else [values[row] for row in rows]
    known: dict[object, int] = {}
    return np.array([known.setdefault(key, len(known)) for key in keys], np.int64)


@dataclass(eq=False)
class RowPrivacy:
    """How one client's steps hide its units.

    Attributes:
        clip: C, the largest norm of a unit's gradient, above 0.
        noise_multiplier: z, at least 0; with 0 gradients are clipped and nothing is promised.
        noise: The client's source of noise and coins.
        units: ``(examples,)`` unit of each example (:func:`units_of`).
        steps: That the client makes in the whole run at most, where they are planned.
        ledger: What was released so far, where a run keeps it.
        units_per_pass: Units that the model reads at a time; above 1 the bound on what one unit moves
            is up to rounding that couples them.
    """

    clip: float
    noise_multiplier: float
    noise: NoiseSource
    units: Indices
    steps: int = 0
    ledger: RowLedger | None = None
    units_per_pass: int = 1

    @cached_property
    def count(self) -> int:
        """How many units there are."""
        return int(self.units.max(initial=-1)) + 1

    def train(self, training: Training) -> LocalResult:
        """Carry out a training; see :class:`Driver`.

        What it reports holds no metric of the rows, and of examples the number expected.

        Raises:
            SettingsError: The objective's loss of a row depends on others.
        """
        own = PrivateSteps(self, training)
        steps = local_steps(
            training.model,
            training.share,
            own.gradients,
            training.settings,
            **training.options,
            batches=own.batches(),
        )
        result = finished(steps)
        examples = result.steps * expected_batch(self.count, training.settings.batch_size)
        return replace(result, examples=examples, metrics={})


class PrivateSteps:
    """The private steps of one training."""

    def __init__(self, privacy: RowPrivacy, training: Training) -> None:
        """Look at the rows.

        Raises:
            SettingsError: The objective's loss of a row depends on others, or several steps on one
                batch are asked for.
        """
        self.privacy, self.model, self.settings = privacy, training.model, training.settings
        options = training.options
        self.purpose = options.get("purpose", "").strip()
        self.client, self.round = options["client"], options["round"]
        if options.get("repeats", 1) > 1:
            raise SettingsError(['privacy.unit = "row" makes one step on each batch, not several'])
        self.share = replace(
            training.share, mismatched=None, mismatched_reference_logps=None
        )  # another row's completion
        self.objective = separated(training.objective).for_client(self.share.tokens.labels)
        batch, units = training.settings.batch_size, privacy.count
        self.expected = expected_batch(units, batch)
        width = self.share.tokens.width
        self.steps = private_steps(options["work"], units, batch, width)
        self.together = privacy.units_per_pass > 1 and not reason_for_one_by_one(self.model)
        self.start = bytes.fromhex(self.model.digest())
        self.step = 0
        self.batch = b""
        if privacy.ledger is not None:
            privacy.ledger.read()
        rows = self.share.tokens.rows.tolist()
        self.unit_of = dict(zip(rows, privacy.units.tolist(), strict=True))
        self.layout = Layout(self.model, self.share, _budget(self), apart=True)

    def batches(self) -> Iterator[list[Batch]]:
        """Yield the passes of each step's batch, which may be empty."""
        for _ in range(self.steps):
            drawn = self._drawn()
            if self.together:
                yield self.layout.batches(drawn) if len(drawn) else []
                continue
            units = self.privacy.units[drawn]
            each = [drawn[units == unit] for unit in np.unique(units)]
            yield [part for own in each for part in self.layout.batches(own)]

    def _drawn(self) -> Indices:
        """Return the examples of the units in the next step's batch, each by a coin of its own."""
        units = self.privacy.count
        adapter = bytes.fromhex(self.model.digest())
        self.batch = self.privacy.noise.digest([self._named(self.step + 1), b"coins", adapter])
        coins = self._stream(f"coins {self.step + 1}", adapter)
        present = coins.uniform(units) * units < self.expected
        return np.flatnonzero(present[self.privacy.units])

    def gradients(self, parts: list[Batch], totals: Totals) -> RemoteGradients:
        """Leave the noisy mean of clipped gradients in the parameters."""
        return self._found(parts, totals)
        yield  # nobody else is needed

    def _found(self, parts: list[Batch], totals: Totals) -> Gradients:
        self.step += 1
        total = ClippedSum(self.model, self.privacy.clip)
        left = _rows_of_units(parts, self.unit_of)
        loss = 0.0
        for part in parts:
            totals.add(part, {}, 0.0, {})
            units = [self.unit_of[row] for row in part.rows]
            one = gradients_together if self.together else gradient_of_one
            mean, found = one(self.model, self.objective, part)
            if self.model.penalty() is not None:
                raise SettingsError(
                    ['privacy.unit = "row": what this model adds to the loss depends on all rows']
                )
            loss += float(mean.nan_to_num(0.0, 0.0, 0.0)) * len(part)
            total.add(units if self.together else units[:1], found, left, len(units))
        self._release(total.whole())
        return Gradients(loss / self.expected)

    def _release(self, whole: Tensor) -> None:
        """Write the sum, with noise and over the expected batch, as the parameters' gradients."""
        noisy = self._noised(whole.cpu().numpy())
        means = torch.from_numpy(noisy / self.expected)
        for name, own in zip(
            self.model.parameters, torch.split(means, _sizes(self.model)), strict=True
        ):
            parameter = self.model.parameters[name]
            parameter.grad = own.view(parameter.shape).to(parameter.device, parameter.dtype)

    def _noised(self, whole: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return a sum on its grid with noise, in the sum's own unit."""
        step, z = self.privacy.clip * 2.0**-GRID, self.privacy.noise_multiplier
        on_grid = np.rint(whole / step).astype(np.int64)
        # rounding moves two sums apart by a step at most in each number
        sigma = z * ((1 + SLACK) * 2.0**GRID + math.sqrt(len(whole)))
        digest = hashlib.blake2b(on_grid.data, key=self.start, digest_size=32).digest()
        if self.privacy.ledger is not None:  # without noise too: no bound holds then
            release = self.privacy.noise.digest([self._named(self.step), digest])
            self.privacy.ledger.spend(release, self.batch)
        if sigma:
            on_grid += self._stream(f"noise {self.step}", digest).discrete_gaussian(
                sigma, len(on_grid)
            )
        return (on_grid * step).astype(np.float64)

    def _named(self, step: int) -> bytes:
        """Return what tells a step from all others whose noise is under the same key."""
        noise = self.privacy.noise.run
        return f"{noise}|{self.purpose}|{self.round}|{self.client}|{step}|".encode()

    def _stream(self, what: str, digest: bytes) -> NoiseStream:
        name = " ".join(own for own in ("row", what, self.purpose) if own)
        return self.privacy.noise.stream(name, self.round, self.client, digest)


def separated(objective: Objective) -> Objective:
    """Return an objective as a mean of losses of one row each.

    Raises:
        SettingsError: It cannot be made one.
    """
    if not objective.separable.holds:
        name = type(objective).__name__
        raise SettingsError([f'privacy.unit = "row": {name} cannot: {objective.separable.why}'])
    return objective.for_rows()


class ClippedSum:
    """A sum of units' gradients, each scaled down to a norm over all tensors together.

    A unit's rows may be in several passes: what there is of it waits until it is whole.
    """

    def __init__(self, model: AdapterModel, clip: float) -> None:
        """Begin with nothing.

        Args:
            model: Whose trained tensors they are of.
            clip: C, above 0.
        """
        self.clip = clip
        self.sums = {
            name: torch.zeros(p.numel(), dtype=torch.float64, device=p.device)
            for name, p in model.parameters.items()
        }
        self._waiting: dict[int, RowGradients] = {}

    def add(self, units: list[int], found: RowGradients, left: dict[int, int], rows: int) -> None:
        """Take the gradients of a pass.

        Args:
            units: Of each gradient, its unit.
            found: Gradients by name.
            left: Of each unit, its rows that are yet to come; those of this pass are taken off.
            rows: Of the pass.
        """
        each = rows // len(units)
        whole = []
        for place, unit in enumerate(units):
            left[unit] -= each
            if not left[unit] and unit not in self._waiting:
                whole.append(place)
                continue
            own = {name: gradient[place] for name, gradient in found.items()}
            known = self._waiting.get(unit)
            if known is not None:
                own = {n: known[n] + g if n in known else g for n, g in own.items()} | {
                    n: g for n, g in known.items() if n not in own
                }
            self._waiting[unit] = own
            if not left[unit]:
                self._clipped({n: g.unsqueeze(0) for n, g in self._waiting.pop(unit).items()})
        if len(whole) == len(units):
            self._clipped(found)
        elif whole:
            self._clipped({name: gradient[whole] for name, gradient in found.items()})

    def _clipped(self, found: RowGradients) -> None:
        """Add gradients of units, ``(units, ...)`` each, scaled down where they are longer than C."""
        flat = {name: gradient.flatten(1) for name, gradient in found.items()}
        if not flat:
            return
        own_norms = [
            torch.linalg.vector_norm(own, dim=1, dtype=torch.float64) for own in flat.values()
        ]
        norms = torch.linalg.vector_norm(torch.stack(own_norms), dim=0)
        finite = norms.isfinite() & (norms <= self.clip * HUGE)
        if not bool(finite.all()):
            flat, norms = {name: own[finite] for name, own in flat.items()}, norms[finite]
        factors = (self.clip / norms.clamp(min=self.clip)).float()
        for name, own in flat.items():
            self.sums[name] += (factors @ own.float()).double()

    def whole(self) -> Tensor:
        """Return ``(numbers,)`` float64: the sum over all tensors, one after another."""
        assert not self._waiting, "all rows of a unit are in its batch"
        return torch.cat([*self.sums.values()])


def _rows_of_units(parts: list[Batch], unit_of: dict[int, int]) -> dict[int, int]:
    found: dict[int, int] = {}
    for part in parts:
        for row in part.rows:
            found[unit_of[row]] = found.get(unit_of[row], 0) + 1
    return found


def _sizes(model: AdapterModel) -> list[int]:
    return [parameter.numel() for parameter in model.parameters.values()]


def _budget(own: PrivateSteps) -> Budget:
    """Return what a pass holds: where it reads several units, no more than whose gradients fit."""
    budget = budget_of(own.settings, own.model)
    if not own.together:
        return budget
    fit = GRADIENTS // (4 * max(1, sum(_sizes(own.model))))
    return replace(budget, rows=max(1, min(budget.rows, own.privacy.units_per_pass, fit)))
