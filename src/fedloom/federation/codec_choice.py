"""Codecs that an experiment does not name: dealt out within a budget, or chosen on what clients send.

``wire.budget``: each answer says the mean square of every tensor that is coded, with what error feedback
adds; the median over the clients whose answers count decides which codec a tensor has in the next round
(``wire/bit_allocation.py``). In the first, all count alike; later, one that was in no answer counts as
the largest. Codecs are in the schema of the answer, which
is fixed before it is asked for, so that sizes follow from it as always.

``"auto"``: in the first rounds tensors are sent as they are, and the server codes what it got in each
preset: every client's change, as the client would, for ``wire.up``; the mean of the changes for
``wire.down``. Where it has held-out rows, it measures their loss under what was sent, moved by the mean
of the changes and by that of each preset: the preset of fewest bits that costs at most
``wire.auto_loss`` of what those rounds took off the loss is kept from then on. Elsewhere, and where they
took nothing off, it is the preset of fewest bits whose error of the mean, since what averages out over
clients costs nothing, is within ``wire.auto_error``. It is in each checkpoint, so that a run that goes on
goes on with it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from fedloom.accounting.quantities import human_bytes
from fedloom.errors import MessageError, SettingsError
from fedloom.federation.compression_messages import (
    ADAPTER,
    CODING_ERROR,
    LARGEST_SQUARE,
    PREFIX,
    SQUARES,
    UPDATES,
    codecs_up,
    coded_replies,
    dealt_names,
    is_change,
    is_coded,
    is_difference,
)
from fedloom.randomness import generator
from fedloom.tensors import Tensors
from fedloom.wire.bit_allocation import Allocation, most_sent
from fedloom.wire.codecs import PRESETS, Generators, pipeline
from fedloom.wire.messages import Exchange, Payload, Reply, decode, encode
from fedloom.wire.schema import NumberSpec, Schema, TensorSpec, amount
from fedloom.wire.settings import AUTO, WireSettings

UP, DOWN = "up", "down"
"""Ways of tensors, as in the settings."""

BEFORE, MEAN, AS_IT_IS = "before", "mean", "as it is"
"""Keys of losses beside the ways: under what was sent, and moved by the mean without a codec."""

HeldOutLoss = Callable[[Tensors, int], float | None]
"""Returns the held-out loss under tensors by the names of the server's model, given the round; ``None``
where they are no adapter of it, or there is no loss."""

CANDIDATES = {
    UP: tuple(name for name in PRESETS if pipeline(name).unbiased),
    DOWN: tuple(PRESETS),
}
"""Presets that are measured, from mild to strong. Up, what a biased one loses adds up over the rounds;
down, the server's own error feedback returns it."""


@dataclass
class BitBudget:
    """Codecs of the tensors of clients' answers within ``wire.budget``.

    Attributes:
        settings: ``[wire]``.
    """

    settings: WireSettings
    _squares: dict[str, dict[str, float]] = field(default_factory=dict)
    _said: dict[int, dict[str, float]] = field(default_factory=dict)
    _last: dict[str, Any] = field(default_factory=dict)

    def coded(self, action: str, reply: Schema) -> Schema:
        """Return the schema of replies as they are sent; itself where nothing of them is coded.

        Args:
            action: What is asked for.
            reply: The schema of its replies, as the method has it.

        Raises:
            SettingsError: The budget does not suffice, or how large an answer is is not known.
        """
        allocation = self._allocation(action, reply)
        if not allocation.specs:
            coded = coded_replies(reply, codecs_up(self.settings))
            return as_sent(coded, self.settings) if coded != reply else reply
        budget, least = self.settings.budget_bytes, allocation.least
        assert budget is not None, "it is made where there is one"
        if budget < least:
            raise SettingsError(
                [
                    f"wire.budget = {self.settings.budget!r}: an answer of a client takes up to {least} "
                    f"bytes ({human_bytes(least)}) with the strongest codecs of each tensor, so that the "
                    f'smallest budget is "{least}B": raise it, or train a smaller adapter (adapter.rank)'
                ]
            )
        dealt = allocation.dealt(budget, self._squares.get(action, {}))
        found = allocation.make(dealt)
        tensors: dict[str, int] = {}
        for codec, _ in self.settings.dealt:
            if number := sum(own == codec for own in dealt.values()):
                tensors[codec] = number
        self._last = {"tensors": tensors, "most_bytes": most_sent(found)}
        return found

    def least(self, action: str, reply: Schema) -> int:
        """Return the smallest budget of replies in bytes, 0 where nothing of them is coded.

        Args:
            action: What is asked for.
            reply: The schema of its replies, as the method has it.

        Raises:
            SettingsError: How large an answer is is not known.
        """
        allocation = self._allocation(action, reply)
        return allocation.least if allocation.specs else 0

    def read(self, client: int, schema: Schema, said: Tensor) -> None:
        """Take the mean squares that a client says.

        Args:
            client: Whose they are.
            schema: Of its answer, as it is sent.
            said: One of each tensor, (tensors,).

        Raises:
            MessageError: One is negative, above ``LARGEST_SQUARE``, or none.
        """
        values = [float(own) for own in said]
        if not all(0 <= own <= LARGEST_SQUARE for own in values):
            raise MessageError(
                f"mean squares of tensors are {min(values):.4g} to {max(values):.4g}, they must be 0 to "
                f"{LARGEST_SQUARE:g}",
                "out_of_range",
            )
        self._said[client] = dict(zip(dealt_names(schema, self.settings), values, strict=True))

    def settle(self, action: str, accepted: Collection[int]) -> None:
        """Let what those clients said count whose answers do; a median, so that none decides alone."""
        counted = [self._said[client] for client in sorted(accepted) if client in self._said]
        if counted:
            found = {name: median(own[name] for own in counted) for name in counted[0]}
            # other rounds may send other tensors
            self._squares.setdefault(action, {}).update(found)
        self._said = {}

    def record(self) -> dict[str, Any]:
        """Return how many tensors had which codec in the last round, and the most bytes of an answer."""
        return {"budget": self._last} if self._last else {}

    def saved(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as plain JSON; a copy, which stays as it is."""
        return {"squares": {action: dict(own) for action, own in self._squares.items()}}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Go on from what :meth:`saved` returned."""
        self._squares = {action: dict(own) for action, own in facts["squares"].items()}

    def _allocation(self, action: str, reply: Schema) -> Allocation:
        own = self.settings
        wanted = [
            spec for spec in reply.tensors if is_coded(spec, own) and own.part_of(spec.name) is None
        ]
        if ragged := [spec.name for spec in wanted if spec.ragged]:
            raise SettingsError([no_fixed_size("wire.budget", action, ragged[0])])

        def make(dealt: Mapping[str, str]) -> Schema:
            coded = coded_replies(reply, codecs_up(own, dealt=dealt))
            return as_sent(coded, own, (TensorSpec(SQUARES, (len(wanted),), torch.float32),))

        return Allocation(tuple(wanted), own.dealt, make)


def as_sent(coded: Schema, settings: WireSettings, beside: tuple[TensorSpec, ...] = ()) -> Schema:
    """Return the schema of coded replies with what is sent beside their tensors.

    Args:
        coded: With codecs, or as it is.
        settings: ``[wire]``.
        beside: Further tensors.
    """
    if settings.error_feedback == "ef21":
        beside = (*beside, TensorSpec(UPDATES, (1,), torch.int64))
    return replace(coded, tensors=(*coded.tensors, *beside), metrics=(*coded.metrics, CODING_ERROR))


def require_budget(
    settings: WireSettings, answers: Iterable[Tensors], reported: tuple[NumberSpec, ...]
) -> None:
    """Check a budget before a run begins, by the closed form of what clients send.

    Args:
        settings: ``[wire]``.
        answers: Tensors of the shapes that a client sends, of each kind of round.
        reported: What it reports of a training.

    Raises:
        SettingsError: It does not suffice for one of them.
    """
    schemas = [Schema.of(sent, (amount("examples"),), reported) for sent in answers if sent]
    if settings.budget is not None and schemas:
        budget = BitBudget(settings)
        budget.coded("train", max(schemas, key=lambda own: budget.least("train", own)))


def no_fixed_size(key: str, action: str, name: str) -> str:
    """Return why codecs of tensors of no fixed size are not chosen."""
    return (
        f"{key}: an answer to {action!r} has no fixed size ({name[:80]!r} has as many rows as a client's "
        "rank), so that it is not known what a codec saves: name a codec in wire.up"
    )


@dataclass
class PresetChoice:
    """Which presets ``"auto"`` stands for.

    Attributes:
        settings: ``[wire]``.
        seed: The experiment's, from which rounding is drawn.
        loss: Of the held-out rows; ``None`` where there are none.
        errors: Of each way and preset, the error of the mean in each round that was measured.
        losses: Of each way and preset, the held-out loss in each of these rounds under what was sent,
            moved by the mean that is read. Beside the ways, under what was sent, and moved by the mean.
        chosen: The preset of each way, once it is.
    """

    settings: WireSettings
    seed: int
    loss: HeldOutLoss | None = None
    errors: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    losses: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)
    _round: int = -1

    @property
    def ways(self) -> tuple[str, ...]:
        """The ways whose codec is chosen."""
        return tuple(way for way in (UP, DOWN) if getattr(self.settings, way) == AUTO)

    def codec(self, way: str) -> str:
        """Return the text of the codec of a way; empty as long as none is chosen."""
        return str(pipeline(self.chosen[way])) if way in self.chosen else ""

    def require_possible(self, exchange: Exchange) -> None:
        """Check that the answers to a request can be measured.

        Raises:
            SettingsError: They have no fixed size.
        """
        specs = [spec for spec in exchange.reply_schema.tensors if is_coded(spec, self.settings)]
        if ragged := [spec.name for spec in specs if spec.ragged]:
            raise SettingsError([no_fixed_size('wire.up = "auto"', exchange.action, ragged[0])])

    def measure(self, exchange: Exchange, replies: Collection[Reply]) -> None:
        """Measure what presets lose of the answers that count; choose, once there are enough rounds.

        Of a round the first answers count that have tensors which can be coded.
        """
        specs = [
            spec
            for spec in exchange.reply_schema.tensors
            if is_coded(spec, self.settings) and self.settings.part_of(spec.name) is None
        ]
        if self.chosen or exchange.round == self._round or not specs or not replies:
            return
        self._round = exchange.round
        mean, read = self._means(exchange, replies, specs)
        if not _square({spec.name: mean[spec.name] for spec in specs}):
            return
        for way, own in read.items():
            for preset, coded in own.items():
                lost = _lost(coded, mean)
                self.errors.setdefault(way, {}).setdefault(preset, []).append(lost)
        self._measure_loss(exchange, mean, read)
        if self._measured >= self.settings.auto_rounds:
            self.chosen = {way: self._best(way) for way in self.ways}

    def record(self) -> dict[str, Any]:
        """Return what was measured and chosen, as plain JSON."""
        costs = {way: own for way in self.ways if (own := loss_costs(self.losses, way))}
        return {"auto": {**self.saved(), **({"costs": costs} if costs else {})}}

    def saved(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as plain JSON; a copy, which stays as it is."""
        losses = {"losses": self.losses} if self.losses else {}
        return copy.deepcopy({"errors": self.errors, **losses, "chosen": self.chosen})

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Go on from what :meth:`saved` returned."""
        self.errors, self.chosen = facts["errors"], facts["chosen"]
        self.losses = facts.get("losses", {})

    @property
    def _measured(self) -> int:
        return max((len(own) for way in self.errors.values() for own in way.values()), default=0)

    def _best(self, way: str) -> str:
        """Return the preset of fewest bits that loses little enough, or the mildest."""
        costs, most = loss_costs(self.losses, way), self.settings.auto_loss
        if not costs:
            costs = {name: fmean(own) for name, own in self.errors[way].items()}
            most = self.settings.auto_error
        small = [name for name, cost in costs.items() if cost <= most]
        return small[-1] if small else next(iter(costs))

    def _means(
        self, exchange: Exchange, replies: Collection[Reply], specs: list[TensorSpec]
    ) -> tuple[Tensors, dict[str, dict[str, Tensors]]]:
        """Return the mean of changes, and of those that are coded what is read in each way and preset."""
        schema, names = Schema(tuple(specs)), {spec.name for spec in specs}
        everything = [
            spec
            for spec in exchange.reply_schema.tensors
            if spec.name in names
            or (
                spec.dtype.is_floating_point
                and not spec.ragged
                and not spec.name.startswith(PREFIX)
            )
        ]
        presets = CANDIDATES[UP] if UP in self.ways else ()
        mean, coded = _zeros(everything), {name: _zeros(specs) for name in presets}
        weights = {own.client: own.payload.numbers.get("examples", 1.0) for own in replies}
        for reply in sorted(replies, key=lambda own: own.client):
            change = _change(exchange, reply, everything)
            share = weights[reply.client] / sum(weights.values())
            _add(mean, change, share)
            own = {name: change[name] for name in names}
            for preset, total in coded.items():
                rng = self._up(exchange, reply.client)
                _add(total, _read(own, schema, preset, rng), share)
        found = {UP: coded} if coded else {}
        if DOWN in self.ways:
            rng = self._down(exchange)
            whole = {s.name: mean[s.name].to(s.dtype) for s in specs}
            found[DOWN] = {name: _read(whole, schema, name, rng) for name in CANDIDATES[DOWN]}
        return mean, found

    def _measure_loss(
        self, exchange: Exchange, mean: Tensors, read: Mapping[str, Mapping[str, Tensors]]
    ) -> None:
        """Measure the held-out loss of a round without a codec and in each way and preset.

        Nothing is kept where it cannot be measured: clients are sent different models, or no adapter of
        the server's model. Then presets are chosen by their errors.
        """
        if self.loss is None or len({id(data) for data in exchange.requests.values()}) > 1:
            return
        moves: dict[str, dict[str, Tensors]] = {BEFORE: {AS_IT_IS: {}}, MEAN: {AS_IT_IS: mean}}
        for way, presets in read.items():
            moves[way] = {preset: {**mean, **own} for preset, own in presets.items()}
        found: list[tuple[str, str, float]] = []
        for way, changes in moves.items():
            for preset, change in changes.items():
                one = self.loss(_moved(exchange, change), exchange.round)
                if one is None or not math.isfinite(one):
                    self.loss, self.losses = None, {}
                    return
                found.append((way, preset, one))
        for way, preset, one in found:
            self.losses.setdefault(way, {}).setdefault(preset, []).append(one)

    def _up(self, exchange: Exchange, client: int) -> Generators:
        action, round = exchange.action, exchange.round
        return lambda name: generator(self.seed, f"wire up {action} {name}", client, round)

    def _down(self, exchange: Exchange) -> Generators:
        action, round = exchange.action, exchange.round
        return lambda name: generator(self.seed, f"wire measured {action} {name}", round=round)


def loss_costs(losses: Mapping[str, Mapping[str, list[float]]], way: str) -> dict[str, float]:
    """Return what each preset costs of what the rounds that were measured took off the held-out loss.

    Args:
        losses: As of :class:`PresetChoice`.
        way: Up or down.

    Returns:
        sum_r (loss with the preset - loss without) / sum_r (loss before - loss without), below 0 where it
        happened to help; nothing where the loss was not measured, or did not fall.
    """
    if way not in losses:
        return {}
    before, mean = (sum(losses[key][AS_IT_IS]) for key in (BEFORE, MEAN))
    if before <= mean:
        return {}
    return {name: (sum(own) - mean) / (before - mean) for name, own in losses[way].items()}


def _moved(exchange: Exchange, change: Tensors) -> Tensors:
    """Return what clients were sent, moved by a change of what they reply; names are the adapter's."""
    sent, changes = exchange.sent_to(next(iter(exchange.requests))), exchange.changes_replied
    found = {}
    for name, own in sent.items():
        moves = name in change and change[name].shape == own.shape and not is_change(name, changes)
        found[name.removeprefix(ADAPTER)] = own.float() + change[name] if moves else own
    return found


def _change(exchange: Exchange, reply: Reply, specs: list[TensorSpec]) -> Tensors:
    """Return what a client's codec would be applied to."""
    sent, found = exchange.sent_to(reply.client), {}
    for spec in specs:
        own = reply.payload.tensors[spec.name]
        if is_difference(spec.name, own, sent, exchange.changes_replied):
            own = (own.float() - sent[spec.name].float()).to(spec.dtype)
        found[spec.name] = own
    return found


def _read(change: Tensors, schema: Schema, preset: str, rng: Generators) -> Tensors:
    """Return what is read of a change in a codec."""
    coded = schema.coded(lambda spec: str(pipeline(preset)))
    return decode(encode(Payload(change), coded, rng), coded).tensors


def _zeros(specs: list[TensorSpec]) -> Tensors:
    return {spec.name: torch.zeros(spec.shape) for spec in specs}


def _add(total: Tensors, tensors: Tensors, share: float) -> None:
    for name, own in total.items():
        own.add_(tensors[name].float(), alpha=share)


def _square(tensors: Tensors) -> float:
    return math.fsum(float(own.double().square().sum()) for own in tensors.values())


def _lost(coded: Tensors, mean: Tensors) -> float:
    """Return the squared error over the square of what was coded."""
    lost = _square({name: own.float() - mean[name] for name, own in coded.items()})
    return lost / _square({name: mean[name] for name in coded})
