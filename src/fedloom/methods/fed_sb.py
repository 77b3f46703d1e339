"""Fed-SB: between two fixed factors an r x r matrix is trained, sent and averaged, exactly.

    y = W x + s B R A x,    R <- sum_k p_k R_k,

B and A fixed and equal everywhere, s = alpha / rank as of LoRA: the product is linear in R, so the mean
of the R_k has the mean of the products, with any weights. Source: Singhal et al. 2025, "Fed-SB: A
Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated LoRA
Fine-Tuning", https://arxiv.org/abs/2502.15436. A layer sends r^2 numbers whatever its width; r is to be
larger than LoRA's, and so is the learning rate: a step of AdamW moves each entry of R by it, and B R A
by s r times it.

The paper's factors are singular vectors of the first step of full fine-tuning, which its code takes on
the pooled rows of all clients. Here that step is taken on public rows, and R begins with zeros in place
of the singular values: the model does not move before it is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal

from fedloom.accounting.costs import SERVER
from fedloom.aggregation.lora import A, B
from fedloom.errors import TrainingError
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.fixed_factors import (
    FixedFactors,
    R,
    first_gradient,
    singular_factors,
)
from fedloom.methods.bases.parameter_averaging import TRAIN_REPLY_NUMBERS, training_exchange
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import ADAPTERS_ALONE
from fedloom.methods.declaration import Absence, averaging
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors, join_parts, part_of
from fedloom.wire.messages import Exchange, Payload
from fedloom.wire.schema import Schema

FACTORS = "factors"
"""Part of the state, and slot of the client store, with the fixed factors, where no seed gives them."""

HAS = "has/"
"""Prefix of the id of a client that confirmed that it has them."""


class FedSBSettings(NamedSettings):
    """``[method] name = "fed_sb"``."""

    name: Literal["fed_sb"] = "fed_sb"
    factors: Literal["random", "weights", "gradient"] = "random"
    """What A and B are. random: orthonormal, drawn from the seed; they are not sent, and no row is read.
    weights: singular vectors of the layer's own weights, of the largest singular values; no row is read.
    gradient: singular vectors of the sign of a gradient, Adam's first step as in the paper, of the loss
    of public rows' completions or labels (public.labelled); they tell nothing of clients' rows. The last
    two are sent to each client once, as large as LoRA's factors."""


class FedSB(FixedFactors):
    """Averages R."""

    declares = averaging(
        "Fed-SB",
        "https://arxiv.org/abs/2502.15436",
        "adapted",
        "factors random, of the weights, or of a gradient on public rows; R begins with zeros",
        travels="an r x r matrix a layer, down and up; the fixed factors once, unless they are random",
        keeps="the fixed factors, unless they are random",
        absence=Absence(
            "the mean is over those that answered",
            "gets what all get; before it trains, in the same round, the fixed factors if it lacks them",
            "is in no mean",
        ),
    )
    reveals = ADAPTERS_ALONE
    taken = ("factors",)
    name = "fed_sb"

    def __init__(self, settings: FedSBSettings) -> None:
        """Keep the settings."""
        super().__init__(settings)
        self.settings = settings

    @classmethod
    def public_rows_needed(cls, settings: FedSBSettings) -> bool:
        """Return whether the factors are of a gradient."""
        return settings.factors == "gradient"

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also what factors of weights or of a gradient do not go with."""
        yield from super().check(view)
        kind, opening = view.method.factors, f'method.factors = "{view.method.factors}"'
        if kind != "random" and view.model is not None and view.model.quantization != "none":
            yield f'{opening} needs the weights, which are quantised: use "random"'
        if kind == "gradient" and view.public is not None and not view.public.labelled:
            yield f"{opening} needs public.labelled = true: its loss is of the rows' answers or labels"

    def kept(self, state: State) -> Mapping[str, Tensors]:
        """Return the factors in the state."""
        return {FACTORS: part_of(state.tensors, FACTORS)}

    def coordinates(self, state: State) -> Tensors:
        """Return R and what is no factor."""
        return {n: t for n, t in state.tensors.items() if not n.startswith(f"{FACTORS}/")}

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send the factors to those who lack them; send R, average the answers."""
        if self.settings.factors == "random":
            return (yield from super().round(state, cohort))
        factors = part_of(state.tensors, FACTORS) or self._decomposed(cohort)
        has = {int(name.removeprefix(HAS)) for name in state.numbers}
        if lacking := [client for client in cohort.presence.available if client not in has]:
            confirmed = yield Exchange.broadcast(
                FACTORS,
                cohort.round,
                tuple(lacking),
                Payload(factors),
                Schema.of(factors),
                Schema(numbers=TRAIN_REPLY_NUMBERS),
            )
            has |= set(confirmed.answered)
        asked = tuple(client for client in cohort.clients if client in has)
        own = self.coordinates(state)
        replies = yield training_exchange(replace(cohort, clients=asked), own)
        # who gave no answer may have lost them; who left gets them again if it is ever allowed again
        has -= (set(asked) - set(replies.answered)) | set(cohort.presence.left)
        mean = self.averaged(replies, cohort, own)
        numbers = {f"{HAS}{client:06d}": 1.0 for client in sorted(has)}
        return State(mean | join_parts(factors=factors), numbers)

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {**super().handlers(), FACTORS: keep_factors}

    def sent_to_unseen(self, state: State) -> Tensors:
        """Return the factors too."""
        return state.tensors

    def load(self, client: Client, payload: Payload) -> None:
        """Write the adapter that R stands for.

        Raises:
            TrainingError: R is not 0, and the client has not the factors that it is between.
        """
        sent = part_of(payload.tensors, FACTORS)
        kept = {FACTORS: sent} if sent else client.store
        own = self.coordinates(State(payload.tensors))
        if any(bool(t.any()) for name, t in own.items() if R in name):
            self._require(kept)
        self.place(client, own, kept)

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        self._require(client.store)
        return (yield from super()._train(client, payload))

    def _require(self, kept: Mapping[str, Tensors]) -> None:
        if self.settings.factors != "random" and not kept.get(FACTORS):
            raise TrainingError(
                "it lacks the fixed factors; the server sends them before the next round that it is in"
            )

    def factors(self, start: Tensors, seed: int, kept: Mapping[str, Tensors]) -> Tensors:
        """Return A and B; before there are any, those of the start, whose product is 0 as R is."""
        if self.settings.factors != "random":
            return kept.get(FACTORS) or {n: t for n, t in start.items() if A in n or B in n}
        return super().factors(start, seed, kept)

    def _decomposed(self, cohort: Cohort) -> Tensors:
        """Return the first singular vectors of each layer's weights, or of the first step on them."""
        server = self.server
        with server.ledger.measure(cohort.round, SERVER, FACTORS) as cost:
            before = server.model.flops
            server.model.write(self.fresh)
            weights = (
                server.model.base.read()
                if self.settings.factors == "weights"
                else {name: gradient.sign() for name, gradient in first_gradient(server).items()}
            )
            cost.flops = server.model.flops - before
        return singular_factors(weights, self.fresh)


def keep_factors(client: Client, payload: Payload) -> Payload:
    """Store the fixed factors."""
    client.store[FACTORS] = payload.tensors
    return Payload(numbers={"examples": len(client.share)})
