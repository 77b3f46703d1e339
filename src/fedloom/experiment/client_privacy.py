"""What an experiment with client-level privacy cannot be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedloom.errors import SettingsError
from fedloom.methods import METHODS
from fedloom.privacy.distributed_noise import least_survivors
from fedloom.privacy.secure_aggregation.graph import LEAST
from fedloom.privacy.settings import PrivacySettings

WHAT = 'privacy.unit = "client"'


def client_privacy_contradictions(parts: Mapping[str, Any]) -> Iterator[str]:
    """Yield what contradicts ``privacy.unit = "client"`` in an experiment's valid sections by name."""
    if "privacy" not in parts or parts["privacy"].unit != "client":
        return
    if "method" in parts:
        name = parts["method"].name
        claim = METHODS[name][1].declares.client_privacy
        if not claim.holds:
            yield (
                f"{WHAT}: method.name = {name!r} cannot: {claim.why}; docs/methods.md says which "
                "methods can"
            )
    if "aggregation" in parts and parts["aggregation"].rule != "mean":
        yield (
            f"{WHAT}: aggregation.rule = {parts['aggregation'].rule!r} is not a sum, of which one "
            'client\'s share is bounded: use "mean", in which the clip bounds every client'
        )
    if "admission" in parts and parts["admission"].max_change:
        yield (
            f"{WHAT}: admission.max_change leaves a client out by the norm of its change; the "
            "clip bounds every change: leave it out"
        )
    if "federation" in parts:
        yield from _federation(parts)
    if parts["privacy"].amplification:
        yield from _amplification(parts)


AMPLIFIED = "privacy.amplification = true"


def _amplification(parts: Mapping[str, Any]) -> Iterator[str]:
    """Yield what would show who was drawn, or make who is drawn hang on others."""
    if "method" in parts:
        kind = METHODS[parts["method"].name][1]
        if kind.personal or kind.own_models:
            yield (
                f"{AMPLIFIED}: with method.name = {parts['method'].name!r} each client keeps "
                f"{kind.declares.keeps}, which show whether it took part: use a method with one model "
                "for all, or leave amplification out"
            )
    if "evaluation" in parts and parts["evaluation"].per_client:
        yield (
            f"{AMPLIFIED}: metrics of single clients name them: set evaluation.per_client = false"
        )
    if "federation" in parts and parts["federation"].cohort_size >= parts["federation"].clients:
        yield (
            f"{AMPLIFIED}: all {parts['federation'].clients} clients take part in every round, and "
            "nothing is drawn: set federation.clients_per_round below federation.clients, or leave it out"
        )
    if "output" in parts and parts["output"].trackers:
        yield (
            f"{AMPLIFIED}: output.trackers = {list(parts['output'].trackers)} get each round as it "
            "ends, and how long a round takes shows how many clients it had: leave trackers out"
        )
    if "simulation" in parts and parts["simulation"].devices is not None:
        yield (
            f"{AMPLIFIED}: with [simulation.devices] a round takes as long as its slowest client, and "
            "who can be asked in the next follows from that: leave the section out"
        )
    if "simulation" in parts and parts["simulation"].cohort != 1:
        yield (
            f"{AMPLIFIED}: with simulation.cohort = {parts['simulation'].cohort!r} clients are trained "
            "in one pass, where rounding changes one's answer by who else was drawn: leave it out"
        )


def _federation(parts: Mapping[str, Any]) -> Iterator[str]:
    """Yield what draws clients in another way than is accounted for, and a delta that is too large."""
    federation, delta = parts["federation"], parts["privacy"].delta
    privacy = parts["privacy"]
    separates, draws = privacy.separates, "draws each client by a coin of its own"
    if separates:
        draws = "draws clients by how often and when each was drawn"
    elif privacy.distributes:
        draws = "draws as many clients for each sum, all alike"
    if "selection" in parts and parts["selection"].name != "uniform":
        yield f"{WHAT} {draws}: leave out selection.name = {parts['selection'].name!r}"
    for key in ("replacements", "extra"):
        if getattr(federation, key):
            yield (
                f"{WHAT} {draws}, and those who give no answer add nothing: leave out "
                f"federation.{key} = {getattr(federation, key)}"
            )
    if separates:
        yield from _rounds_of_clients(parts)
    if privacy.distributes:
        yield from _shares_of_noise(parts)
    if delta is not None and delta >= 1 / federation.clients:
        yield (
            f"privacy.delta = {delta:g} is not below 1 / federation.clients = "
            f"{1 / federation.clients:.2g}: a mechanism may then show a client whole; give a tenth of "
            "that, or less"
        )


def _shares_of_noise(parts: Mapping[str, Any]) -> Iterator[str]:
    """Yield too many clients whose noise is not counted on."""
    federation, colluding = parts["federation"], parts["privacy"].colluding
    unseen = set(parts["clients"].newcomers) if "clients" in parts else set()
    drawn = min(federation.cohort_size, federation.clients - len(unseen))
    least = least_survivors(drawn)
    if drawn >= LEAST and colluding >= least:
        yield (
            f"privacy.colluding = {colluding}: of {drawn} clients a round {least} may be all that are "
            f"left of a sum, and all of these might tell their noise: give {least - 1} at most, or draw "
            "more clients for a round"
        )


def _rounds_of_clients(parts: Mapping[str, Any]) -> Iterator[str]:
    """Yield bounds on the rounds of a client that leave too few clients for a round."""
    federation, privacy = parts["federation"], parts["privacy"]
    unseen = set(parts["clients"].newcomers) if "clients" in parts else set()
    members, drawn = federation.clients - len(unseen), federation.cohort_size
    apart, most = privacy.min_separation, privacy.max_participations
    asked = f"federation.clients_per_round = {drawn}"
    fewer = "draw fewer clients for a round"
    if apart is not None and apart * drawn > members:
        least = f"give {members // drawn} at most, or " if drawn <= members else ""
        every = f"every {apart} rounds need" if apart > 1 else "every round needs"
        yield (
            f"privacy.min_separation = {apart}: with {asked} {every} {apart * drawn} clients, and there "
            f"are {members}: {least}{fewer}"
        )
    if most is not None and most * members < federation.rounds * drawn:
        needed = federation.rounds * drawn
        more = f"give {-(-needed // members)} at least, or " if drawn <= members else ""
        yield (
            f"privacy.max_participations = {most}: {federation.rounds} rounds with {asked} need "
            f"{needed} participations, and {members} clients have {most * members}: {more}{fewer}"
        )


SHOWN_BY = {
    "machines": "between machines the traffic, the gateway's records and the members' logs show who is "
    "asked in each round: run it with --engine simulation, or leave amplification out",
    "ray": "Ray's dashboard and logs show which client is worked on: leave Ray out; --workers does the "
    "same on this machine",
    "on_step": "on_step is told whose step it is: leave it out",
    "profile": "a trace shows which client was worked on and when: leave --profile out",
    "audit": "the audit plants rows at clients and says which of them were trained on: audit the "
    "experiment with amplification = false and the same noise_multiplier, or attack the released "
    "adapter (fedloom audit privacy RUN --rows FILE.jsonl)",
    "live": "who watches the page sees how long each round takes, and so how many clients it has: leave "
    "--live out; fedloom report shows the run when it is over",
    "comparison": "the page of a comparison shows what rounds cost: run each experiment by itself, and "
    "give the folders to fedloom report",
}
"""What shows who is drawn, and why."""


def require_secret(privacy: PrivacySettings, asked: Mapping[str, bool]) -> None:
    """Check that nothing which was asked for with a run shows who is drawn, where that is secret.

    Args:
        privacy: Of the experiment.
        asked: Whether it was asked for, by the names of :data:`SHOWN_BY`.

    Raises:
        SettingsError: Something shows it.
    """
    if not privacy.amplification:
        return
    problems = [f"{AMPLIFIED}: {SHOWN_BY[name]}" for name, own in asked.items() if own]
    if problems:
        raise SettingsError(problems, "the command")
