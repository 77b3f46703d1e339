"""Estimated costs of each framework for a client in a round; trains nothing.

The model is built without weights, the data is read, divided and tokenised as for a run, and the batches
of the first round are drawn from the seed: bytes, exchanges and compute are then closed forms of what a
round would really do. Time on a link and memory are derived from them. How accurate a framework gets can
only be measured: ``fedloom compare`` with ``[compare.scenarios]`` does that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedloom.accounting.network import Link
from fedloom.accounting.traffic import FEDLLM, Done, Sent
from fedloom.data.batching import epoch_batches
from fedloom.data.client_rows import TokenShare
from fedloom.errors import FedloomError, SettingsError
from fedloom.experiment.experiment import Experiment, view_of
from fedloom.methods import DEFAULT, METHODS
from fedloom.methods.contract.closed_forms import compressed_traffic
from fedloom.models.adapters import AdapterModel
from fedloom.models.split_model import ClientPart
from fedloom.objectives import make_objective
from fedloom.runs.assembly import RunComponents, assemble
from fedloom.runs.initial_adapter import find_start, with_adapter_settings
from fedloom.runs.partitioning import partition_data
from fedloom.training.layout import Budget, budget_of, scoring_budget
from fedloom.training.memory import client_memory
from fedloom.training.passes import Layout
from fedloom.training.steps import batch_order, within
from fedloom.wire.settings import WireSettings

CLOSE = 1.5
"""A round of FedLLM that lasts at most so many times the shortest is short enough to try it first."""


@dataclass(frozen=True)
class Estimate:
    """One way to train, and its costs for the client with the most work.

    Attributes:
        name: Framework and configuration.
        framework: FedLLM, KD-FedLLM or Split-FedLLM.
        sent: Bytes and exchanges of a round.
        flops: Floating-point operations of the client in a round.
        memory: Bytes that training takes on the client.
        seconds: Of a round on the link.
        fits: Whether the memory is there.
        problem: Why this cannot be used here; the other numbers are zero then.
        remark: A remark for the user.
    """

    name: str
    framework: str
    sent: Sent
    flops: float
    memory: float
    seconds: float
    fits: bool
    problem: str = ""
    remark: str = ""


def advise(
    experiment: Experiment,
    link: Link,
    memory: float,
    *,
    stage: Callable[[str], None] = lambda text: None,
) -> list[Estimate]:
    """Return the estimates of all ways to train.

    Args:
        experiment: Model, data, partition and training as for a run; its method is one of the options.
        link: What clients have.
        memory: Bytes a client has.
        stage: Called with a text about the current work.

    Raises:
        SettingsError: The objective has answers generated.
        FedloomError: The experiment itself cannot be built; see ``fedloom.errors``.
    """
    require_rows_trained_on(experiment, "fedloom advise")
    experiment, options = with_adapter_settings(experiment, find_start(experiment)), []
    for name, framework, changes, remark in _variants(experiment):
        stage(f"counting {name}")
        if not METHODS[changes["method"].name][1].declares.compression.holds:
            changes["wire"] = WireSettings()  # which it does not go with
        try:
            variant = replace(experiment, **changes)
            parts = assemble(variant, partition_data(variant), empty=True)
        except FedloomError as error:
            if framework == FEDLLM:
                raise
            why = "; ".join(getattr(error, "problems", ())) or str(error)
            nothing = Sent(0, 0, 0)
            options.append(Estimate(name, framework, nothing, 0, 0, 0, fits=False, problem=why))
            continue
        option = _option(name, framework, variant, parts, link, memory)
        options.append(replace(option, remark=remark))
    return options


def require_rows_trained_on(experiment: Experiment, command: str) -> None:
    """Refuse an objective that has answers generated, of whose passes rows say nothing.

    Args:
        experiment: Its settings.
        command: The one that would count or time passes over rows.

    Raises:
        SettingsError: It is such a one.
    """
    settings = experiment.objective
    if make_objective(settings).generation is not None:
        text = f"objective.name = {settings.name!r} trains on answers that it generates"
        raise SettingsError([f"{text}: their costs are not estimated from rows"], command)


def recommend(options: list[Estimate]) -> str:
    """Return which way to try first, and why, from costs alone."""
    fitting = [option for option in options if option.fits]
    if not fitting:
        return (
            "Nothing fits this memory: take a smaller model, model.quantization, a smaller batch or "
            "shorter sequences."
        )
    fastest = min(fitting, key=lambda option: option.seconds)
    whole = [option for option in fitting if option.framework == FEDLLM]
    quick = [option for option in whole if option.seconds <= CLOSE * fastest.seconds]
    chosen = quick[0] if quick else fastest
    if quick:
        why = (
            "it fits, no other round is much shorter, and it trains one model on all clients' rows "
            "without public data"
        )
    elif whole:
        slower = min(option.seconds for option in whole) / fastest.seconds
        why = f"its round is the shortest; FedLLM's takes {slower:.1f} times as long"
    else:
        why = "the whole model does not fit on a client, and its round is the shortest of those that fit"
    text = f"Try {chosen.name} first: {why}."
    if chosen.remark:
        text += f" {chosen.remark}"
    return text + " Costs say nothing about accuracy: measure it with fedloom compare."


def _variants(experiment: Experiment) -> list[tuple[str, str, dict[str, Any], str]]:
    """Return each way's name, framework, changes to the experiment, and what to know of it."""
    method, adapter = experiment.method, experiment.adapter
    own, kind = adapter.kind == "lora", METHODS[method.name][1]
    fedllm = method if kind.shares_parameters else METHODS[DEFAULT][0]()
    label = f"lora r={adapter.rank}" if own else adapter.kind
    found: list[tuple[str, str, dict[str, Any], str]] = [
        (f"{FEDLLM}, {label}", FEDLLM, {"method": fedllm}, "")
    ]
    if own and adapter.rank > 2:
        small = adapter.model_copy(update={"rank": 2})
        found.append((f"{FEDLLM}, lora r=2", FEDLLM, {"method": fedllm, "adapter": small}, ""))
    view = view_of(experiment)
    for settings, other in METHODS.values():
        for variant in other.variants(method if isinstance(method, settings) else None, view):
            changes: dict[str, Any] = {"method": variant.method}
            if variant.training:
                training = experiment.training.model_copy(update=dict(variant.training))
                changes["training"] = training
            found.append((variant.name, variant.name.partition(",")[0], changes, variant.remark))
    return found


def _option(
    name: str,
    framework: str,
    experiment: Experiment,
    parts: RunComponents,
    link: Link,
    memory: float,
) -> Estimate:
    traffic = compressed_traffic(parts.method, parts.initial, experiment.wire)
    worst: Estimate | None = None
    for client, share in parts.local.shares.items():
        model = parts.local.resources[client].model
        done, own_flops = _own_rows(experiment, client, share, model, parts)
        flops = parts.method.compute(_FirstRound(experiment, client, parts, own_flops))
        sent = traffic.of_round(done)
        needed = client_memory(
            model,
            share,
            experiment.training,
            experiment.model.quantization,
            parts.local.objective,
        )
        option = Estimate(
            name, framework, sent, flops, needed, link.seconds(sent, flops), fits=needed <= memory
        )
        if worst is None or option.seconds > worst.seconds:
            worst = option
    assert worst is not None, "a federation has clients"
    return worst


def _own_rows(
    experiment: Experiment,
    client: int,
    share: TokenShare,
    model: AdapterModel,
    parts: RunComponents,
) -> tuple[Done, float]:
    """Return what a client's first round does on its own rows, and its compute."""
    training = experiment.training
    work = training.work(len(share), parts.local.participations)
    order = batch_order(training, experiment.federation.seed, "", client, 1)
    steps = rows = tokens = targets = 0
    flops = 0.0
    batches = epoch_batches(
        len(share), training.batch_size, order, epochs=work.epochs, steps=work.steps
    )
    for indices in within(share, batches, work):
        flops += _pass(share, indices, model, budget_of(training, model))
        part = share.take(indices).tokens
        steps, rows = steps + 1, rows + len(indices)
        tokens += len(part.tokens)
        targets += int(part.completion_lengths.sum()) or len(indices)
    return Done(steps, rows, tokens, targets), flops


class _FirstRound:
    """A client's first round; see :class:`fedloom.methods.contract.method.FirstRound`."""

    def __init__(
        self, experiment: Experiment, client: int, parts: RunComponents, own: float
    ) -> None:
        model = parts.local.resources[client].model
        self._rows = experiment, client, parts.local.shares[client], model, parts
        self.client, self.seed = client, parts.local.seed
        self.training = parts.local.training
        resources = parts.local.resources[client]
        self.public, self._model, self._own = resources.public, resources.model, own
        self.rows = len(parts.local.shares[client])

    def own_rows(self) -> float:
        return self._own

    def own_forward_passes(self) -> float:
        with torch.no_grad():
            return _own_rows(*self._rows)[1]

    def reading(self, indices: np.ndarray) -> float:
        model, own = self._model, TokenShare(self._rows[2].tokens.take(indices))
        before, budget = model.flops, scoring_budget(self.training, model)
        with torch.no_grad():
            for _, batch in Layout(model, own, budget, by_itself=True).everything():
                rows, length = batch.sequences.input_ids.shape
                model.count(rows, length + model.virtual_tokens, 1)
        return model.flops - before

    def passes(self, share: TokenShare, indices: np.ndarray, *, scoring: bool = False) -> float:
        budget = (scoring_budget if scoring else budget_of)(self.training, self._model)
        return _pass(share, indices, self._model, budget)


def _pass(share: TokenShare, indices: np.ndarray, model: AdapterModel, budget: Budget) -> float:
    """Return the compute of a batch, forward and (where gradients are on) backward."""
    before = model.flops
    plain = TokenShare(share.tokens)
    for batch in Layout(model, plain, budget).batches(indices):
        sequences = batch.sequences
        count, length = sequences.input_ids.shape
        scored = len(sequences.reading.sources)  # of classified texts none: each has one position
        if isinstance(model, ClientPart):
            model.count(count, length, 0)
            if model.ending is not None:
                model.ending.count(scored or count * length)
        elif scored and model.head is not None:
            model.count_reading(sequences)
        else:
            kept = length - sequences.first_completion + 1 if scored else length
            model.count(count, length + model.virtual_tokens, kept)
    return model.flops - before
