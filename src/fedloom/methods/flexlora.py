"""FlexLoRA and HetLoRA: clients of different ranks share one adapter, each as much of it as it can hold.

====================  ==================================================================================
``flexlora``          the mean of the clients' products, cut to each rank by its singular values. Bai et
                      al. 2024, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks
                      and Client Resources", https://arxiv.org/abs/2402.11505
``hetlora``           factors filled up with zeros and averaged, weighted by the norms of the clients'
                      products; a client gets the first rows. Cho et al. 2024, "Heterogeneous LoRA for
                      Federated Fine-tuning of On-Device Foundation Models",
                      https://arxiv.org/abs/2401.06432; its pruning of ranks while training is not built
====================  ==================================================================================

The server's adapter has the rank of ``[adapter]``, the largest there is; ``clients.groups`` gives clients
smaller ones. All have the scaling of ``[adapter]``, so that a part of an adapter means the same to all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fedloom.aggregation.lora import norm, product_error, rank_of, resized, truncated
from fedloom.aggregation.means import weighted_mean
from fedloom.checkpoint import State
from fedloom.messages import Exchange, Payload, Reply, Schema, Tensors, encode
from fedloom.methods.base import (
    ADAPTERS_ALONE,
    LEARNING_RATE,
    TRAIN_REPLY_NUMBERS,
    Client,
    Cohort,
    Handler,
    Method,
    Round,
)
from fedloom.methods.ranks import check_ranks, pack, ragged_specs, unpack
from fedloom.settings import Settings


class FlexLoRASettings(Settings):
    """``[method] name = "flexlora"``."""

    name: Literal["flexlora"] = "flexlora"


class HetLoRASettings(Settings):
    """``[method] name = "hetlora"``."""

    name: Literal["hetlora"] = "hetlora"


class FlexLoRA(Method):
    """The nearest adapters of each client's rank to the mean of products."""

    reveals = ADAPTERS_ALONE

    mixed_ranks = True

    def __init__(self, settings: FlexLoRASettings | HetLoRASettings) -> None:
        """Take no settings beyond the name."""

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send each client its part, put together what comes back."""
        replies = yield self._training(cohort, state.tensors)
        adapters = [unpack(reply.payload.tensors, state.tensors) for reply in replies]
        weights = self.weights(replies, adapters)
        adapter = self.combined(adapters, weights, rank_of(state.tensors))
        error = product_error(adapter, adapters, weights)
        cohort.notes.update({} if error is None else {"aggregation_error": error})
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

    def combined(self, adapters: Sequence[Tensors], weights: Sequence[float], rank: int) -> Tensors:
        """Return the next adapter, of which every client will get the first rows."""
        return truncated(adapters, weights, rank)

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

    def _train(self, client: Client, payload: Payload) -> Payload:
        client.model.write(unpack(payload.tensors, client.initial))
        result = client.train(payload.numbers["learning_rate"])
        sent = pack(client.model.read())
        return Payload(sent, {"examples": len(client.share)}, result.metrics)


class HetLoRA(FlexLoRA):
    """Averages factors filled up with zeros, by the norms of products."""

    def weights(self, replies: Sequence[Reply], adapters: Sequence[Tensors]) -> list[float]:
        """Return the norms; rows where all are zero."""
        norms = [norm(adapter) for adapter in adapters]
        return norms if sum(norms) > 0 else super().weights(replies, adapters)

    def combined(self, adapters: Sequence[Tensors], weights: Sequence[float], rank: int) -> Tensors:
        """Fill up and average."""
        return weighted_mean([resized(adapter, rank) for adapter in adapters], weights)
