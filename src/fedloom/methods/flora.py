"""FLoRA: clients' factors are stacked, so that their product is the mean of products at any ranks.

Source: Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous
Low-Rank Adaptations", https://arxiv.org/abs/2409.05976. Every round begins with fresh factors, drawn by
each client; the server stacks what comes back and everybody adds the product to its backbone.
Clients may have different ranks (``clients.groups``), each with the scaling of ``[adapter]``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from fedloom.aggregation.lora import (
    A,
    only_factors,
    stacked,
    without_factors,
)
from fedloom.federation.protocol import Cohort
from fedloom.methods.bases.backbone_additions import ADDITION_COUNT, ADDITIONS, BackboneAdditions
from fedloom.methods.bases.packed_factors import check_ranks, pack, ragged_specs, unpack
from fedloom.methods.bases.parameter_averaging import LEARNING_RATE, TRAIN_REPLY_NUMBERS
from fedloom.methods.contract.checks import optimizer_anew
from fedloom.methods.contract.client import Client
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import ADAPTERS_ALONE
from fedloom.methods.declaration import adding_to_backbone
from fedloom.randomness import derive_seed
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import Tensors
from fedloom.wire.messages import Exchange, Payload, Reply
from fedloom.wire.schema import Schema


class FLoRASettings(NamedSettings):
    """``[method] name = "flora"``."""

    name: Literal["flora"] = "flora"


class FLoRA(BackboneAdditions):
    """Stacks the factors of all clients; begins every round with fresh ones."""

    declares = adding_to_backbone(
        "FLoRA",
        "https://arxiv.org/abs/2409.05976",
        "exact",
        "",
        travels="factors up, those of all stacked down",
    )
    reveals = ADAPTERS_ALONE
    no_start = (
        "every round begins with fresh factors; merge the adapter into its model (fedloom export) and "
        "give that as model.path, or use fedex_lora"
    )

    mixed_ranks = True

    def __init__(self, settings: FLoRASettings) -> None:
        """Take no settings beyond the name."""

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also that no optimizer can go on with factors that are new."""
        yield from super().check(view)
        yield from optimizer_anew(
            view, "begins every round with fresh factors, of which an optimizer knows nothing"
        )

    def kept(self, adapter: Tensors) -> Tensors:
        """Return what is not a factor, such as a classification head."""
        return without_factors(adapter)

    def training(self, cohort: Cohort, adapter: Tensors, additions: int) -> Exchange:
        """Have clients train factors of their own ranks."""
        numbers = {LEARNING_RATE.name: cohort.learning_rate, ADDITIONS: float(additions)}
        return Exchange.broadcast(
            "train",
            cohort.round,
            cohort.clients,
            Payload(adapter, numbers),
            Schema.of(adapter, (LEARNING_RATE, ADDITION_COUNT)),
            Schema(ragged_specs(self.fresh), TRAIN_REPLY_NUMBERS, cohort.reported),
            check_ranks(self.server.ranks),
        )

    def combined(self, replies: Sequence[Reply], cohort: Cohort) -> tuple[Tensors, Tensors]:
        """Stack, weighted by rows."""
        weights = [reply.payload.numbers["examples"] for reply in replies]
        whole = stacked(
            [unpack(reply.payload.tensors, self.fresh) for reply in replies],
            [weight / sum(weights) for weight in weights],
        )
        return without_factors(whole), only_factors(whole)

    def start(self, client: Client, payload: Payload) -> Tensors:
        """Return fresh factors, from the seed, the client and the round: A as PEFT draws it, B zero."""
        drawn = torch.Generator().manual_seed(
            derive_seed(client.seed, "fresh factors", client.id, client.round)
        )
        fresh = {}
        for name, tensor in only_factors(client.initial).items():
            fresh[name] = torch.zeros_like(tensor)
            if A in name:
                torch.nn.init.kaiming_uniform_(fresh[name], a=math.sqrt(5), generator=drawn)
        return {**fresh, **payload.tensors}

    def upload(self, trained: Tensors) -> Tensors:
        """Return the factors with one row a rank, as their schema has them."""
        return pack(trained)
