"""What intercepted updates tell of whole rows: the sequence test on the second block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean

import torch
from torch import Tensor

from fedloom.evaluation.privacy_audit.sequences import (
    MOST_TOKENS,
    NEAR,
    NEAR_READ_BACK,
    ROUGE,
    Row,
    compare_rows,
    recover_rows,
)
from fedloom.evaluation.privacy_audit.span import Candidates, RowSpace, nearest, row_space
from fedloom.models.adapters import AdapterModel
from fedloom.runs.privacy_audit.first_block import FACTOR_B, ReadByToken, layer_of
from fedloom.runs.privacy_audit.interception import Update, predicts_tokens
from fedloom.runs.privacy_audit.second_block import holding, read_by_beginning
from fedloom.runs.privacy_audit.tokens import INVERTED, PlantedRun, factor_a, read_back
from fedloom.storage.run_folder import Record

LONGEST = 64
"""Tokens of a row that are looked for."""

LEAK = 0.5
"""ROUGE-L of the rows of an update from which on it is a leak though no row is whole."""

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
    shares = planted.parts.local.shares
    return {
        "made": True,
        "whole": not any(predicts_tokens(shares[own["client"]].tokens) for own in found),
        "updates": found,
        "rounds": rounds,
        "not_attacked": list(reasons),
        "leak": any(own["exact"] or (own["rougeL"] or 0.0) > LEAK for own in found),
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
    assert planted.parts is not None
    initial = planted.parts.local.resources[update.client].initial
    with holding(model, initial, update.received):
        second = read_by_beginning(model, view)
        if second is None:
            return "no layer of a second block is trained that reads tokens and those before alone"
        told = space_of(planted, update, second.layers, initial)
        if told is None:
            return "the rank of the second block's update is at its limit"
        near, space, through = told

        def read(beginnings: Sequence[Row]) -> Tensor:
            own = second.read(beginnings)
            return own if through is None else own @ through.float().T

        rows = recover_rows(tokens, space, read, LONGEST, near)
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
    """Return the tokens that the exact view of the largest rank tells of, with a margin.

    Rounding hides some of a small change, so that its rank is below that of the others. Where Adam's step
    was read back, the step itself tells nothing.
    """
    best: tuple[tuple[bool, int, bool], RowSpace, Candidates] | None = None
    for title, change, candidates, rounding in planted.changes(update, view):
        space = row_space(change, rounding=rounding)
        order = INVERTED in title[1], space.rank, not title[1].startswith("dB")
        if space.is_exact and (best is None or order > best[0]):
            best = order, space, candidates
    if best is None:
        return None
    _, space, candidates = best
    found, _ = candidates.distances(space, space.rank)
    return [int(own) for own in nearest(found, min(space.rank + MARGIN, len(found)))]


def space_of(
    planted: PlantedRun, update: Update, layers: Sequence[str], initial: Mapping[str, Tensor]
) -> tuple[float, RowSpace, Tensor | None] | None:
    """Return the exact space of the largest rank, of layers that read the same; ``None`` without one.

    Before it stands how near a row is to it, and behind it the A through which inputs are seen.

    That of all changes of A, or of whole weights, together, or of one change of B, beside the A through
    which it sees inputs (in the first round B is 0, and some methods freeze A). Of Adam's step the
    gradient is taken as well, where it can be read back.
    """
    parts: dict[str, list[Tensor]] = {}
    found: list[tuple[str, RowSpace, Tensor | None]] = []
    training, rounds = planted.experiment.training, planted.experiment.federation.rounds
    for name, change in update.changes.items():
        if layer_of(name.rpartition("/")[2]) not in layers:
            continue
        known = factor_a(update, name, initial) if name.endswith(FACTOR_B) else None
        if name.endswith(FACTOR_B) and known is None:
            continue
        for mark, own, rounding in read_back(update, name, change, training, rounds):
            if name.endswith(FACTOR_B):
                found.append((mark, row_space(own, rounding=rounding), known))
            elif rounding:
                parts.setdefault(mark, []).append(own.double() / rounding)
    found += [(mark, row_space(torch.cat(own), rounding=1.0), None) for mark, own in parts.items()]
    exact = [own for own in found if own[1].is_exact]
    if not exact:
        return None
    mark, space, known = max(exact, key=lambda own: (own[0], own[1].rank, own[2] is None))
    return NEAR_READ_BACK if mark else NEAR, space, known


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
