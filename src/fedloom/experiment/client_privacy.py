"""What an experiment with client-level privacy cannot be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedloom.methods import METHODS

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


def _federation(parts: Mapping[str, Any]) -> Iterator[str]:
    """Yield what draws clients in another way than by coins, and a delta that is too large."""
    federation, delta = parts["federation"], parts["privacy"].delta
    if "selection" in parts and parts["selection"].name != "uniform":
        yield (
            f"{WHAT} draws each client by a coin of its own: leave out selection.name = "
            f"{parts['selection'].name!r}"
        )
    for key in ("replacements", "extra"):
        if getattr(federation, key):
            yield (
                f"{WHAT} draws each client by a coin of its own, and those who give no answer add "
                f"nothing: leave out federation.{key} = {getattr(federation, key)}"
            )
    if parts["privacy"].separates:
        yield from _rounds_of_clients(parts)
    if delta is not None and delta >= 1 / federation.clients:
        yield (
            f"privacy.delta = {delta:g} is not below 1 / federation.clients = "
            f"{1 / federation.clients:.2g}: a mechanism may then show a client whole; give a tenth of "
            "that, or less"
        )


def _rounds_of_clients(parts: Mapping[str, Any]) -> Iterator[str]:
    """Yield bounds on the rounds of a client that leave too few clients for a round."""
    federation, privacy = parts["federation"], parts["privacy"]
    unseen = set(parts["clients"].newcomers) if "clients" in parts else set()
    members, drawn = federation.clients - len(unseen), federation.cohort_size
    apart, most = privacy.min_separation, privacy.max_participations
    asked = f"federation.clients_per_round = {drawn}"
    if apart is not None and apart * drawn > members:
        yield (
            f"privacy.min_separation = {apart}: with {asked} every {apart} rounds need "
            f"{apart * drawn} clients, and there are {members}: give {max(1, members // drawn)} at most, "
            "or draw fewer clients for a round"
        )
    if most is not None and most * members < federation.rounds * drawn:
        yield (
            f"privacy.max_participations = {most}: {federation.rounds} rounds with {asked} need "
            f"{federation.rounds * drawn} participations, and {members} clients have {most * members}: "
            f"give {-(-federation.rounds * drawn // members)} at least, or draw fewer clients for a round"
        )
