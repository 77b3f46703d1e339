"""What optimisation finds of rows in intercepted updates: gradient inversion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from fedloom.evaluation.privacy_audit.inversion import (
    AdamRule,
    Inversion,
    Rule,
    Shape,
    descent,
)
from fedloom.evaluation.privacy_audit.sequences import ROUGE, Row, rouge
from fedloom.evaluation.privacy_audit.span import row_space
from fedloom.models.adapters import AdapterModel
from fedloom.randomness import generator
from fedloom.runs.privacy_audit.interception import Update, frequencies
from fedloom.runs.privacy_audit.rows import MARGIN
from fedloom.runs.privacy_audit.second_block import holding
from fedloom.runs.privacy_audit.simulated_rows import SimulatedRows
from fedloom.runs.privacy_audit.tokens import INVERTED, PlantedRun, read_back
from fedloom.storage.run_folder import Record

CANDIDATES = 32
"""Tokens of which rows are made: the nearest to the first block's update, and fewer where its rank tells
how many there are."""

MOST_TOKENS = 512
"""Tokens of all rows of an update together; a larger one is not attacked."""


def inversion_record(planted: PlantedRun, updates: int) -> Record:
    """Return what optimisation finds of the rows of the last updates, or why it was not made.

    Args:
        planted: The run.
        updates: How many are attacked at most, the last ones, of as many clients as there are.
    """
    assert planted.engine is not None
    if not updates:
        return {"made": False, "why": "it was not asked for (--inversions 0)"}
    why = _why_not(planted)
    if why:
        return {"made": False, "why": why}
    found: list[Record] = []
    reasons: dict[str, None] = {}
    for update in reversed(planted.engine.updates):
        line = _of_update(planted, update)
        if isinstance(line, str):
            reasons[line] = None
        else:
            found.append(line)
        if len(found) == updates:
            break
    if not found:
        why = "; ".join(reasons) or "no client sent a change of a trained layer"
        return {"made": False, "why": why}
    share, guessed, places = (
        fmean(line[name] for line in found) for name in ("share", "guessed_share", "places")
    )
    return {
        "made": True,
        "updates": found,
        "not_attacked": list(reasons),
        "leak": share > guessed,
        "share": share,
        "guessed_share": guessed,
        "places": places,
    }


def _why_not(planted: PlantedRun) -> str:
    """Return why no update of a run can be inverted, empty where some can."""
    experiment = planted.experiment
    training = experiment.training
    if experiment.privacy.secure_aggregation:
        return (
            "with secure aggregation the server sees sums of updates, and none of a single client"
        )
    if experiment.objective.name != "sft":
        return (
            f'it simulates language modelling, and objective.name is "{experiment.objective.name}"'
        )
    if training.optimizer not in ("sgd", "adam", "adamw"):
        return f'it simulates sgd, adam and adamw, and training.optimizer is "{training.optimizer}"'
    if training.momentum or training.weight_decay or training.keep_optimizer_state:
        return (
            "it simulates an optimizer that begins anew, without momentum of SGD and weight decay "
            "(training.momentum, weight_decay, keep_optimizer_state)"
        )
    return ""


def _of_update(planted: PlantedRun, update: Update) -> Record | str:
    """Return what is found of the rows of an update, or why it was not attacked."""
    assert planted.parts is not None
    own = planted.parts.local.resources[update.client]
    known = update.learnt
    if not known:
        return "the rows of an update could not be told apart"
    if update.steps < 1 or len(known) % update.steps:
        return f"{len(known)} rows in {update.steps} steps: some were read more than once, or by halves"
    if sum(len(ids) for ids, _ in known) > MOST_TOKENS:
        return f"rows have more than {MOST_TOKENS} tokens together"
    wanted, inverted = _tensors(planted, update, own.model)
    if not wanted:
        return "nothing was sent of a trained layer that was not 0"
    shape = Shape(tuple(learnt for _, learnt in known), update.steps)
    truth = [ids for ids, _ in known]
    common = frequencies(planted.parts.local.shares)[update.client]
    candidates = _candidates(planted, update, own.model)
    seed = planted.experiment.federation.seed
    with holding(own.model, own.initial, update.received):
        rng = generator(seed, "audit inversion", update.client, update.round)
        simulated, rule = SimulatedRows(own.model, list(wanted)), _rule(planted, shape, inverted)
        attack = Inversion(wanted, simulated, rule, shape, candidates, rng, by_rows=inverted)
        found = attack.find()
        of_truth = attack.distance_of([torch.tensor(row) for row in truth])
    return {
        "round": update.round,
        "client": update.client,
        "action": update.action,
        "steps": update.steps,
        "rows": len(truth),
        "distance": found.distance,
        "distance_of_truth": of_truth,
        "read": found.read,
        **compared([row[:-1] for row in found.rows], [row[:-1] for row in truth], common),
    }


def compared(
    found: Sequence[Row], truth: Sequence[Row], frequencies: Mapping[int, float]
) -> dict[str, Any]:
    """Return how much of rows was found, beside what a guess by frequency finds.

    Args:
        found: Rows, in any order.
        truth: As many rows.
        frequencies: How common tokens are elsewhere.
    """
    inside = {token for row in truth for token in row}
    named = {token for row in found for token in row}
    count = max(len(inside), len(named))
    commonest = sorted(frequencies, key=lambda token: (-frequencies[token], token))[:count]
    left, right = list(found), 0
    for row in truth:  # each row beside the one that is most like it
        alike = [sum(a == b for a, b in zip(row, own, strict=False)) for own in left]
        at = alike.index(max(alike))
        right += alike[at]
        left.pop(at)
    scores = rouge(found, truth)
    return {
        "tokens": len(inside),
        "share": len(inside & named) / count,
        "guessed_share": len(inside & set(commonest)) / count,
        "places": right / sum(map(len, truth)),
        **(scores or dict.fromkeys(ROUGE)),
    }


def _tensors(
    planted: PlantedRun, update: Update, model: AdapterModel
) -> tuple[dict[str, Tensor], bool]:
    """Return the changes of the model's own parameters, and whether they are gradients read back.

    Of one step of Adam they are less the gradients, where any can be read back.
    """
    training, rounds = planted.experiment.training, planted.experiment.federation.rounds
    changes: dict[str, dict[str, Tensor]] = {}
    for name, change in update.changes.items():
        own = name.rpartition("/")[2]
        fits = own in model.parameters and model.parameters[own].shape == change.shape
        if fits and change.ndim == 2 and bool(change.any()):
            for mark, found, _ in read_back(update, name, change, training, rounds):
                changes.setdefault(mark, {})[own] = (-found if mark else found).float()
    inverted = changes.get(INVERTED)
    return (inverted, True) if inverted else (changes.get("", {}), False)


def _candidates(planted: PlantedRun, update: Update, model: AdapterModel) -> Tensor:
    """Return tokens, the nearest to the span of the first block's update first; see the span test."""
    best: tuple[tuple[bool, int], Tensor] | None = None
    count = CANDIDATES
    for view in planted.views_of(model):
        for _, change, candidates, rounding in planted.changes(update, view):
            space = row_space(change, rounding=rounding)
            order = space.is_exact, space.rank
            if space.rank and (best is None or order > best[0]):
                found, _ = candidates.distances(space, space.rank)
                best = order, found
                count = min(CANDIDATES, space.rank + MARGIN) if space.is_exact else CANDIDATES
    if best is None:
        return torch.arange(len(model.model.get_input_embeddings().weight))[:CANDIDATES]
    return torch.sort(best[1], stable=True).indices[:count]


def _rule(planted: PlantedRun, shape: Shape, inverted: bool) -> Rule:
    training = planted.experiment.training
    if inverted or training.optimizer == "sgd":
        return descent
    predicted = sum(sum(own[1:]) for own in shape.learnt) / shape.steps
    return AdamRule(training.beta1, training.beta2, training.epsilon, predicted)
