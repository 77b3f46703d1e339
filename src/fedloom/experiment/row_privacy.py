"""What an experiment with row-level privacy cannot be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedloom.data.sources import DataSettings
from fedloom.methods import METHODS, make_method
from fedloom.objectives import OBJECTIVES, make_objective

WHAT = 'privacy.unit = "row"'


def row_privacy_contradictions(parts: Mapping[str, Any]) -> Iterator[str]:
    """Yield what contradicts ``privacy.unit = "row"`` in an experiment's valid sections by name."""
    if "privacy" not in parts or parts["privacy"].unit != "row":
        return
    yield from _method(parts)
    if "objective" in parts:
        objective = make_objective(parts["objective"])
        if not objective.separable.holds:
            others = [n for n, (_, kind) in OBJECTIVES.items() if kind.separable.holds]
            yield (
                f"{WHAT}: objective.name = {parts['objective'].name!r} couples the rows of a batch: "
                f"{objective.separable.why} (others that go with it: {', '.join(others)})"
            )
    if "training" in parts and parts["training"].local_tokens is not None:
        yield (
            f"{WHAT}: training.local_tokens would have the number of steps depend on which rows are "
            "drawn; give training.local_steps, local_examples or local_epochs"
        )
    yield from _coupling_contradictions(parts)
    if "simulation" in parts and parts["simulation"].devices is not None:
        yield (
            f"{WHAT}: with [simulation.devices] a row decides by its length whether its client's answer "
            "comes in time, without noise: leave one of the two out"
        )
    if "partition" in parts and parts["partition"].feedback == "spread":
        yield (
            f'{WHAT}: partition.feedback = "spread" puts the two answers of a pair at two clients, each '
            "of which would hide its own answer alone; leave it out"
        )
    if "data" in parts:
        yield from _drawn(parts["data"])
    column = parts["privacy"].column
    if column is not None and "data" in parts and parts["data"].streaming:
        yield (
            f"privacy.column = {column!r}: data.streaming = true keeps the rows' other columns in their "
            "files; leave out one of the two"
        )


def _coupling_contradictions(parts: Mapping[str, Any]) -> Iterator[str]:
    """Yield which settings have a row's gradient depend on the other rows of its batch."""
    if "training" in parts and parts["training"].neftune_noise_alpha:
        yield (
            f"{WHAT}: training.neftune_noise_alpha draws from one stream for all rows of a batch, so "
            "that one row changes the others' gradients: leave it out"
        )
    if "adapter" in parts and parts["adapter"].kind == "experts":
        yield (
            f'{WHAT}: adapter.kind = "experts" asks for an even use of experts over all tokens of a '
            "batch, so that no row's gradient is its own; use another kind"
        )
    if "adapter" in parts and parts["adapter"].dropout:
        yield (
            f"{WHAT}: adapter.dropout = {parts['adapter'].dropout} draws from one stream for all rows of "
            "a batch, so that one row changes the others' gradients: leave it out"
        )
    if "model" in parts and parts["model"].dropout:
        yield (
            f"{WHAT}: model.dropout = true draws from one stream for all rows of a batch, so that one "
            "row changes the others' gradients: leave it out"
        )
    if "training" in parts and parts["training"].precision != "fp32":
        yield (
            f"{WHAT}: training.precision = {parts['training'].precision!r} rounds a row by what else is "
            'in its pass, beyond what the noise is made for: use "fp32"'
        )


def _drawn(data: DataSettings) -> Iterator[str]:
    """Yield which settings choose rows by how many there are, or by other rows."""
    whole = {"data": data} | {f"data.domains.{name}": own for name, own in data.domains.items()}
    for section, part in whole.items():
        asked = {"max_rows": part.max_rows, "weight": part.weight}
        for name in (name for name, value in asked.items() if value is not None):
            yield (
                f"{WHAT}: {section}.{name} draws rows by how many there are, so that one row more "
                "changes which others are trained on: leave it out, or write the rows drawn to a file"
            )
    if data.decontaminate == "drop":
        yield (
            f'{WHAT}: data.decontaminate = "drop" takes a passage that many training rows have for a '
            "template's, so that one row more changes which others are dropped: use "
            '"report", or drop them from the files'
        )


def _method(parts: Mapping[str, Any]) -> Iterator[str]:
    """Yield why the method leaves more of the rows than private steps do."""
    if "method" not in parts:
        return
    name = parts["method"].name
    claim = METHODS[name][1].declares.row_privacy
    if not claim.holds:
        yield (
            f"{WHAT}: method.name = {name!r} cannot: {claim.why}; docs/methods.md says which methods can"
        )
    elif make_method(parts["method"]).repeats > 1:
        yield (
            f"{WHAT}: method.name = {name!r} makes several steps on each batch, which the accountant "
            "does not cover: it takes each batch to be drawn anew"
        )
