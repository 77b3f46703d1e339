"""Contradictions of objectives that have answers generated and rewarded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedloom.methods import METHODS
from fedloom.objectives import make_objective
from fedloom.objectives.rewarded import RewardedSettings
from fedloom.rewards.functions import fault_of


def generation_contradictions(parts: Mapping[str, Any]) -> list[str]:
    """Return what rewards and generated answers cannot be, one line each.

    Args:
        parts: The sections that are valid on their own, by name.
    """
    if "objective" not in parts:
        return []
    settings, found = parts["objective"], []
    rewarded = {
        name: group.rewards
        for name, group in (parts["clients"].groups.items() if "clients" in parts else ())
        if group.rewards is not None
    }
    if not isinstance(settings, RewardedSettings):
        if make_objective(settings).generation is None and rewarded:
            found = [
                f"clients.groups.{name}.rewards: objective.name = {settings.name!r} has no answers "
                'generated; use objective.name = "grpo"'
                for name in rewarded
            ]
        return found
    found += settings.faults()
    for name, own in rewarded.items():
        found += [f"clients.groups.{name}.rewards: {text}" for text in map(fault_of, own) if text]
    if "method" in parts and METHODS[parts["method"].name][1].pools_data and rewarded:
        found.append(
            f"clients.groups.{min(rewarded)}.rewards: method.name = {parts['method'].name!r} puts all "
            "rows together, which have objective.rewards then: leave it out"
        )
    if "training" in parts:
        training = parts["training"]
        for name in ("local_examples", "local_tokens"):
            if getattr(training, name) is not None:
                found.append(
                    f"training.{name}: objective.name = {settings.name!r} generates what it trains on; "
                    "use training.local_steps or local_epochs, which count batches of prompts"
                )
    return found
