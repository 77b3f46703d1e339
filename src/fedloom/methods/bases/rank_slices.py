"""Base class of methods whose clients hold one adapter to different ranks: its first rows and columns.

The server's adapter has the rank of ``[adapter]``, the largest there is; ``clients.groups`` gives
clients smaller ones. All have the scaling of ``[adapter]``, so that a part of an adapter means the same
to all.

In the papers a client counts as zero in the ranks that it does not hold. Without any training, ranks 1,
1, 1 and 2 so shrink a second singular value to an eighth in three rounds under flexlora and faster
under hetlora, and a round of clients of small ranks alone makes both factors of the others zero, for
good. By default each slice of ranks is therefore averaged over those who hold it, and what nobody in a
round holds stays as it was (raFLoRA, 2026, https://arxiv.org/abs/2602.13486, equation 8; that it stays
is ours): clients that do not train leave the adapter as it is. ``slices = "padded"`` is what the papers
do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedloom.aggregation.lora import (
    only_factors,
    part_of_ranks,
    product_error,
    rank_in_use,
    rank_of,
    resized,
    slices,
    without_factors,
)
from fedloom.aggregation.means import weighted_mean
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.packed_factors import check_ranks, pack, ragged_specs, unpack
from fedloom.methods.bases.parameter_averaging import LEARNING_RATE, TRAIN_REPLY_NUMBERS
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.method import Method
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors
from fedloom.wire.messages import Exchange, Payload, Reply, encode
from fedloom.wire.schema import Schema


class SlicesSettings(NamedSettings):
    """Settings of such methods."""

    slices: Literal["holders", "padded"] = "holders"
    """holders: each slice of ranks is averaged over the clients that hold it. padded: over all, of whom
    those that do not hold it count as zeros there (the paper)."""


@dataclass(frozen=True)
class Slice:
    """What clients sent of some ranks.

    Attributes:
        rank: How many.
        factors: Those of a client, one each.
        weights: What each counts, at least 0, not all 0.
    """

    rank: int
    factors: tuple[Tensors, ...]
    weights: tuple[float, ...]

    @property
    def shares(self) -> list[float]:
        """The weights, so that they add up to 1."""
        return [weight / sum(self.weights) for weight in self.weights]


class SharesRanks(Method):
    """Averages slice by slice; :meth:`combined` defines what becomes of the slices."""

    mixed_ranks = True
    two_factors = True

    def __init__(self, settings: SlicesSettings) -> None:
        """Keep whom a slice of ranks is averaged over."""
        self.padded = settings.slices == "padded"

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send each client its part, put together what comes back."""
        ranks = self.ranks(state)
        replies = yield self._training(cohort, state.tensors, ranks)
        adapters = [unpack(reply.payload.tensors, state.tensors) for reply in replies]
        numbers = self.numbers(state, replies, adapters)
        before = self.still_held(State(state.tensors, numbers))
        held = self.held(replies, adapters, before)
        others = [without_factors(adapter) for adapter in adapters]
        found = {**self.combined(held, before), **self.mean(replies, adapters, others)}
        adapter = {name: found[name] for name in state.tensors}
        self._note(cohort, before, adapter, held)
        return State(adapter, numbers)

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self.train}

    def ranks(self, state: State) -> Mapping[int, int]:
        """Return the rank of each client in the next round; here the one that it is set up with."""
        return self.server.ranks

    def numbers(
        self, state: State, replies: Sequence[Reply], adapters: Sequence[Tensors]
    ) -> Mapping[str, float]:
        """Return the numbers of the next state; here none."""
        return {}

    def still_held(self, state: State) -> Tensors:
        """Return the adapter with zeros in ranks that nobody holds any more; here it as it is."""
        return state.tensors

    def check_of(self, ranks: Mapping[int, int]) -> Callable[[int, Payload], None]:
        """Return the check of replies, given what clients were sent; here of the same ranks."""
        return check_ranks(ranks)

    def combined(self, held: Sequence[Slice], before: Tensors) -> Tensors:
        """Return the factors of the next adapter, of which every client will get the first rows."""
        raise TypeError(f"{type(self).__name__} must define combined(held, before)")

    def load(self, client: Client, payload: Payload) -> None:
        """Write as much of the adapter as the client holds."""
        client.model.write(resized(payload.tensors, rank_of(client.initial)))

    def weights(self, replies: Sequence[Reply], adapters: Sequence[Tensors]) -> list[float]:
        """Return what each client counts: here its rows."""
        return [reply.payload.numbers["examples"] for reply in replies]

    def held(
        self, replies: Sequence[Reply], adapters: Sequence[Tensors], before: Tensors
    ) -> list[Slice]:
        """Return what is averaged, slice by slice of the ranks of the server's adapter ``before``.

        Where slices are padded, there is one, of all.
        """
        rank = rank_of(before)
        if self.padded:
            factors = tuple(only_factors(adapter) for adapter in adapters)
            return [Slice(rank, factors, tuple(self.weights(replies, adapters)))]
        found = []
        for low, high, holders in slices([rank_of(adapter) for adapter in adapters], rank):
            own = [adapters[k] for k in holders]
            weights = self.weights([replies[k] for k in holders], own) if own else [1.0]
            parts = tuple(part_of_ranks(adapter, low, high) for adapter in own or [before])
            found.append(Slice(high - low, parts, tuple(weights)))
        return found

    def mean(
        self, replies: Sequence[Reply], adapters: Sequence[Tensors], others: Sequence[Tensors]
    ) -> Tensors:
        """Return the mean of what is not a factor, which all clients hold."""
        return weighted_mean(others, self.weights(replies, adapters))

    def _note(
        self, cohort: Cohort, before: Tensors, adapter: Tensors, held: Sequence[Slice]
    ) -> None:
        """Put into the record what is lost and the rank in use, and warn where that has fallen."""
        error = product_error(adapter, *flat(held))
        cohort.notes.update({} if error is None else {"aggregation_error": error})
        was, now = rank_in_use(before), rank_in_use(adapter)
        cohort.notes["rank_in_use"] = now
        if now < was:
            cohort.warnings.append(
                f"round {cohort.round}: the rank in use of the shared adapter fell from {was:g} to "
                f"{now:g} of {rank_of(adapter)} (mean over the layers)"
                + (
                    '; method.slices = "holders" keeps what a round\'s clients do not hold'
                    if self.padded
                    else ""
                )
            )

    def _training(self, cohort: Cohort, adapter: Tensors, ranks: Mapping[int, int]) -> Exchange:
        specs = ragged_specs(adapter)
        request = Schema(specs, (LEARNING_RATE,))
        reply = Schema(specs, TRAIN_REPLY_NUMBERS, cohort.reported)
        numbers = {"learning_rate": cohort.learning_rate}
        parts = {
            rank: encode(Payload(pack(resized(adapter, rank)), numbers), request)
            for rank in {ranks[client] for client in cohort.clients}
        }
        requests = {client: parts[ranks[client]] for client in cohort.clients}
        return Exchange("train", cohort.round, request, reply, requests, self.check_of(ranks))

    def train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        """Train what the client was sent, and return all of it."""
        client.model.write(unpack(payload.tensors, client.initial))
        result = yield from client.training_steps(payload.numbers["learning_rate"])
        sent = pack(client.model.read())
        return Payload(sent, {"examples": len(client.share)}, result.metrics)


def flat(held: Sequence[Slice]) -> tuple[list[Tensors], list[float]]:
    """Return all factors of all slices, whose products add up with the shares beside them."""
    factors = [own for one in held for own in one.factors]
    return factors, [share for one in held for share in one.shares]
