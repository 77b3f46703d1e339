"""HetLoRA: factors of clients of different ranks are averaged by the norms of their products, and pruned.

Source: Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
https://arxiv.org/abs/2401.06432; the pruning after two re-implementations. With ``pruning`` (gamma)
below 1, a client of rank r adds to its loss ``penalty`` times the sum over layers of ||B[:, i:]||
||A[i:, :]||, for the tail of ranks from i = floor(gamma r) on. Where this sum is smaller after a
round's training than before, the client cuts the tail off, and has that rank from then on: ranks never
grow. With gamma = 0.99 it is one rank a round, and with a penalty nearly every client that trains goes
down to ``least_rank``: watch ``ranks`` in ``rounds.jsonl``. Ranks that nobody holds any more are zero in
what is served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from fedloom.aggregation.lora import A, factor_pairs, norm, rank_of, resized
from fedloom.aggregation.means import weighted_mean
from fedloom.aggregation.rank_choice import pruned_rank, tail_norm
from fedloom.errors import MessageError
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.masked_ranks import MaskedRanks
from fedloom.methods.bases.packed_factors import FACTORS, pack, unpack
from fedloom.methods.bases.rank_slices import SharesRanks, Slice, SlicesSettings
from fedloom.methods.contract.checks import optimizer_anew
from fedloom.methods.contract.client import Client, Trainings
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import ADAPTERS_ALONE
from fedloom.methods.declaration import (
    AVERAGED,
    CODED_CHANGES,
    EACH_ANSWER,
    OWN_STEPS,
    TOGETHER,
    Declaration,
    no,
)
from fedloom.tensors import State, Tensors
from fedloom.training.results import StepHook
from fedloom.wire.messages import Payload, Reply

RANK = "rank"
"""Slot of the client store with a client's rank; before its id and ``/`` a number of the state."""


class HetLoRASettings(SlicesSettings):
    """``[method] name = "hetlora"``."""

    name: Literal["hetlora"] = "hetlora"
    pruning: float = Field(default=1.0, gt=0, le=1)
    """gamma: share of its ranks that a client keeps where the others lose weight in a round; 1 prunes
    nothing (the paper's is 0.99: one rank a round)."""
    penalty: float = Field(default=0.01, ge=0)
    """Of pruning: weight of the norms of the ranks that would be cut off, in a client's loss."""
    least_rank: int = Field(default=1, ge=1)
    """Of pruning: the rank that no client falls below."""


class HetLoRA(SharesRanks):
    """Averages factors, by the norms of products."""

    declares = Declaration(
        "HetLoRA",
        "https://arxiv.org/abs/2401.06432",
        "adapted",
        "ranks are pruned where method.pruning says so; slices as in FlexLoRA",
        "FedLLM",
        "the adapter at the client's rank, down and up",
        "its rank, where ranks are pruned",
        secure_aggregation=EACH_ANSWER,
        client_privacy=no("answers are weighed by their own norms"),
        row_privacy=OWN_STEPS,
        asynchronous=TOGETHER,
        compression=CODED_CHANGES,
        absence=AVERAGED,
    )
    reveals = ADAPTERS_ALONE
    taken = ("slices", "pruning", "penalty", "least_rank")

    def __init__(self, settings: HetLoRASettings) -> None:
        """Keep the settings."""
        super().__init__(settings)
        self.settings, self.prunes = settings, settings.pruning < 1

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also what pruning does not go with, and its settings without it."""
        yield from super().check(view)
        if view.method.pruning < 1:
            yield from optimizer_anew(view, "prunes ranks between rounds")
            return
        for name in ("penalty", "least_rank"):
            if getattr(view.method, name) != type(view.method).model_fields[name].default:
                yield (
                    f"method.{name} is of pruning: set method.pruning below 1, such as 0.99, or leave "
                    "it out"
                )

    def round(self, state: State, cohort: Cohort) -> Round:
        """Play a round; say which ranks clients have after it."""
        after = yield from super().round(state, cohort)
        if self.prunes:
            ranks = self.ranks(after)
            cohort.details["ranks"] = {
                str(c): ranks[c] for c in cohort.presence.members if c in ranks
            }
        return after

    def ranks(self, state: State) -> Mapping[int, int]:
        """Return those that clients have pruned themselves to."""
        opening = f"{RANK}/"
        pruned = {
            int(name.removeprefix(opening)): int(value)
            for name, value in state.numbers.items()
            if name.startswith(opening)
        }
        return {**self.server.ranks, **pruned}

    def numbers(
        self, state: State, replies: Sequence[Reply], adapters: Sequence[Tensors]
    ) -> Mapping[str, float]:
        """Return the ranks of all clients that have pruned theirs."""
        if not self.prunes:
            return {}
        had = self.ranks(state)
        pruned = {
            f"{RANK}/{reply.client:06d}": float(rank_of(own))
            for reply, own in zip(replies, adapters, strict=True)
            if rank_of(own) < had[reply.client]
        }
        return {**state.numbers, **pruned}

    def still_held(self, state: State) -> Tensors:
        """Return the adapter with zeros in the ranks that all clients have pruned."""
        if not self.prunes:
            return state.tensors
        most = max(self.ranks(state).values())
        return resized(resized(state.tensors, most), rank_of(state.tensors))

    def check_of(self, ranks: Mapping[int, int]) -> Callable[[int, Payload], None]:
        """Return the check that a reply has the rank that its client was sent, or that one pruned."""
        if not self.prunes:
            return super().check_of(ranks)

        def check(client: int, payload: Payload) -> None:
            found, own = len(payload.tensors[FACTORS]), ranks[client]
            if found not in (own, self._pruned(own)):
                raise MessageError(
                    f"its factors have rank {found}, and it was sent rank {own}, which it may prune to "
                    f"{self._pruned(own)}"
                )

        return check

    def weights(self, replies: Sequence[Reply], adapters: Sequence[Tensors]) -> list[float]:
        """Return the norms; rows where all are zero."""
        norms = [norm(adapter) for adapter in adapters]
        return norms if sum(norms) > 0 else super().weights(replies, adapters)

    def combined(self, held: Sequence[Slice], before: Tensors) -> Tensors:
        """Average each slice, with zeros in the ranks that a client does not hold of it."""
        means = [
            weighted_mean([resized(own, one.rank) for own in one.factors], one.weights)
            for one in held
        ]
        return {
            name: torch.cat([mean[name] for mean in means], 0 if A in name else 1).contiguous()
            for name in means[0]
        }

    def load(self, client: Client, payload: Payload) -> None:
        """Write as much of the adapter as the client still holds."""
        most = rank_of(client.initial)
        own = client.store.get(RANK)
        rank = int(own[RANK]) if own else most
        client.model.write(resized(resized(payload.tensors, rank), most))

    def train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        """Train what the client was sent; cut the tail off where it has lost weight."""
        if not self.prunes:
            return (yield from super().train(client, payload))
        received = unpack(payload.tensors, client.initial)
        rank, most = rank_of(received), rank_of(client.initial)
        first, start = self._pruned(rank), resized(received, most)
        held = torch.zeros(len(factor_pairs(start)), most, dtype=torch.bool)
        held[:, :rank] = True
        masked = MaskedRanks(start, held, client.model.device)
        penalty = tail_gradient(first, self.settings.penalty)

        def before_step(parameters: Mapping[str, nn.Parameter]) -> None:
            penalty(parameters)
            masked.before(parameters)

        client.model.write(start)
        rate = payload.numbers["learning_rate"]
        result = yield from client.training_steps(rate, before_step, masked.after)
        trained = resized(client.model.read(), rank)
        if tail_norm(trained, first) < tail_norm(received, first):
            rank = first
        client.store[RANK] = {RANK: torch.tensor([rank])}
        sent = pack(resized(trained, rank))
        return Payload(sent, {"examples": len(client.share)}, result.metrics)

    def _pruned(self, rank: int) -> int:
        return pruned_rank(rank, self.settings.pruning, self.settings.least_rank)


def tail_gradient(first: int, weight: float) -> StepHook:
    """Return a hook that adds the gradient of weight * :func:`tail_norm` to the gradients.

    Of a product of norms at 0 it is 0.
    """

    def add(parameters: Mapping[str, nn.Parameter]) -> None:
        for pair in factor_pairs(parameters).values():
            down, up = (parameters[name] for name in pair)
            tails = (down.detach()[first:], up.detach()[:, first:])
            if (
                down.grad is None
                or up.grad is None
                or not weight
                or not all(t.numel() for t in tails)
            ):
                continue
            below, above = (tail.norm() for tail in tails)
            down.grad[first:] += weight * above * tails[0] / below.clamp(min=1e-30)
            up.grad[:, first:] += weight * below * tails[1] / above.clamp(min=1e-30)

    return add
