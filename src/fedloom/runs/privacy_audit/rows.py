"""What intercepted updates tell of whole rows: the sequence test on the second block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean

import torch
from torch import Tensor

from fedloom.evaluation.privacy_audit.sequences import (
    MOST_TOKENS,
    ROUGE,
    compare_rows,
    recover_rows,
)
from fedloom.evaluation.privacy_audit.span import RowSpace, nearest, row_space
from fedloom.models.adapters import AdapterModel
from fedloom.runs.privacy_audit.first_block import FACTOR_B, ReadByToken, layer_of
from fedloom.runs.privacy_audit.interception import Update
from fedloom.runs.privacy_audit.second_block import holding, read_by_beginning
from fedloom.runs.privacy_audit.tokens import PlantedRun, read_back
from fedloom.storage.run_folder import Record

LONGEST = 64
"""Tokens of a row that are looked for."""

MARGIN = 8
"""Tokens beside those that the rank tells of: the sequence test throws out what is wrong."""


def rows_record(planted: PlantedRun, tokens: Record) -> Record:
    """Return what updates tell of whole rows, or why this could not be looked at.

    Args:
        planted: The run.
        tokens: What :func:`tokens_record` found: without tokens there are no rows.
    """
    if not tokens["made"]:
        return tokens
    assert planted.engine is not None and planted.parts is not None
    found: list[Record] = []
    reasons: dict[str, None] = {}
    for update in planted.engine.updates:
        if not update.rows:
            reasons["the rows of an update could not be told apart"] = None
            continue
        own = planted.parts.local.resources[update.client]
        views = planted.views_of(own.model)
        if not views:
            reasons["no trained layer reads what depends on a token alone"] = None
        for view in views:
            line = _of_update(planted, update, own.model, view)
            if isinstance(line, str):
                reasons[line] = None
            else:
                found.append(line)
    if not found:
        why = "; ".join(reasons) or "no update was kept"
        return {"made": False, "why": why}
    rounds = [
        _round_line(round, [own for own in found if own["round"] == round])
        for round in sorted({own["round"] for own in found})
    ]
    return {
        "made": True,
        "updates": found,
        "rounds": rounds,
        "not_attacked": list(reasons),
        "leak": any(own["exact"] for own in found),
        "worst": max(rounds, key=lambda own: (own["share"], own["rougeL"] or 0.0)),
    }


def _of_update(
    planted: PlantedRun, update: Update, model: AdapterModel, view: ReadByToken
) -> Record | str:
    """Return what an update tells of its rows, or why it was not attacked."""
    if view.by_place:
        return "places are embedded, so that tokens are known with their place only"
    tokens = tokens_of(planted, update, view)
    if tokens is None:
        return "the rank of the first block's update does not tell how many tokens there were"
    if len(tokens) > MOST_TOKENS:
        return f"{len(tokens)} distinct tokens are more than are tried ({MOST_TOKENS})"
    initial = planted.parts.local.resources[update.client].initial  # type: ignore[union-attr]
    with holding(model, initial, update.received):
        second = read_by_beginning(model, view)
        if second is None:
            return "no layer of a second block is trained that reads tokens and those before alone"
        space = space_of(planted, update, second.layers)
        if space is None:
            return "the rank of the second block's update is at its limit"
        rows = recover_rows(tokens, space, second.read, LONGEST)
    compared = compare_rows(rows, update.rows)
    return {
        "round": update.round,
        "client": update.client,
        "action": update.action,
        "steps": update.steps,
        "tokens": len(tokens),
        "rank": space.rank,
        "limit": space.limit,
        **{name: value for name, value in asdict(compared).items() if name != "rouge"},
        "share": compared.share,
        **(compared.rouge or dict.fromkeys(ROUGE)),
    }


def tokens_of(planted: PlantedRun, update: Update, view: ReadByToken) -> list[int] | None:
    """Return the tokens that the exact view of the most rows tells of, with a margin."""
    best: tuple[int, Tensor, float] | None = None
    for title, change, candidates, rounding in planted.changes(update, view):
        if title[1].startswith("dB") or candidates is not view.candidates:
            continue
        if row_space(change, rounding=rounding).is_exact and (
            best is None or len(change) >= best[0]
        ):
            best = len(change), change, rounding
    if best is None:
        return None
    space = row_space(best[1], rounding=best[2])
    found, _ = view.candidates.distances(space, space.rank)
    return nearest(found, min(space.rank + MARGIN, len(found))).tolist()


def space_of(planted: PlantedRun, update: Update, layers: Sequence[str]) -> RowSpace | None:
    """Return the space of the rows of layers that read the same, all together; ``None`` if not exact.

    Of Adam's step the gradient is taken, where it can be read back.
    """
    parts: dict[str, list[Tensor]] = {}
    training, rounds = planted.experiment.training, planted.experiment.federation.rounds
    for name, change in update.changes.items():
        if layer_of(name.rpartition("/")[2]) not in layers or name.endswith(FACTOR_B):
            continue
        for mark, own, rounding in read_back(update, name, change, training, rounds):
            if rounding:
                parts.setdefault(mark, []).append(own.double() / rounding)
    for mark in sorted(parts, reverse=True):  # what was read back first
        space = row_space(torch.cat(parts[mark]), rounding=1.0)
        if space.is_exact:
            return space
    return None


def _round_line(round: int, own: Sequence[Record]) -> Record:
    """Return the means over the updates of a round."""
    return {
        "round": round,
        "updates": len(own),
        **{
            name: fmean(line[name] for line in own)
            for name in ("steps", "tokens", "rank", "limit", "rows", "candidates", "share")
        },
        **{
            name: None if own[0][name] is None else fmean(line[name] for line in own)
            for name in ROUGE
        },
    }
