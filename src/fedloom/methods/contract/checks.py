"""Contradictions that follow from the class attributes of a method.

A method adds its own in :meth:`fedloom.methods.contract.method.Method.check`. Each function yields
nothing where a section that it needs is not sound.
"""

from __future__ import annotations

from collections.abc import Iterator

from fedloom.errors import ModelError
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.traits import MethodTraits
from fedloom.methods.declaration import Claim
from fedloom.privacy.secure_aggregation.graph import LEAST

MODULUS, COARSEST = 1 << 32, 16
"""The largest modulus of a secure sum, and the fewest steps that a client's weight may have in it."""

TASKS = ("sft", "classification")
"""Objectives whose loss is a mean over positions (texts or tokens) that several parties can share."""


def general(kind: type[MethodTraits], view: ExperimentView) -> Iterator[str]:
    """Yield every contradiction that follows from a method's class attributes."""
    yield from _changes(kind, view)
    if view.objective is not None:
        yield from _parameters(kind, view)
        yield from _amounts(kind, view)
    yield from _pairs_alone(kind, view)
    yield from _embedding_noise(kind, view)
    yield from _best_round(kind, view)
    yield from _start(kind, view)
    yield from _unseen_clients(kind, view)
    yield from _rows(kind, view)


def _pairs_alone(kind: type[MethodTraits], view: ExperimentView) -> Iterator[str]:
    """Yield that public rows hold no pairs, which is all that a reward model can be taught by."""
    objective = view.objective
    if objective is not None and objective.outputs and kind.public_rows_needed(view.method):
        yield (
            f"method.name = {view.name!r} needs public rows, and objective.name = "
            f"{view.objective_name!r} "
            'learns from pairs alone: use another method, such as "fedavg"'
        )


def tasks_only(view: ExperimentView) -> Iterator[str]:
    """Yield why a method cannot train with an objective that compares whole answers."""
    if view.objective is not None and view.objective_name not in TASKS:
        yield (
            f"method.name = {view.name!r} works with objective.name = {' or '.join(TASKS)}, not with "
            f"{view.objective_name!r}"
        )


def optimizer_anew(view: ExperimentView, why: str) -> Iterator[str]:
    """Yield that optimizers cannot go on with their state of the round before, and why."""
    if view.training is not None and view.training.keep_optimizer_state:
        yield f"training.keep_optimizer_state: method.name = {view.name!r} {why}"


def noise_of_each_round(view: ExperimentView, why: str) -> Iterator[str]:
    """Yield that the noise of a round cannot take back that of the round before, and why."""
    if view.privacy is not None and view.privacy.mechanism != "independent":
        yield (
            f'privacy.mechanism = "{view.privacy.mechanism}": method.name = {view.name!r} {why}, where '
            'noise of earlier rounds cannot be taken back: use "independent"'
        )


def whole_answers(view: ExperimentView, why: str) -> Iterator[str]:
    """Yield that the server cannot shorten a client's answer, and why."""
    if view.admission is not None and view.admission.on_excess == "clip":
        yield (
            f'admission.on_excess = "clip": method.name = {view.name!r} {why}: use "reject", which '
            "leaves the answer out on both sides"
        )


def require_linear_layers(stacked: str | None, what: str) -> None:
    """Check that the change of each layer under LoRA's factors is their product.

    Args:
        stacked: A layer whose factors are of a stack of experts, if there is one.
        what: The setting that needs it, which begins the message.

    Raises:
        ModelError: There is such a layer.
    """
    if stacked:
        raise ModelError(
            f"{what}: {stacked} has factors for a stack of experts, whose change is not their "
            'product: name linear layers as adapter.targets, such as ["q_proj"]'
        )


def summed_alone(kind: type[MethodTraits], claim: Claim, view: ExperimentView) -> Iterator[str]:
    """Yield what cannot be where the server sees the sum of a round's answers alone.

    Args:
        kind: The method's class.
        claim: What it declares of secure aggregation.
        view: The experiment.
    """
    if view.privacy is None or not view.privacy.secure_aggregation:
        return
    opening = "privacy.secure_aggregation:"
    if not claim.holds:
        yield f"{opening} method.name = {view.name!r} does not go with it: {claim.why}"
    elif kind.own_models:
        yield (
            f"{opening} method.name = {view.name!r} has no model but each client's own, whose scores the "
            "server would get one by one"
        )
    yield from _rules_alone(view, opening)
    if view.evaluation is not None and view.evaluation.per_client:
        yield (
            f"{opening} evaluation.per_client = true sends each client's own scores to the server: set "
            "it to false"
        )
    if view.clients is not None and view.clients.newcomers:
        yield f"{opening} clients.newcomers are judged one by one, and the server gets their scores"
    if view.simulation is not None and view.simulation.devices is not None:
        yield f"{opening} [simulation.devices] does not time its stages: leave the section out"
    federation = view.federation
    if federation is None:
        return
    if federation.cohort_size < LEAST:
        yield (
            f"{opening} a round has {federation.cohort_size} clients, and a sum needs {LEAST} at least: "
            "that of two tells each of them the other's update"
        )
    if federation.replacements:
        yield (
            f"{opening} federation.replacements = {federation.replacements}: clients cannot join a sum "
            "that has begun; leave it out"
        )
    most = MODULUS >> view.privacy.sum_bits
    asked = federation.clients  # some methods ask all of them once
    if asked * COARSEST > most:
        yield (
            f"privacy.sum_bits = {view.privacy.sum_bits} leaves no room in 32 bits for the weights of "
            f"{asked} clients, of which there may be {most // COARSEST}: lower it"
        )


def _rules_alone(view: ExperimentView, opening: str) -> Iterator[str]:
    """Yield what rules of a server cannot be where it sees no single answer."""
    if view.aggregation is not None and view.aggregation.rule != "mean":
        yield (
            f"{opening} aggregation.rule = {view.aggregation.rule!r} compares single updates, which the "
            'server does not see: use "mean"'
        )
    if view.admission is not None and view.admission.max_change is not None:
        yield (
            f"{opening} admission.max_change bounds single updates, which the server does not see: leave "
            "it out; privacy.sum_bound bounds each number at the client"
        )


def _changes(kind: type[MethodTraits], view: ExperimentView) -> Iterator[str]:
    bounded = view.admission is not None and view.admission.max_change is not None
    if bounded and not kind.shares_parameters:
        yield (
            f"admission.max_change bounds changes of parameters; those of method.name = {view.name!r} "
            "do not travel"
        )


def _parameters(kind: type[MethodTraits], view: ExperimentView) -> Iterator[str]:
    """Yield what methods that share parameters cannot do with these adapters and clients."""
    adapter, aggregation, groups = view.adapter, view.aggregation, view.groups
    if kind.two_factors and adapter is not None and adapter.kind != "lora":
        yield (
            f"method.name = {view.name!r} treats the two factors of LoRA apart: use adapter.kind = "
            '"lora"'
        )
    if aggregation is not None and aggregation.rule != "mean" and not kind.averages:
        yield (
            f"aggregation.rule = {aggregation.rule!r}: method.name = {view.name!r} puts "
            "updates together in a way of its own"
        )
    yield from _products(kind, view)
    yield from _plain_products(kind, view)
    if adapter is not None and adapter.kind == "submixture" and not kind.submixtures:
        yield (
            "adapter.kind = 'submixture': each client keeps a model of its own, and method.name = "
            f"{view.name!r} has one for all; use {' or '.join(view.names_of('submixtures'))}"
        )
    if kind.changes_backbone and view.model is not None and view.model.quantization != "none":
        yield (
            f"model.quantization: method.name = {view.name!r} adds to the backbone's weights, which "
            "a quantised one cannot take up"
        )
    if groups and kind.mixed_ranks and adapter is not None:
        yield from _ranks(view, adapter.rank)
    elif groups and not kind.mixed_models:
        yield (
            f"clients.groups: method.name = {view.name!r} averages parameters, so all clients need the "
            f"same model and rank; {_listed(view.names_of('mixed_ranks'))} allow different ranks, "
            f"{_listed(view.names_of('mixed_models'))} both"
        )


def _products(kind: type[MethodTraits], view: ExperimentView) -> Iterator[str]:
    """Yield why a rule cannot have the products of LoRA's factors."""
    if view.aggregation is None or not view.aggregation.of_products or not kind.averages:
        return
    opening = f"aggregation.rule = {view.aggregation.rule!r} of products"
    if not kind.takes_merged_products:
        others = _listed(view.names_of("takes_merged_products"))
        yield (
            f"{opening} makes other factors, which method.name = {view.name!r} does not go on with; use "
            f'{others}, or aggregation.space = "factors" with another rule than knots'
        )
    if view.adapter is not None and view.adapter.kind != "lora":
        yield f'{opening} needs adapter.kind = "lora", not {view.adapter.kind!r}'


def _plain_products(kind: type[MethodTraits], view: ExperimentView) -> Iterator[str]:
    """Yield why a layer's change has to be the product of its factors, from nothing on."""
    if view.adapter is None or view.adapter.kind != "lora":
        return
    why = ""
    if kind.two_factors:
        why = f"method.name = {view.name!r} works on the two factors of LoRA"
    elif not kind.whole_at_clients:
        why = f"method.name = {view.name!r} gives clients a part of the model"
    elif view.aggregation is not None and view.aggregation.of_products and kind.averages:
        why = f"aggregation.rule = {view.aggregation.rule!r} is of products of LoRA's factors"
    for setting in view.adapter.beyond_products if why else ():
        yield (
            f"{setting}: {why}, and with it a layer's change is not their product alone: leave it out, "
            "or use a method that averages all that is trained"
        )
    if view.adapter.modules_to_save and not kind.whole_at_clients:
        yield f"adapter.modules_to_save: {why}, which may lack them: leave it out"


def _embedding_noise(kind: type[MethodTraits], view: ExperimentView) -> Iterator[str]:
    """Yield why there is no noise on embeddings."""
    if view.training is None or not view.training.neftune_noise_alpha or kind.whole_at_clients:
        return
    yield (
        f"training.neftune_noise_alpha: method.name = {view.name!r} gives clients a part of the model, "
        "whose embeddings stay as they are: leave it out"
    )


def _best_round(kind: type[MethodTraits], view: ExperimentView) -> Iterator[str]:
    """Yield why a run cannot go back to a round before the last."""
    setting = view.evaluation.best_round_by if view.evaluation is not None else None
    if setting is not None and (kind.own_models or kind.personal):
        yield (
            f"{setting}: method.name = {view.name!r} has models of clients' own, which are of the last "
            "round: leave it out"
        )


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1])] * (len(names) > 1) + names[-1:])


def _ranks(view: ExperimentView, largest: int) -> Iterator[str]:
    """Yield what clients of different ranks that share parameters cannot differ in."""
    for group, own in view.groups.items():
        if own.model is not None:
            yield (
                f"clients.groups.{group}.model: method.name = {view.name!r} allows other ranks of one "
                "model"
            )
        if own.rank is not None and own.rank > largest:
            yield (
                f"clients.groups.{group}.rank = {own.rank} is above adapter.rank = {largest}, which the "
                f"server's adapter has under method.name = {view.name!r}: raise adapter.rank"
            )


def _amounts(kind: type[MethodTraits], view: ExperimentView) -> Iterator[str]:
    """Yield why what a client does in a round cannot be shared by the trainings of its method."""
    training, federation, objective = view.training, view.federation, view.objective
    if training is None or federation is None or objective is None:
        return
    if training.amount_per == "model":
        return
    method, rounds = kind(view.method), federation.rounds
    most = max(method.trainings_of(round, rounds) for round in {1, rounds})
    width = 2 if objective.kind == "preference" else 1
    why = " and ".join(
        [f"{most} trainings in a round"] * (most > 1)
        + [f"{method.repeats} optimizer steps on each batch"] * (method.repeats > 1)
    )
    for amount, key, least in (
        (training.local_steps, "optimizer steps", most * method.repeats),
        (training.local_examples, "examples", most * method.repeats * width),
    ):
        if amount is not None and amount < least:
            yield (
                f"{key}: {amount} a client and round is too little for method.name = {view.name!r}, "
                f"which makes {why}: give {least} at least (training.local_{key.split()[-1]}, or "
                "compare.amount)"
            )
    steps, repeats = training.local_steps, method.repeats
    if steps is not None and steps >= most * repeats and steps % repeats:
        yield (
            f"optimizer steps: {steps} a client and round do not part into batches for method.name = "
            f"{view.name!r}, which makes {why}: give {steps // repeats * repeats} or "
            f"{(steps // repeats + 1) * repeats} (training.local_steps, or compare.amount)"
        )


def _start(kind: type[MethodTraits], view: ExperimentView) -> Iterator[str]:
    """Yield what cannot start from an adapter that exists."""
    if view.adapter is None or view.adapter.start is None:
        return
    if kind.no_start:
        yield f"adapter.start: method.name = {view.name!r} cannot: {kind.no_start}"
    for name, group in view.groups.items():
        if group.model is not None:
            yield f"adapter.start is of one model: leave clients.groups.{name}.model out"
        if group.rank is not None and not kind.mixed_ranks:
            yield (
                f"adapter.start is of one rank, which method.name = {view.name!r} does not change: "
                f"leave clients.groups.{name}.rank out"
            )


def _unseen_clients(kind: type[MethodTraits], view: ExperimentView) -> Iterator[str]:
    """Yield why there can be no unseen clients."""
    if view.clients is None or not view.clients.newcomers:
        return
    if kind.pools_data or not kind.shares_parameters:
        yield f"clients.newcomers go with methods that share parameters; {view.name!r} does not"


def _rows(kind: type[MethodTraits], view: ExperimentView) -> Iterator[str]:
    """Yield what needs rows that the coordinator does not have, or that are all the clients'."""
    if view.data is None:
        return
    needed = kind.public_rows_needed(view.method)
    unnamed = needed and view.public is not None and view.public.source is None
    files = view.partition is not None and view.partition.kind == "files"
    of_one = view.data.is_builtin or view.data.is_private or view.data.domains
    if files and not of_one and view.federation is not None and unnamed:
        yield (
            f'method.name = {view.name!r} needs public rows, and with partition.kind = "files" all are '
            "the clients': name public.source"
        )
    if not view.data.is_private:
        return
    if kind.pools_data:
        yield f'method.name = "{view.name}" puts all rows together; data.source = "clients"'
    if unnamed:
        yield (
            f'method.name = {view.name!r} needs public rows, and data.source = "clients" are private: '
            "name public.source"
        )
