"""What each framework would cost a client in a round, for a model and data as they are; trains nothing.

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
from fedloom.accounting.traffic import Done, Sent
from fedloom.assembly import Parts, assemble
from fedloom.data.batches import TokenShare, collate, epoch_batches
from fedloom.division import divide
from fedloom.errors import FedloomError
from fedloom.experiment import Experiment
from fedloom.methods.checks import TASKS
from fedloom.methods.distillation import SCORING_BATCH, DistillationMethod, DistillationSettings
from fedloom.methods.fedavg import FedAvgSettings
from fedloom.methods.split import SplitSettings
from fedloom.models.adapters import AdapterModel
from fedloom.models.cut import FrontHalf
from fedloom.randomness import generator
from fedloom.start import find_start, settled
from fedloom.training.layout import Budget, budget_of, passes, row_costs
from fedloom.training.local import within
from fedloom.training.memory import client_memory

CLOSE = 1.5
"""A round of FedLLM that lasts at most so many times the shortest is short enough to try it first."""


PLAIN = {
    "micro_batch_size": None,
    "accumulation": None,
    "tokens_per_pass": "auto",
    "keep_optimizer_state": False,
    "gradient_checkpointing": False,
}
"""Training as Split-FedLLM can do it."""


@dataclass(frozen=True)
class Option:
    """One way to train, and what it costs the client with the most to do.

    Attributes:
        name: Framework and configuration.
        framework: FedLLM, KD-FedLLM or Split-FedLLM.
        sent: Bytes and exchanges of a round.
        flops: Floating-point operations of the client in a round.
        memory: Bytes that training takes on the client.
        seconds: Of a round on the link.
        fits: Whether the memory is there.
        problem: Why this cannot be used here; everything else is zero then.
    """

    name: str
    framework: str
    sent: Sent
    flops: float
    memory: float
    seconds: float
    fits: bool
    problem: str = ""


def advise(
    experiment: Experiment,
    link: Link,
    memory: float,
    *,
    stage: Callable[[str], None] = lambda text: None,
) -> list[Option]:
    """Return what could be tried.

    Args:
        experiment: Model, data, partition and training as for a run; its method is one of the options.
        link: What clients have.
        memory: Bytes a client has.
        stage: Told what is being done.

    Raises:
        FedloomError: The experiment itself cannot be built; see ``fedloom.errors``.
    """
    experiment, options = settled(experiment, find_start(experiment)), []
    for name, framework, changes in _variants(experiment):
        stage(f"counting {name}")
        try:
            variant = replace(experiment, **changes)
            parts = assemble(variant, divide(variant), empty=True)
        except FedloomError as error:
            if framework == "FedLLM":
                raise
            why = "; ".join(getattr(error, "problems", ())) or str(error)
            nothing = Sent(0, 0, 0)
            options.append(Option(name, framework, nothing, 0, 0, 0, fits=False, problem=why))
            continue
        options.append(_option(name, framework, variant, parts, link, memory))
    return options


def recommend(options: list[Option]) -> str:
    """Say which option to try first, and why, from costs alone."""
    fitting = [option for option in options if option.fits]
    if not fitting:
        return (
            "Nothing fits this memory: take a smaller model, model.quantization, a smaller batch or "
            "shorter sequences."
        )
    fastest = min(fitting, key=lambda option: option.seconds)
    whole = [option for option in fitting if option.framework == "FedLLM"]
    quick = [option for option in whole if option.seconds <= CLOSE * fastest.seconds]
    chosen = quick[0] if quick else fastest
    if quick:
        why = (
            "it fits, no other round is much shorter, and it trains one model on everybody's rows "
            "without public data"
        )
    elif whole:
        slower = min(option.seconds for option in whole) / fastest.seconds
        why = f"its round is the shortest; FedLLM's takes {slower:.1f} times as long"
    else:
        why = "the whole model does not fit on a client, and of what fits its round is the shortest"
    text = f"Try {chosen.name} first: {why}."
    if chosen.framework == "KD-FedLLM":
        text += " It needs public rows, and learns no more than these can show."
    if chosen.framework == "Split-FedLLM":
        text += (
            " Clients must be online for every step, and activations tell the server much about the "
            "texts: see method.labels and method.activation_noise."
        )
    return text + " Costs say nothing about accuracy: measure it with fedloom compare."


def _variants(experiment: Experiment) -> list[tuple[str, str, dict[str, Any]]]:
    """Return each framework's name, kind and changes to the experiment: as it is set, or by default."""
    method, adapter = experiment.method, experiment.adapter
    frameworks = (DistillationSettings, SplitSettings)
    fedllm = FedAvgSettings() if isinstance(method, frameworks) else method
    own = adapter.kind == "lora"
    label = f"lora r={adapter.rank}" if own else adapter.kind
    found: list[tuple[str, str, dict[str, Any]]] = [
        (f"FedLLM, {label}", "FedLLM", {"method": fedllm})
    ]
    if own and adapter.rank > 2:
        small = adapter.model_copy(update={"rank": 2})
        found.append(("FedLLM, lora r=2", "FedLLM", {"method": fedllm, "adapter": small}))
    if experiment.objective.name not in TASKS:
        return found
    classifies = experiment.objective.name == "classification"
    logits = DistillationSettings(top_k=None if classifies else 32)
    logits = method if isinstance(method, DistillationSettings) else logits
    kept = f"top {logits.top_k} logits" if logits.top_k else "all logits"
    found.append((f"KD-FedLLM, {kept}, {logits.encoding}", "KD-FedLLM", {"method": logits}))
    split = method if isinstance(method, SplitSettings) else SplitSettings()
    training = experiment.training.model_copy(update=PLAIN)
    for encoding in dict.fromkeys([split.activations, "int8"]):
        changed = split.model_copy(update={"activations": encoding, "gradients": encoding})
        name = f"Split-FedLLM, cut {split.cut}, {encoding}"
        found.append((name, "Split-FedLLM", {"method": changed, "training": training}))
    return found


def _option(
    name: str, framework: str, experiment: Experiment, parts: Parts, link: Link, memory: float
) -> Option:
    traffic = parts.method.traffic(parts.initial)
    worst: Option | None = None
    for client, share in parts.local.shares.items():
        model = parts.local.equipment[client].model
        done, flops = _own_rows(experiment, client, share, model, parts)
        if isinstance(parts.method, DistillationMethod):
            flops += _public_rows(parts.method, client, parts)
        sent = traffic.of_round(done)
        needed = client_memory(model, share, experiment.training, experiment.model.quantization)
        option = Option(
            name, framework, sent, flops, needed, link.seconds(sent, flops), fits=needed <= memory
        )
        if worst is None or option.seconds > worst.seconds:
            worst = option
    assert worst is not None, "a federation has clients"
    return worst


def _own_rows(
    experiment: Experiment, client: int, share: TokenShare, model: AdapterModel, parts: Parts
) -> tuple[Done, float]:
    """Return what a client's first round does on its own rows, and its compute."""
    training = experiment.training
    work = training.work(len(share), parts.local.participations)
    order = generator(experiment.federation.seed, "batches", client, 1)
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


def _public_rows(method: DistillationMethod, client: int, parts: Parts) -> float:
    """Return a client's compute on public rows: scoring them once, then learning from them."""
    own = parts.local.equipment[client]
    assert own.public is not None, "the method's rows have been read"
    engine, epochs = parts.local, method.settings.client_epochs
    share = method.rows_of_round(own.public, engine.seed, 1).share
    rows = np.arange(len(share))
    with torch.no_grad():
        scoring = sum(
            _pass(share, rows[start : start + SCORING_BATCH], own.model, Budget(SCORING_BATCH))
            for start in range(0, len(share), SCORING_BATCH)
        )
    order = generator(engine.seed, "distil batches", client, 1)
    batches = epoch_batches(len(share), engine.training.batch_size, order, epochs=epochs)
    budget = budget_of(engine.training, own.model)
    return scoring + sum(_pass(share, indices, own.model, budget) for indices in batches)


def _pass(share: TokenShare, indices: np.ndarray, model: AdapterModel, budget: Budget) -> float:
    """Return the compute of a batch, forward and (where gradients are on) backward."""
    before = model.flops
    plain = TokenShare(share.tokens)
    for part in passes(row_costs(plain), indices, budget):
        sequences = collate(plain, part, model.pad, torch.device("cpu")).sequences
        count, length = sequences.input_ids.shape
        positions = length
        if sequences.completion_mask.any():
            positions = length - sequences.first_completion + 1
        if isinstance(model, FrontHalf):
            model.count(count, length, 0)
            if model.ending is not None:
                model.ending.count(count * positions)
        else:
            model.count(count, length + model.virtual_tokens, positions)
    return model.flops - before
