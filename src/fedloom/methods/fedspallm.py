"""FedSpaLLM: clients prune what they trained, and the server averages each number over those who kept it.

Source: Bai et al. 2024, "FedSpaLLM: Federated Pruning of Large Language Models",
https://arxiv.org/abs/2410.14852, equations 5 to 7 as a public re-implementation cites them. With M_k the
mask of client k, 1 where it kept a number,

    W_j = sum_k M_kj W_kj / sum_k M_kj,

then the positions that most clients pruned are set to 0 until ceil(s d) numbers are. Each client is given
a sample of the layers, trains these, and counts in the mean of these alone.

A reconstruction: the full text was not available, and what is pruned here is the adapter, LoRA's two
factors, each to the sparsity s, after each round's training, where the paper prunes the backbone once
with SparseGPT. Numbers go by their magnitude. A client trains all numbers of its layers, so that a pruned
one may come back. Masks are sent as such: a number that is 0 is not one that was pruned. What is no
factor, such as a head, is trained by all and is averaged whole. Clients count alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedloom.accounting.traffic import ParameterTraffic, Traffic
from fedloom.aggregation.lora import factor_pairs, without_factors
from fedloom.aggregation.means import weighted_mean
from fedloom.aggregation.pruning import expanded, kept_mask, l0_mean, pruned_numbers
from fedloom.errors import MessageError
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import training_exchange
from fedloom.methods.contract.checks import optimizer_anew
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import ADAPTERS_ALONE, Method
from fedloom.methods.declaration import OWN_STEPS, TOGETHER, Absence, Declaration, no
from fedloom.randomness import generator
from fedloom.reports.sections.spec import SectionSpec
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors, tensor_bytes
from fedloom.wire.messages import Exchange, Payload, Reply
from fedloom.wire.schema import Schema, TensorSpec

KEPT, MASK = "kept", "mask"
"""Tensors of a reply: the numbers that were kept, one after the other; and a bit for each number of the
factors, 1 where it was."""

ZEROS = "zeros"
"""In the rounds' details: the share of zeros in the factors."""


class FedSpaLLMSettings(NamedSettings):
    """``[method] name = "fedspallm"``."""

    name: Literal["fedspallm"] = "fedspallm"
    sparsity: float = Field(default=0.5, ge=0, lt=1)
    """s, the share of each factor's numbers that are pruned; 0 is the mean over clients alike."""
    layers: float = Field(default=1.0, gt=0, le=1)
    """Share of the layers that a client is given in a round, drawn anew for each; it trains and sends
    these alone."""


class FedSpaLLM(Method):
    """Means over those who kept a number, and masks that are widened to a common sparsity."""

    declares = Declaration(
        "FedSpaLLM",
        "https://arxiv.org/abs/2410.14852",
        "reconstructed",
        "the adapter is pruned by magnitude in every round, in place of the backbone once",
        "FedLLM",
        "the adapter down; up the kept numbers of the client's layers, and a mask",
        "nothing",
        secure_aggregation=no("the rule counts each client's mask"),
        client_privacy=no("which numbers a client kept tells of its rows"),
        row_privacy=OWN_STEPS,
        asynchronous=TOGETHER,
        compression=no("a client sends few numbers already, each client others"),
        absence=Absence(
            "each number's mean is over those that answered, were given its layer and kept it; a layer "
            "of which nobody answered stays",
            "gets what all get",
            "is in no mean",
        ),
        problem="slow links",
    )
    reveals = ADAPTERS_ALONE
    taken = ("sparsity", "layers")
    sections = (
        SectionSpec(
            "line_chart",
            "FedSpaLLM's sparsity",
            "Share of zeros in the factors of the shared adapter: method.sparsity, or more where all "
            "clients pruned the same numbers.",
            ZEROS,
        ),
    )
    two_factors = True
    by_rows = False

    def __init__(self, settings: FedSpaLLMSettings) -> None:
        """Keep the settings."""
        self.settings = settings

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also what cannot be bounded or go on."""
        yield from super().check(view)
        if view.method.layers < 1:
            yield from optimizer_anew(view, "has other layers trained in the next round")
        if view.admission is not None and view.admission.max_change is not None:
            yield (
                f"admission.max_change: clients of method.name = {view.name!r} send numbers of their own "
                "choice, which it does not bound: use admission.max_value"
            )

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send the adapter; take the mean over those who kept a number, and widen the masks."""
        replies = yield self._training(cohort, state.tensors)
        sent = [self._read(reply, state.tensors, cohort.round) for reply in replies]
        whole = without_factors(state.tensors)
        others = [{name: reply.payload.tensors[name] for name in whole} for reply in replies]
        found = {**state.tensors, **weighted_mean(others, [1.0] * len(others))}
        for name in factor_names(state.tensors):
            holders = [own[name] for own in sent if name in own]
            if holders:
                values, masks = zip(*holders, strict=True)
                found[name] = expanded(l0_mean(values, masks), masks, self.settings.sparsity)
        factors = torch.cat([found[name].flatten() for name in factor_names(found)])
        cohort.details[ZEROS] = float((factors == 0).double().mean())
        return State(found)

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train}

    def traffic(self, adapter: Tensors) -> Traffic:
        """Count the adapter down; up the kept numbers of layers of the mean size, and a bit for all."""
        layers = factor_pairs(adapter)
        share = self._given_layers(len(layers)) / len(layers)
        kept, bits = self._sizes(adapter)
        up = round(4 * kept * share) + -(-bits // 8) + tensor_bytes(without_factors(adapter))
        return ParameterTraffic(tensor_bytes(adapter), up)

    def _sizes(self, adapter: Tensors) -> tuple[int, int]:
        """Return how many numbers of all factors are kept, and how many there are."""
        factors = [adapter[name] for name in factor_names(adapter)]
        return sum(map(self._kept, factors)), sum(tensor.numel() for tensor in factors)

    def _kept(self, tensor: Tensor) -> int:
        return tensor.numel() - pruned_numbers(tensor.numel(), self.settings.sparsity)

    def _given_layers(self, layers: int) -> int:
        return max(1, math.ceil(round(self.settings.layers * layers, 9)))

    def _given(self, adapter: Tensors, seed: int, client: int, round: int) -> set[str]:
        """Return the names of the factors of the layers that a client has in a round."""
        pairs = [*factor_pairs(adapter).values()]
        drawn = generator(seed, "layers", client, round)
        chosen = drawn.choice(len(pairs), self._given_layers(len(pairs)), replace=False)
        return {name for place in chosen for name in pairs[place]}

    def _training(self, cohort: Cohort, adapter: Tensors) -> Exchange:
        seed, (kept, bits) = self.server.seed, self._sizes(adapter)
        reply = (
            TensorSpec(KEPT, (kept,), torch.float32, ragged=True),
            TensorSpec(MASK, (-(-bits // 8),), torch.uint8),
            *Schema.of(without_factors(adapter)).tensors,
        )

        def check(client: int, payload: Payload) -> None:
            given = self._given(adapter, seed, client, cohort.round)
            masks = unpacked(payload.tensors[MASK], adapter)
            for name, mask in masks.items():
                wanted, found = self._kept(mask) if name in given else 0, int(mask.sum())
                if found != wanted:
                    raise MessageError(
                        f"its mask keeps {found} numbers of {name}, {wanted} are asked for"
                    )
            sent, total = len(payload.tensors[KEPT]), sum(int(own.sum()) for own in masks.values())
            if sent != total:
                raise MessageError(f"it sent {sent} numbers, and its mask keeps {total}")

        return training_exchange(cohort, adapter, answered=reply, check=check)

    def _read(self, reply: Reply, adapter: Tensors, round: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Return what a client kept of each factor that it was given, and its mask."""
        given = self._given(adapter, self.server.seed, reply.client, round)
        kept, begin, found = reply.payload.tensors[KEPT], 0, {}
        for name, mask in unpacked(reply.payload.tensors[MASK], adapter).items():
            if name in given:
                values = torch.zeros(mask.shape, dtype=adapter[name].dtype)
                count = int(mask.sum())
                values[mask] = kept[begin : begin + count].to(values.dtype)
                found[name] = values, mask
                begin += count
        return found

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        received = payload.tensors
        given = self._given(received, client.seed, client.id, client.round)
        client.model.write(received)
        result = yield from client.training_steps(
            payload.numbers["learning_rate"],
            frozen=[name for name in factor_names(received) if name not in given],
        )
        trained = client.model.read()
        masks = {
            name: kept_mask(trained[name], self.settings.sparsity)
            if name in given
            else torch.zeros(trained[name].shape, dtype=torch.bool)
            for name in factor_names(trained)
        }
        kept = torch.cat([trained[name][mask].float() for name, mask in masks.items()])
        sent = {KEPT: kept, MASK: packed([*masks.values()]), **without_factors(trained)}
        return Payload(sent, {"examples": len(client.share)}, result.metrics)


def factor_names(adapter: Tensors) -> list[str]:
    """Return the names of both factors of each layer, in the order of the layers."""
    return [name for pair in factor_pairs(adapter).values() for name in pair]


def packed(masks: Sequence[Tensor]) -> Tensor:
    """Return the bits of bool tensors, one after the other, as uint8; the last byte is filled with 0."""
    return torch.from_numpy(np.packbits(torch.cat([mask.flatten() for mask in masks]).numpy()))


def unpacked(mask: Tensor, adapter: Tensors) -> Tensors:
    """Return the mask of each factor by name, in the order of :func:`factor_names`."""
    bits = torch.from_numpy(np.unpackbits(mask.numpy())).bool()
    sizes = [adapter[name].numel() for name in factor_names(adapter)]
    parts = torch.split(bits[: sum(sizes)], sizes)
    return {
        name: part.view(adapter[name].shape)
        for name, part in zip(factor_names(adapter), parts, strict=True)
    }
