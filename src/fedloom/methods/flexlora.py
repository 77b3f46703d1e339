"""FlexLoRA and HetLoRA: clients of different ranks share one adapter, each as much of it as it can hold.

====================  ==================================================================================
``flexlora``          the mean of the clients' products, cut to each rank by its singular values. Bai et
                      al. 2024, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks
                      and Client Resources", https://arxiv.org/abs/2402.11505
``hetlora``           the mean of factors, weighted by the norms of the clients' products; a client gets
                      the first rows. Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of
                      On-Device Foundation Models", https://arxiv.org/abs/2401.06432; its pruning of ranks
                      while training is not built
====================  ==================================================================================

The server's adapter has the rank of ``[adapter]``, the largest there is; ``clients.groups`` gives clients
smaller ones. All have the scaling of ``[adapter]``, so that a part of an adapter means the same to all.

In both papers a client counts as zero in the ranks that it does not hold. Without any training, ranks 1,
1, 1 and 2 so shrink a second singular value to an eighth in three rounds under flexlora and faster under
hetlora, and a round of clients of small ranks alone makes both factors of the others zero, for good. By
default each slice of ranks is therefore averaged over those who hold it, and what nobody in a round holds
stays as it was (raFLoRA, 2026, https://arxiv.org/abs/2602.13486, equation 8; that it stays is ours):
clients that do not train leave the adapter as it is. ``slices = "padded"`` is what the papers do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fedloom.aggregation.lora import (
    A,
    nearest,
    norm,
    only_factors,
    part_of_ranks,
    product_error,
    rank_in_use,
    rank_of,
    resized,
    slices,
    stacked,
    without_factors,
)
from fedloom.aggregation.means import weighted_mean
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.packed_factors import check_ranks, pack, ragged_specs, unpack
from fedloom.methods.bases.parameter_averaging import LEARNING_RATE, TRAIN_REPLY_NUMBERS
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.method import ADAPTERS_ALONE, Method
from fedloom.methods.declaration import (
    AVERAGED,
    CODED_CHANGES,
    EACH_ANSWER,
    OWN_STEPS,
    PRODUCT_BITS,
    TOGETHER,
    Declaration,
    no,
)
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors
from fedloom.wire.messages import Exchange, Payload, Reply, encode
from fedloom.wire.schema import Schema


class FlexLoRASettings(NamedSettings):
    """``[method] name = "flexlora"``."""

    name: Literal["flexlora"] = "flexlora"
    slices: Literal["holders", "padded"] = "holders"
    """holders: each slice of ranks is averaged over the clients that hold it. padded: over all, of whom
    those that do not hold it count as zeros there (the paper)."""


class HetLoRASettings(FlexLoRASettings):
    """``[method] name = "hetlora"``."""

    name: Literal["hetlora"] = "hetlora"  # type: ignore[assignment]


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


class FlexLoRA(Method):
    """The nearest adapters of each client's rank to the mean of products."""

    declares = Declaration(
        "FlexLoRA",
        "https://arxiv.org/abs/2402.11505",
        "adapted",
        'each slice of ranks is averaged over its holders; slices = "padded" is the paper\'s',
        "FedLLM",
        "the adapter at the client's rank, down and up",
        "nothing",
        secure_aggregation=EACH_ANSWER,
        client_privacy=no("the factors are multiplied, which noise on a sum does not bound"),
        row_privacy=OWN_STEPS,
        asynchronous=TOGETHER,
        compression=CODED_CHANGES,
        compression_bits=PRODUCT_BITS,
        absence=AVERAGED,
    )
    reveals = ADAPTERS_ALONE
    taken = ("slices",)

    mixed_ranks = True
    two_factors = True

    def __init__(self, settings: FlexLoRASettings) -> None:
        """Keep whom a slice of ranks is averaged over."""
        self.padded = settings.slices == "padded"

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send each client its part, put together what comes back."""
        replies = yield self._training(cohort, state.tensors)
        adapters = [unpack(reply.payload.tensors, state.tensors) for reply in replies]
        held = self.held(replies, adapters, state.tensors)
        others = [without_factors(adapter) for adapter in adapters]
        found = {**self.combined(held, state.tensors), **self.mean(replies, adapters, others)}
        adapter = {name: found[name] for name in state.tensors}
        self._note(cohort, state.tensors, adapter, held)
        return State(adapter)

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train}

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

    def combined(self, held: Sequence[Slice], before: Tensors) -> Tensors:
        """Return the factors of the next adapter, of which every client will get the first rows."""
        return nearest(stacked(*_flat(held)), rank_of(before), None if self.padded else before)

    def mean(
        self, replies: Sequence[Reply], adapters: Sequence[Tensors], others: Sequence[Tensors]
    ) -> Tensors:
        """Return the mean of what is not a factor, which all clients hold."""
        return weighted_mean(others, self.weights(replies, adapters))

    def _note(
        self, cohort: Cohort, before: Tensors, adapter: Tensors, held: Sequence[Slice]
    ) -> None:
        """Put into the record what is lost and the rank in use, and warn where that has fallen."""
        error = product_error(adapter, *_flat(held))
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

    def _training(self, cohort: Cohort, adapter: Tensors) -> Exchange:
        ranks, specs = self.server.ranks, ragged_specs(adapter)
        request = Schema(specs, (LEARNING_RATE,))
        reply = Schema(specs, TRAIN_REPLY_NUMBERS, cohort.reported)
        numbers = {"learning_rate": cohort.learning_rate}
        parts = {
            rank: encode(Payload(pack(resized(adapter, rank)), numbers), request)
            for rank in {ranks[client] for client in cohort.clients}
        }
        requests = {client: parts[ranks[client]] for client in cohort.clients}
        return Exchange("train", cohort.round, request, reply, requests, check_ranks(ranks))

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        client.model.write(unpack(payload.tensors, client.initial))
        result = yield from client.training_steps(payload.numbers["learning_rate"])
        sent = pack(client.model.read())
        return Payload(sent, {"examples": len(client.share)}, result.metrics)


class HetLoRA(FlexLoRA):
    """Averages factors, by the norms of products."""

    declares = Declaration(
        "HetLoRA",
        "https://arxiv.org/abs/2401.06432",
        "adapted",
        "ranks are not pruned; slices as in FlexLoRA",
        "FedLLM",
        "the adapter at the client's rank, down and up",
        "nothing",
        secure_aggregation=EACH_ANSWER,
        client_privacy=no("answers are weighed by their own norms"),
        row_privacy=OWN_STEPS,
        asynchronous=TOGETHER,
        compression=CODED_CHANGES,
        absence=AVERAGED,
    )

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


def _flat(held: Sequence[Slice]) -> tuple[list[Tensors], list[float]]:
    """Return all factors of all slices, whose products add up with the shares beside them."""
    factors = [own for one in held for own in one.factors]
    return factors, [share for one in held for share in one.shares]
