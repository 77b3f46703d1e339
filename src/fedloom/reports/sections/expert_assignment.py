"""Who held which experts in each layer, how tokens spread, and which clients are alike.

Everything comes from the records of rounds; clients are put in order of the commonest value of the column
they were divided by, where there is one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fedloom.reports.run_data import Run
from fedloom.reports.sections.details import few
from fedloom.statistics.difference_tests import GroupTest, group_test
from fedloom.storage.run_folder import Record

MOST_ROUNDS = 60
"""Rounds that the slider has at most, the first and the last among them."""

LEVELS = 10
"""Shades of a cell."""

NOT_HELD = " "

OPACITY = {NOT_HELD: 0.0} | {
    str(level): round(0.15 + 0.85 * level / 9, 2) for level in range(LEVELS)
}
"""Of a cell, by its character."""

CELL = 9
"""Width of a cell in units of the picture."""

Matrix = list[list[float]]


@dataclass(frozen=True)
class ExpertHistory:
    """Who held which experts in the rounds of a run.

    Attributes:
        clients: Ids of all clients that ever held any, in the order in which they are shown.
        groups: The commonest value that each holds, in that order; empty where there is none to tell.
        experts: Experts of a layer.
        layers: Names of the layers.
        rounds: Details of every round that has any, by its number.
    """

    clients: tuple[int, ...]
    groups: tuple[str, ...]
    experts: int
    layers: tuple[str, ...]
    rounds: Mapping[int, Record]

    def held(self, round: int, client: int) -> list[list[int]]:
        """Return the ids of a client's experts, by layer; none in a round it was absent from."""
        empty: list[list[int]] = [[] for _ in self.layers]
        found: list[list[int]] = self.rounds[round]["held"].get(str(client), empty)
        return found

    def shares(self, round: int, client: int) -> list[list[float]]:
        """Return the share of its tokens that each held expert gets, by layer; 0 where not recorded."""
        nothing = [[0.0] * len(ids) for ids in self.held(round, client)]
        found: list[list[float]] = self.rounds[round]["shares"].get(str(client), nothing)
        return found

    def shared(self, round: int) -> Matrix:
        """Return ``(clients, clients)``: experts of a layer that both hold, mean over layers."""
        own = [[set(ids) for ids in self.held(round, client)] for client in self.clients]
        return [
            [fmean(len(a & b) for a, b in zip(left, right, strict=True)) for right in own]
            for left in own
        ]

    def similarity(self, round: int) -> Matrix:
        """Return ``(clients, clients)`` how alike their tokens' embeddings are, from -1 to 1."""
        own = self.rounds[round]
        places = [own["clients"].index(client) for client in self.clients]
        return [[own["similarity"][a][b] for b in places] for a in places]

    def load(self, round: int) -> dict[str, tuple[float, float, float]]:
        """Return each expert's share of all clients' tokens: mean, least and largest over layers."""
        totals = [[0.0] * self.experts for _ in self.layers]
        for client in self.clients:
            for layer, (ids, parts) in enumerate(
                zip(self.held(round, client), self.shares(round, client), strict=True)
            ):
                for expert, part in zip(ids, parts, strict=True):
                    totals[layer][expert] += part
        sums = [sum(layer) or 1.0 for layer in totals]
        by_expert = [
            [layer[e] / whole for layer, whole in zip(totals, sums, strict=True)]
            for e in range(self.experts)
        ]
        return {str(e): (fmean(own), min(own), max(own)) for e, own in enumerate(by_expert)}

    def cells(self, round: int) -> str:
        """Return a character for each layer, expert and client: the shade, or that it is not held."""
        found = {
            (layer, expert, place): str(min(LEVELS - 1, int(part * LEVELS)))
            for place, client in enumerate(self.clients)
            for layer, (ids, parts) in enumerate(
                zip(self.held(round, client), self.shares(round, client), strict=True)
            )
            for expert, part in zip(ids, parts, strict=True)
        }
        return "".join(
            found.get((layer, expert, place), NOT_HELD)
            for layer in range(len(self.layers))
            for expert in range(self.experts)
            for place in range(len(self.clients))
        )

    def test(self, round: int) -> GroupTest | None:
        """Return whether clients of one group share more experts than clients drawn at random would."""
        return group_test(self.shared(round), self.groups) if self.groups else None


def history(rounds: Sequence[Record], partition: Record, key: str = "experts") -> ExpertHistory:
    """Return what the records of a run's rounds, one at least, say about experts under ``key``."""
    found = {r["round"]: r["details"][key] for r in rounds if key in r.get("details", {})}
    last = found[max(found)]
    clients = sorted({int(client) for one in found.values() for client in one["held"]})
    commonest = _commonest(partition)
    groups: tuple[str, ...] = ()
    if all(client in commonest for client in clients):
        counts = Counter(commonest[client] for client in clients)
        if 1 < len(counts) < len(clients):
            clients.sort(key=lambda client: (commonest[client], client))
            groups = tuple(commonest[client] for client in clients)
    return ExpertHistory(tuple(clients), groups, last["experts"], tuple(last["layers"]), found)


def draw(key: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Return what the template shows of the first run; other seeds have clients with other rows."""
    from fedloom.reports import figures

    partition = runs[0].partition
    own = history(runs[0].rounds, partition, key)
    last = max(own.rounds)
    shown = few(sorted(own.rounds), MOST_ROUNDS)
    labels = [str(client) for client in own.clients]
    charts = [
        (
            "Experts of a layer that two clients both hold, mean over layers, last round",
            figures.matrix_chart(own.shared(last), labels, "experts", diagonal=False),
        ),
        (
            "How alike clients' tokens are: cosine of their embeddings, mean over layers",
            figures.matrix_chart(own.similarity(last), labels, "cosine", limits=(-1.0, 1.0)),
        ),
    ]
    if any(own.rounds[last]["shares"].values()):
        caption = "Load: an expert's share of all tokens, mean over layers (line: least to largest)"
        charts.append((caption, figures.bar_chart(own.load(last), "expert", "share")))
    tests = {round: own.test(round) for round in sorted(own.rounds)}
    over = {round: test for round, test in tests.items() if test is not None}
    if over:
        lines = {
            "of one group": ([float(r) for r in over], [test.same for test in over.values()]),
            "others": ([float(r) for r in over], [test.other for test in over.values()]),
        }
        caption = "Experts of a layer that two clients share, by round"
        charts.append((caption, figures.line_chart(lines, "round", "experts")))
    return {
        "history": own,
        "column": partition.get("column"),
        "rounds": shown,
        "cells": [own.cells(round) for round in shown],
        "layers": [_short(name) for name in own.layers],
        "width": CELL * len(own.clients),
        "height": CELL * own.experts,
        "cell": CELL,
        "opacity": OPACITY,
        "groups": _spans(own),
        "test": tests[last],
        "figures": charts,
    }


def _commonest(partition: Record) -> dict[int, str]:
    """Return the value that each client has most rows of, where clients were divided by a column."""
    if not partition.get("column"):
        return {}
    return {
        own["client"]: max(own["counts"], key=lambda value: own["counts"][value])
        for own in partition["clients"]
        if any(own["counts"].values())
    }


def _spans(own: ExpertHistory) -> list[dict[str, Any]]:
    """Return each group with its clients, where it begins and how many columns it has."""
    from fedloom.reports.figures import PALETTE

    found: list[dict[str, Any]] = []
    for place, (client, group) in enumerate(zip(own.clients, own.groups, strict=False)):
        if not found or found[-1]["name"] != group:
            colour = PALETTE[len(found) % len(PALETTE)]
            found.append({"name": group, "start": place * CELL, "clients": [], "colour": colour})
        found[-1]["clients"].append(client)
    return found


def _short(name: str) -> str:
    """Return block and leaf of a layer's name: ``3 q_proj`` of ``model.layers.3.self_attn.q_proj``."""
    parts = name.split(".")
    block = next((part for part in parts if part.isdigit()), "")
    return f"{block} {parts[-1]}".strip()
