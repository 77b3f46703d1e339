"""Settings that are given and that no part of an experiment reads.

Where a setting is read for some values of another, or for some kinds of experiment, that stands beside
its type (:class:`fedloom.settings.schema.Of`): here it is compared with the experiment. A setting at its
default is never reported: files written by a run hold all settings.
"""

from __future__ import annotations

from collections.abc import Iterable

from fedloom.display.untrusted_text import quoted
from fedloom.experiment.experiment import SECTIONS, Experiment
from fedloom.federation.selection import UniformSettings
from fedloom.methods import make_method
from fedloom.objectives import make_objective
from fedloom.settings.schema import Of, Settings


def unread_settings(experiment: Experiment) -> dict[str, str]:
    """Return the settings that are not at their default and do nothing, each with a sentence about it.

    Args:
        experiment: As it would be run.

    Returns:
        ``section.key`` to what a user is told.
    """
    known, found = _facts(experiment), {}
    for section in SECTIONS:
        own: Settings = getattr(experiment, section)
        for key, field in type(own).model_fields.items():
            value = getattr(own, key)
            if value == field.default or (value == {} and field.default is None):
                continue
            for of in field.metadata:
                if isinstance(of, Of) and known.get(of.what) not in of.values:
                    name = f"{section}.{key}"
                    found[name] = f"{name} = {quoted(value, 60)} does nothing: {_why(of, known)}"
                    break
    if experiment.selection != UniformSettings() and not known["draws clients"]:
        found["selection.name"] = (
            f"selection.name = {quoted(experiment.selection.name, 60)} does nothing: all clients take "
            "part in every round"
        )
    return found


def unread_in_all(experiments: Iterable[Experiment]) -> list[str]:
    """Return warnings about settings that do nothing in any of the experiments that have them.

    The base of a comparison may hold settings that only some of its configurations read.
    """
    told: dict[str, str] = {}
    read: set[str] = set()
    for experiment in experiments:
        unread = unread_settings(experiment)
        told = {**unread, **told}
        read |= _given(experiment) - unread.keys()
    return [text for name, text in told.items() if name not in read]


def _given(experiment: Experiment) -> set[str]:
    """Return the settings that are not at their default."""
    table = experiment.to_table(defaults=False)
    return {f"{section}.{key}" for section in SECTIONS for key in table.get(section, {})}


def _facts(experiment: Experiment) -> dict[str, object]:
    """Return what settings depend on: all settings by name, and what follows from several of them."""
    method, rounds = make_method(experiment.method), experiment.federation.rounds
    objective = make_objective(experiment.objective)
    causal = objective.head == "causal"
    parts = method.parts
    trainings = max(method.trainings_of(round, rounds) for round in {1, rounds})
    settings = {
        f"{section}.{key}": getattr(getattr(experiment, section), key)
        for section in SECTIONS
        for key in type(getattr(experiment, section)).model_fields
    }
    return settings | {
        "head": objective.head,
        "heads": not causal or bool(parts) or objective.needs_reward,
        "trains again": trainings > 1 or method.repeats > 1,
        "public rows": method.public_rows_needed(experiment.method),
        "compresses": experiment.wire.compresses,
        "chooses a codec": experiment.wire.chooses,
        "diverges": objective.generation is None or objective.generation.reference,
        "joins": bool(experiment.clients.newcomers),
        "draws clients": experiment.federation.cohort_size < experiment.federation.clients,
        "judges clients": experiment.judges_clients,
        "keeps the best": experiment.evaluation.best_round_by is not None,
        "stops early": experiment.evaluation.early_stopping_patience is not None,
        "generates": experiment.evaluation.judged_by != "loss"
        or (causal and experiment.evaluation.samples > 0),
    }


def _why(of: Of, known: dict[str, object]) -> str:
    """Return why a setting is not read."""
    if of.otherwise:
        return of.otherwise
    values = " or ".join(repr(value) for value in of.values)
    return f"it is read where {of.what} is {values}, which is {known[of.what]!r}"
