"""LoRA-A2: a client sends only the ranks that matter to it, of one factor at a time.

Source: Koo et al. 2024, "Towards Robust and Efficient Federated Low-Rank Adaptation with Heterogeneous
Clients", https://arxiv.org/abs/2410.22815, algorithms 1 and 2. Rounds train B and A in turn. A client
first trains all ranks of the factor, on trial; of what each rank added to its layer's product it takes
the Frobenius norm, chooses the best over the whole model, goes back to what it received, and trains
these alone. It sends their changes, and which they are; the server adds the mean of the changes, in
which those who did not choose a rank count as no change.

On a linear stand-in ranks chosen at random are worse for the first rounds and better in the end
(``choice = "random"``, which needs no trial): what helps is that the server's adapter is larger than
what a client sends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fedloom.accounting.traffic import ParameterTraffic, Traffic
from fedloom.aggregation.lora import A, B, factor_pairs, rank_of, without_factors
from fedloom.aggregation.means import weighted_mean
from fedloom.aggregation.rank_choice import best_ranks, rank_scores
from fedloom.errors import MessageError
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.alternating_factors import fixed_names, trained_factor
from fedloom.methods.bases.masked_ranks import MaskedRanks
from fedloom.methods.bases.parameter_averaging import training_exchange
from fedloom.methods.contract.checks import optimizer_anew, require_linear_layers
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import ADAPTERS_ALONE, Method, ServerSide
from fedloom.methods.declaration import AVERAGED, EACH_ANSWER, OWN_STEPS, Declaration, no
from fedloom.randomness import generator
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors, tensor_bytes
from fedloom.training.settings import Part
from fedloom.wire.messages import Exchange, Payload
from fedloom.wire.schema import Schema, TensorSpec

CHANGES, CHOSEN = "changes", "chosen"
"""Tensors of a reply: changes of the chosen ranks, one after the other; and which they are."""


class LoRAA2Settings(NamedSettings):
    """``[method] name = "lora_a2"``."""

    name: Literal["lora_a2"] = "lora_a2"
    ranks: int = Field(default=2, ge=1)
    """Ranks that a client sends of a layer, on average over the layers; at most adapter.rank."""
    choice: Literal["score", "random"] = "score"
    """score: the ranks that changed the products most in a training on trial. random: from the seed."""
    b_rate: float = Field(default=5.0, gt=0, le=1000)
    """Times the learning rate in rounds that train B (the paper's 5)."""


class LoRAA2(Method):
    """Adds the mean of the changes of chosen ranks."""

    declares = Declaration(
        "LoRA-A2",
        "https://arxiv.org/abs/2410.22815",
        "adapted",
        "what is no factor, such as a head, is trained in every round and averaged",
        "FedLLM",
        "the adapter down; up the changes of the chosen ranks of one factor, and a map of them",
        "nothing",
        secure_aggregation=EACH_ANSWER,
        client_privacy=no("which ranks a client chose tells of its rows"),
        row_privacy=OWN_STEPS,
        asynchronous=no("a round's answers have one factor, and the next round's the other"),
        compression=no("a client sends few numbers already, each client those of other ranks"),
        absence=AVERAGED,
        problem="slow links",
    )
    reveals = ADAPTERS_ALONE
    taken = ("ranks", "choice", "b_rate")
    two_factors = True

    def __init__(self, settings: LoRAA2Settings) -> None:
        """Keep the settings."""
        self.settings = settings
        self.trainings = 1 if settings.choice == "random" else 2

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also a budget above the rank, and what cannot be bounded or go on."""
        yield from super().check(view)
        yield from optimizer_anew(view, "trains another factor in the next round")
        if view.adapter is not None and view.method.ranks > view.adapter.rank:
            yield (
                f"method.ranks = {view.method.ranks} is above adapter.rank = {view.adapter.rank}, of "
                "which clients send some: lower it, or raise adapter.rank"
            )
        if view.admission is not None and view.admission.max_change is not None:
            yield (
                f"admission.max_change: clients of method.name = {view.name!r} send changes of ranks of "
                "their own choice, which it does not bound: use admission.max_value"
            )

    def setup(self, server: ServerSide) -> None:
        """Check that the factors are of linear layers."""
        super().setup(server)
        require_linear_layers(server.model.stacked, 'method.name = "lora_a2"')

    def trainings_of(self, round: int, rounds: int) -> int:
        """Return two, the one on trial too; one where ranks are random."""
        return self.trainings

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send the adapter; add the mean of the changes."""
        factor = trained_factor(cohort.round)
        replies = yield self._training(cohort, state.tensors, factor)
        weights = [reply.payload.numbers["examples"] for reply in replies]
        sent = [reply.payload.tensors for reply in replies]
        changes = [scattered(own, state.tensors, factor) for own in sent]
        mean = weighted_mean(changes, weights)
        others = weighted_mean(
            [{n: own[n] for n in without_factors(state.tensors)} for own in sent], weights
        )
        moved = {name: state.tensors[name] + change for name, change in mean.items()}
        return State({**state.tensors, **moved, **others})

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train}

    def traffic(self, adapter: Tensors) -> Traffic:
        """Count the adapter down, and changes and map up, of layers of the mean width."""
        own = tensor_bytes(without_factors(adapter)) + len(factor_pairs(adapter)) * rank_of(adapter)
        up = {
            factor: self.settings.ranks * sum(4 * own for own in _widths(adapter, factor))
            for factor in (A, B)
        }
        return ParameterTraffic(tensor_bytes(adapter), own + up[B], up_even=own + up[A])

    def _training(self, cohort: Cohort, adapter: Tensors, factor: str) -> Exchange:
        widths, rank = _widths(adapter, factor), rank_of(adapter)
        count = self.settings.ranks * len(widths)
        most = sum(sorted([width for width in widths for _ in range(rank)])[-count:])
        others = Schema.of(without_factors(adapter)).tensors
        reply = (
            TensorSpec(CHANGES, (most,), torch.float32, ragged=True),
            TensorSpec(CHOSEN, (len(widths), rank), torch.bool),
            *others,
        )

        def check(client: int, payload: Payload) -> None:
            chosen, changes = payload.tensors[CHOSEN], payload.tensors[CHANGES]
            numbers = int((chosen.sum(1) * torch.tensor(widths)).sum())
            if int(chosen.sum()) != count or len(changes) != numbers:
                raise MessageError(
                    f"it sent {int(chosen.sum())} ranks with {len(changes)} numbers; {count} ranks are "
                    f"asked for, and those that it chose have {numbers}"
                )

        return training_exchange(cohort, adapter, answered=reply, check=check)

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        received, factor = payload.tensors, trained_factor(client.round)
        rate = payload.numbers["learning_rate"] * (self.settings.b_rate if factor == B else 1.0)
        fixed = fixed_names(client.model.parameters, client.round)
        layers, rank = len(factor_pairs(received)), rank_of(received)
        client.model.write(received)
        if self.settings.choice == "random":
            rng = generator(client.seed, "ranks", client.id, client.round)
            scores, part = torch.from_numpy(rng.random((layers, rank))), Part(0, 1)
        else:
            yield from client.training_steps(rate, purpose="trial ", frozen=fixed, part=Part(0, 2))
            scores = rank_scores(received, client.model.read(), factor)
            client.model.write(received)
            part = Part(1, 2)
        chosen = best_ranks(scores, self.settings.ranks * layers)
        masked = MaskedRanks(received, chosen, client.model.device)
        result = yield from client.training_steps(
            rate, masked.before, masked.after, frozen=fixed, part=part
        )
        trained = client.model.read()
        sent = {**gathered(received, trained, chosen, factor), **without_factors(trained)}
        return Payload(sent, {"examples": len(client.share)}, result.metrics)


def gathered(before: Tensors, after: Mapping[str, Tensor], chosen: Tensor, factor: str) -> Tensors:
    """Return the changes of chosen ranks of a factor, one after the other, and which they are."""
    parts = []
    for own, (a, b) in zip(chosen, factor_pairs(before).values(), strict=True):
        change = after[a] - before[a] if factor == A else (after[b] - before[b]).T
        parts.append(change[own].flatten())
    return {CHANGES: torch.cat(parts), CHOSEN: chosen}


def scattered(sent: Tensors, like: Tensors, factor: str) -> Tensors:
    """Return the changes of a whole factor of all layers, 0 in ranks that were not chosen."""
    found, begin = {}, 0
    for own, (a, b) in zip(sent[CHOSEN], factor_pairs(like).values(), strict=True):
        change = torch.zeros_like(like[a] if factor == A else like[b].T.contiguous())
        size = int(own.sum()) * change.shape[1]
        change[own] = sent[CHANGES][begin : begin + size].view(-1, change.shape[1])
        begin += size
        found[a if factor == A else b] = change if factor == A else change.T.contiguous()
    return found


def _widths(adapter: Tensors, factor: str) -> list[int]:
    """Return of each layer how many numbers a rank of the factor has."""
    return [
        adapter[a].shape[1] if factor == A else len(adapter[b])
        for a, b in factor_pairs(adapter).values()
    ]
