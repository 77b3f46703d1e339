"""FedMoE: each client trains the experts of a mixture that its own rows use most.

Source: Mei et al. 2024, FedMoE, https://arxiv.org/abs/2408.11304, as far as the FedAMoLE paper uses it
for a baseline. A reconstruction: the backbone has experts; in its first round a client runs some rows
through all of them, and the server gives it, in each block, those that most of its tokens pass, which it
keeps. What it trains are these experts whole, and the router's rows for them. An expert becomes the mean
over its holders, weighted by their rows. FedMoE's search for the size of each sub-mixture is not built
(everyone holds ``experts_per_client``), nor does a sub-mixture change in later rounds.

Ours: clients may be absent. Who has not been probed is probed in the first round that it is drawn for,
again if its counts are lost, and trains nothing before. It keeps its experts from then on, however long
it is away. An expert that no client which answers holds keeps its value, so those of a client that left
stay with their other holders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedloom.accounting.traffic import ParameterTraffic, Traffic
from fedloom.aggregation.means import weighted_mean
from fedloom.errors import MessageError, ModelError
from fedloom.federation.presence import Presence
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.client_mixtures import OwnMixture, passes
from fedloom.methods.bases.parameter_averaging import ADAPTER, LEARNING_RATE, TRAIN_REPLY_NUMBERS
from fedloom.methods.contract.client import Client, Handler
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import Reveal, ServerSide, by_place
from fedloom.methods.declaration import (
    EACH_ANSWER,
    PARTLY_HELD,
    SEVERAL_PARTS,
    TOGETHER,
    Absence,
    Declaration,
    no,
)
from fedloom.models.submixture import SubMixtureModel, block_number, part_of_experts
from fedloom.randomness import generator
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors, by_client, join_parts, of_clients, part_of, tensor_bytes
from fedloom.wire.messages import Exchange, Payload, Reply, encode
from fedloom.wire.schema import Schema, TensorSpec

EXPERTS = "experts"
"""Part of the state: for each client that was probed ``(blocks, n)`` ids of its experts, ascending."""

PLACES, PROBED = "held", "known"
"""The same by place, in checkpoints of an earlier release: ``(clients, blocks, n)``; ``(clients,)``
whether it was probed."""

USED = "used"
"""``(blocks, experts)`` tokens of a client's probing rows that pass each expert."""


MOST_USED = 1 << 40
"""Tokens that a client can have seen pass an expert; float32 orders them as they are, to one in ten
million."""


def _check_used(client: int, payload: Payload) -> None:
    """Check that a client's counts of tokens can be ones.

    Raises:
        MessageError: One is below 0, or beyond all that a client has.
    """
    used = payload.tensors[USED]
    if int(used.min()) < 0 or int(used.max()) > MOST_USED:
        raise MessageError(f"counts of tokens must be 0 to {MOST_USED}", "out_of_range")


def _held(state: State, presence: Presence) -> dict[int, Tensor]:
    """Return the experts of each client that was probed, by its id."""
    if PLACES not in state.tensors:
        return by_client(state.tensors, EXPERTS)
    places = by_place(state.tensors[PLACES], 0, presence)
    probed = by_place(state.tensors[PROBED], 0, presence)
    return {client: own for client, own in places.items() if probed[client]}


class FedMoESettings(NamedSettings):
    """``[method] name = "fedmoe"``."""

    name: Literal["fedmoe"] = "fedmoe"
    experts_per_client: int | None = Field(default=None, ge=1)
    """Experts of a block that a client holds (default: half of them)."""
    probe_rows: int = Field(default=200, ge=1)
    """Most rows by which a client finds out which experts it uses."""


class FedMoE(OwnMixture):
    """Sub-mixtures of a backbone's experts, by use."""

    declares = Declaration(
        "FedMoE",
        "https://arxiv.org/abs/2408.11304",
        "reconstructed",
        "sub-mixtures of one size, which do not change",
        "FedLLM",
        "the client's experts, down and up; once, how many tokens pass each expert",
        "its sub-mixture",
        secure_aggregation=EACH_ANSWER,
        client_privacy=SEVERAL_PARTS,
        row_privacy=no("its probe counts what its rows use"),
        asynchronous=TOGETHER,
        compression=PARTLY_HELD,
        absence=Absence(
            "as FedAMoLE, weighted by rows. Without a probe that counted it holds no "
            "expert and is not asked to train",
            "is probed in the first round that it is drawn for; keeps these experts from then on",
            "its experts stay with their other holders",
        ),
    )
    reveals: frozenset[Reveal] = frozenset({"adapters", "expert_probes"})
    taken = ("experts_per_client", "probe_rows")
    no_start = "it trains the model's own experts; give a trained model as model.path"

    submixtures = True

    blocks: tuple[str, ...]
    held: int

    def __init__(self, settings: FedMoESettings) -> None:
        """Keep the settings."""
        self.settings = settings

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also that the backbone's own experts must be trained."""
        yield from super().check(view)
        if view.adapter is not None and view.adapter.kind != "submixture":
            yield (
                f"method.name = {view.name!r} trains the experts that a backbone has itself: use "
                f'adapter.kind = "submixture", not {view.adapter.kind!r}'
            )

    def setup(self, server: ServerSide) -> None:
        """Note what experts there are.

        Raises:
            ModelError: A client would hold more experts than there are, or fewer than a token passes.
        """
        super().setup(server)
        model = server.model
        assert isinstance(model, SubMixtureModel), "the experiment asks for a sub-mixture"
        self.blocks = model.blocks
        self.held = self.settings.experts_per_client or max(model.top_k, model.experts // 2)
        if not model.top_k <= self.held <= model.experts:
            raise ModelError(
                f"method.experts_per_client = {self.held}: this backbone has {model.experts} experts in "
                f"a block and a token passes {model.top_k}; give a number between these"
            )

    def round(self, state: State, cohort: Cohort) -> Round:
        """Find out what new clients use, send everyone its experts, take means over holders."""
        adapter = part_of(state.tensors, ADAPTER)
        experts = len(next(iter(adapter.values())))
        held = _held(state, cohort.presence)
        new = [client for client in cohort.clients if client not in held]
        if new:
            size = TensorSpec(USED, (len(self.blocks), experts), torch.int64)
            reply = Schema((size,))
            asked = Exchange.broadcast(
                "probe", cohort.round, tuple(new), Payload(), Schema(), reply, _check_used
            )
            for found in (yield asked):
                most = found.payload.tensors[USED].float().topk(self.held, 1).indices
                held[found.client] = most.sort(1).values
        there = {client: held[client] for client in cohort.clients if client in held}
        replies = yield self._exchange(cohort, adapter, there)
        adapter = self._means(adapter, replies, there)
        return State({**join_parts(adapter=adapter), **of_clients(EXPERTS, held)})

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"probe": self._probe, "train": self._train}

    def traffic(self, adapter: Tensors) -> Traffic:
        """Count the held experts both ways; what probing sends, once a client, is not in it."""
        experts = len(next(iter(adapter.values())))
        size = tensor_bytes(adapter) * self.held // experts
        return ParameterTraffic(size, size)

    def _exchange(self, cohort: Cohort, adapter: Tensors, held: Mapping[int, Tensor]) -> Exchange:
        specs = tuple(
            TensorSpec(name, (self.held, *tensor.shape[1:]), tensor.dtype)
            for name, tensor in adapter.items()
        )
        numbers = {LEARNING_RATE.name: cohort.learning_rate}
        request = Schema(specs, (LEARNING_RATE,))
        requests = {
            client: encode(Payload(part_of_experts(adapter, self.blocks, own), numbers), request)
            for client, own in held.items()
        }
        reply = Schema(specs, TRAIN_REPLY_NUMBERS, cohort.reported)
        return Exchange("train", cohort.round, request, reply, requests)

    def _means(
        self, adapter: Tensors, replies: Sequence[Reply], held: Mapping[int, Tensor]
    ) -> Tensors:
        """Return each expert as the mean over those who sent it, weighted by rows; others stay."""
        result = {}
        for name, whole in adapter.items():
            block = block_number(name, self.blocks)
            updated = whole.clone()
            for expert in range(len(whole)):
                holders = [
                    (reply, int((held[reply.client][block] == expert).nonzero()))
                    for reply in replies
                    if (held[reply.client][block] == expert).any()
                ]
                if holders:
                    own = [{name: r.payload.tensors[name][place]} for r, place in holders]
                    rows = [r.payload.numbers["examples"] for r, _ in holders]
                    updated[expert] = weighted_mean(own, rows)[name]
            result[name] = updated
        return result

    def _probe(self, client: Client, payload: Payload) -> Payload:
        model = client.model
        assert isinstance(model, SubMixtureModel), "the experiment asks for a sub-mixture"
        count = len(client.share)
        rng = generator(client.seed, "probe", client.id)
        rows = rng.choice(count, min(count, self.settings.probe_rows), replace=False)
        tokens = client.share.tokens.take(np.sort(rows).astype(np.int64))
        model.write(client.initial)
        used = torch.zeros(len(self.blocks), model.experts, dtype=torch.int64)
        with model.counting() as seen:
            for _ in passes(client, tokens):
                used += torch.stack(seen)
                seen.clear()
        return Payload({USED: used})

    def _train(self, client: Client, payload: Payload) -> Payload:
        client.model.write(payload.tensors)
        result = client.train(payload.numbers["learning_rate"])
        client.store[ADAPTER] = client.model.read()
        return Payload(client.store[ADAPTER], {"examples": len(client.share)}, result.metrics)
