"""What is about to be run, as observers are told of it: sizes, and the work of each round."""

from __future__ import annotations

from collections.abc import Mapping

from fedloom.accounting.quantities import human_count
from fedloom.evaluation.metrics import PRIMARY_METRICS
from fedloom.experiment.experiment import Experiment
from fedloom.federation.presence import Presence
from fedloom.federation.selection import Uniform, UniformSettings, draw
from fedloom.runs.assembly import RunComponents
from fedloom.runs.client_privacy import selection_of
from fedloom.runs.model_building import of_server
from fedloom.runs.observers import Plan
from fedloom.runs.progress import RoundWork
from fedloom.training.steps import row_tokens


def plan_of(experiment: Experiment, parts: RunComponents, done: int) -> Plan:
    """Return what observers are told of a run before it begins, or goes on after round ``done``."""
    federation, sizes = experiment.federation, parts.engine.sizes()
    headline = PRIMARY_METRICS[parts.division.judged]
    trained = sum(p.numel() for p in parts.model.parameters.values())
    absent = parts.engine.absent()
    there = len(sizes)
    everybody = there + len(absent)
    cohort = min(federation.cohort_size, there)
    missing = ", ".join(parts.engine.title(client) for client in sorted(absent))
    about = "about " * (experiment.privacy.unit == "client" and cohort < there)
    of = f"{there} of {everybody} clients, without {missing}" if absent else f"{there} clients"
    objective = type(parts.objective).__name__
    feedback = parts.division.feedback
    pairs = ""
    if feedback is not None and feedback.pairs:
        pairs = (
            f"; {human_count(feedback.pairs)} pairs as single answers, {experiment.partition.feedback}: "
            f"{feedback.intact_share:.2f} of the pairs whole at one client"
        )
    hidden = experiment.privacy.amplification  # who is drawn is secret, and what clients hold
    held = f"rows per client {min(sizes.values())} to {max(sizes.values())}, " * (not hidden)
    return Plan(
        f"{experiment.name}: {objective} by {experiment.method.name}, {federation.rounds} rounds, "
        f"{about}{cohort} of {of} a round",
        f"model {of_server(experiment).model.path}, {human_count(trained)} trained parameters, "
        f"{held}{len(parts.division.test)} held out"
        f"{pairs}",
        federation.rounds,
        headline.name,
        headline.higher_is_better,
        {client: parts.engine.title(client) for client in sorted({*sizes, *absent})},
        _work(experiment, parts, sizes) if there == len(parts.local.sizes()) else 0.0,
        () if hidden else _ahead(experiment, parts, sizes, done),
    )


def _ahead(
    experiment: Experiment, parts: RunComponents, sizes: Mapping[int, int], done: int
) -> tuple[RoundWork, ...]:
    """Return what each round does, from the evaluation of the start on, if who is there now stays.

    Of clients elsewhere rows are known and no tokens; a token a row does then.
    """
    federation, training = experiment.federation, experiment.training
    every, scores = experiment.evaluation.every, parts.objective.needs_reference
    participations = federation.participations(len(sizes))
    tokens = {
        client: float(row_tokens(parts.local.shares[client]).sum())
        if client in parts.local.shares
        else float(rows)
        for client, rows in sizes.items()
    }
    due = {
        client: training.work(rows, participations).most_tokens(
            rows, tokens[client], training.batch_size
        )
        for client, rows in sizes.items()
    }
    new, found = set(sizes), [RoundWork(0.0)]
    selection, presence = selection_of(experiment), Presence.of(sizes)
    if selection.informed:  # whom it draws follows from what is told by then
        selection = Uniform(UniformSettings())
    for round in range(1, federation.rounds + 1):
        selection.begin(round, {})
        cohort = draw(selection, presence, federation.drawn, federation.seed, round)
        presence = presence.closed(round, cohort, ())
        first = new.intersection(cohort) if scores and round > done else set()
        new -= first
        judged = float(round % every == 0 or round == federation.rounds)
        trained = sum(due[client] for client in cohort)
        found.append(RoundWork(trained, sum(tokens[client] for client in first), judged))
    return tuple(found)


TRAINED = 3.0
"""Forward passes that training on a row takes: its own, and a backward one that is twice as long."""


def _work(experiment: Experiment, parts: RunComponents, sizes: Mapping[int, int]) -> float:
    """Return what a round trains, in rows judged at the start; see :class:`Plan`."""
    federation, training = experiment.federation, experiment.training
    judged = len(parts.division.test) + sum(map(len, parts.evaluator.client_held_out.values()))
    participations = federation.participations(len(sizes))
    steps = [
        training.work(rows, participations).most_steps(rows, training.batch_size)
        for rows in sizes.values()
    ]
    trained = sum(steps) / len(steps) * training.batch_size
    return TRAINED * trained * min(federation.cohort_size, len(sizes)) / max(1, judged)


def evaluated_first(parts: RunComponents) -> str:
    """Report the work before the first round, which may take as long as one."""
    clients = parts.evaluator.client_held_out
    own = f", and {sum(map(len, clients.values()))} of {len(clients)} clients" if clients else ""
    return (
        f"evaluating the start, before any training: {len(parts.division.test)} held-out rows{own}"
    )
