"""APPA: groups of clients that are served worst count most, by the rewards that they report.

Each client trains with rewards of its own (``clients.groups.NAME.rewards``) and reports their mean. h_g
is the running mean of group g's, and the server's mean over groups has the weights

    appa        w_g prop. to exp((1 - h_g) / T); all alike once 1 / (1 + CoV) of the h_g is at ``fair``
    worst       all weight for the group with the lowest h_g (max-min)
    group_dro   log q_g <- log q_g - eta (s_g - mean s) over the groups there, with the round's s_g;
                w = softmax (Sagawa et al. 2020); a newcomer starts at the mean of known log q
    mean        all groups alike, however many clients or rows they have

Within a group clients weigh by their rows. In a round in which nobody reports a reward the score is the
training loss with its sign turned; otherwise who reports none has no score. Scores are cut to the range
from ``lowest`` to ``highest``.

**A reconstruction** of APPA (https://arxiv.org/abs/2604.04261), whose text was not to be had: there one
policy is trained on the server by rewards r = sum_g w_g r_g that groups give to the same answers. Here
groups' policy gradients are weighed, which is the same to first order, as the gradient is linear in the
reward; advantages are standardised within a client, and answers stay where they are generated. Who
reports a low reward gets weight, so scores are to be on one scale, and a group can lie: ``most`` bounds a
group's weight, the range of scores how long a lie stays in its running mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from fedloom.aggregation.group_scores import (
    fairness,
    group_dro,
    mean_score,
    reverse_softmax,
    running_mean,
    softmax,
    worst_group,
)
from fedloom.aggregation.means import weighted_mean
from fedloom.aggregation.weights import capped
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import train_and_upload, training_exchange
from fedloom.methods.contract.averaging import weights_of
from fedloom.methods.contract.client import Handler
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import ADAPTERS_ALONE, Method
from fedloom.methods.declaration import (
    CODED_CHANGES,
    EACH_ANSWER,
    TOGETHER,
    Absence,
    Declaration,
    no,
)
from fedloom.reports.sections.spec import SectionSpec
from fedloom.settings.schema import NamedSettings, Of
from fedloom.tensors import State
from fedloom.wire.messages import Reply

SCORE, LOGIT = "score/", "logit/"
"""Among the numbers of the state: before a client's id its running mean; before the lowest id of a group,
without zeros in front as it is not that client's own, log q of group_dro."""

WEIGHTS = "group_weights"
"""In the rounds' details: the weight of each client's group, by the client's id."""

WEIGHED = ("appa", "worst", "group_dro")
"""What ``method.combine`` is where groups weigh by their scores."""


class APPASettings(NamedSettings):
    """``[method] name = "appa"``."""

    name: Literal["appa"] = "appa"
    groups: list[list[int]] = []
    """Client ids of each group; clients of none are a group each (default: every client is one)."""
    combine: Literal["appa", "worst", "group_dro", "mean"] = "appa"
    """How groups are weighed: see above."""
    temperature: Annotated[float, Of("method.combine", ("appa",))] = Field(default=0.1, gt=0)
    """T of appa (0.1), in units of a reward."""
    fair: Annotated[float, Of("method.combine", ("appa",))] = Field(default=0.99, gt=0, le=1)
    """Fairness 1 / (1 + CoV) of the groups' rewards from which on appa weighs groups alike (0.99)."""
    rate: Annotated[float, Of("method.combine", ("group_dro",))] = Field(default=0.1, ge=0)
    """eta of group_dro."""
    most: Annotated[float, Of("method.combine", WEIGHED)] = Field(default=0.75, gt=0, le=1)
    """Largest weight of a group (0.75; 1: no bound, so that one that reports what it likes can take all);
    in a round of so few groups that all would pass it they weigh alike."""
    lowest: Annotated[float, Of("method.combine", WEIGHED)] = Field(default=-10.0, ge=-1e6, le=1e6)
    """Lowest score (-10), in units of a reward: a lower one that is reported counts as this."""
    highest: Annotated[float, Of("method.combine", WEIGHED)] = Field(default=10.0, ge=-1e6, le=1e6)
    """Highest score (10), likewise; above lowest."""


class APPA(Method):
    """FedAvg over groups, with weights by their rewards."""

    declares = Declaration(
        "APPA",
        "https://arxiv.org/abs/2604.04261",
        "reconstructed",
        "groups' changes are weighed by their rewards, where the paper puts rewards of the same answers "
        "together",
        "FedLLM",
        "the adapter, down and up",
        "nothing",
        secure_aggregation=EACH_ANSWER,
        client_privacy=no("a group's weight follows from rewards that its clients report"),
        row_privacy=no("weights follow from losses, which private steps do not report"),
        asynchronous=TOGETHER,
        compression=CODED_CHANGES,
        absence=Absence(
            "weights are over groups with an answer; its running mean, kept by its id, stays as it is",
            "goes on with the running mean that it had",
            "is in no mean",
        ),
        problem="one policy serves some groups of clients worse than others",
    )
    reveals = ADAPTERS_ALONE
    taken = ("groups", "combine", "temperature", "fair", "rate", "most", "lowest", "highest")
    sections = (
        SectionSpec(
            "client_table",
            "Weights of groups",
            "Weight of each client's group in the round's mean: the lower its running reward, the "
            "larger.",
            WEIGHTS,
        ),
    )

    def __init__(self, settings: APPASettings) -> None:
        """Keep the settings."""
        self.settings = settings

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also what groups cannot be."""
        yield from super().check(view)
        named = [client for group in view.method.groups for client in group]
        twice = sorted({client for client in named if named.count(client) > 1})
        if twice:
            yield f"method.groups: client {twice[0]} is in several: a client is in one group"
        if not all(view.method.groups):
            yield "method.groups: a group has no client: leave it out"
        clients = view.federation.clients if view.federation is not None else None
        beyond = [client for client in named if client < 0 or (clients and client >= clients)]
        if beyond:
            yield f"method.groups: there is no client {beyond[0]}: ids go from 0 to {(clients or 1) - 1}"
        own = view.method
        if own.lowest >= own.highest:
            yield (
                f"method.lowest = {own.lowest:g} is not below method.highest = {own.highest:g}: give the "
                "range of the rewards that clients report"
            )
        if view.federation is not None and not beyond and not twice and own.combine in WEIGHED:
            groups = view.federation.clients - len(named) + len(own.groups)
            there = min(groups, view.federation.cohort_size)
            if 1 < there <= 1 / own.most:
                yield (
                    f"method.most = {own.most:g} has the groups of a round, {there} at most, weigh alike "
                    'whatever they report: give a larger one, or leave that to combine = "mean"'
                )

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send the adapter, weigh groups by what their clients report, take the mean."""
        replies = yield training_exchange(cohort, state.tensors)
        adapters = [reply.payload.tensors for reply in replies]
        scores, rewarded = self._scores(replies)
        kept = dict(state.numbers)
        for client, score in scores.items():
            name = _name(SCORE, client)
            kept[name] = running_mean(kept.get(name), score)
        members = self._members(replies)
        weights = self._weights(members, scores, kept, rewarded=rewarded)
        cohort.details[WEIGHTS] = {
            str(reply.client): weights[first] for first, own in members.items() for reply in own
        }
        shares: dict[int, float] = {}
        for first, own in members.items():
            rows = weights_of(own, by_rows=True)
            shares |= {
                r.client: weights[first] * n / sum(rows) for r, n in zip(own, rows, strict=True)
            }
        mean = weighted_mean(adapters, [shares[reply.client] for reply in replies])
        return State(mean, dict(sorted(kept.items())))

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": train_and_upload}

    def _members(self, replies: Sequence[Reply]) -> dict[int, list[Reply]]:
        """Return the replies of each group, named by the lowest id of its clients, there or not."""
        first = {client: min(group) for group in self.settings.groups for client in group}
        found: dict[int, list[Reply]] = {}
        for reply in replies:
            found.setdefault(first.get(reply.client, reply.client), []).append(reply)
        return dict(sorted(found.items()))

    def _scores(self, replies: Sequence[Reply]) -> tuple[dict[int, float], bool]:
        """Return the scores of a round by client, all of one kind, and whether they are rewards.

        They are mean rewards where any client reports one, else losses with the sign turned.
        """
        reported = {reply.client: reply.payload.metrics for reply in replies}
        rewarded = any("reward" in own for own in reported.values())
        name, sign = ("reward", 1.0) if rewarded else ("loss", -1.0)
        lowest, highest = self.settings.lowest, self.settings.highest
        return {
            client: min(max(sign * own[name], lowest), highest)
            for client, own in reported.items()
            if name in own
        }, rewarded

    def _weights(
        self,
        members: Mapping[int, Sequence[Reply]],
        scores: Mapping[int, float],
        kept: dict[str, float],
        *,
        rewarded: bool,
    ) -> dict[int, float]:
        """Return the weight of each group; ``kept`` gets the logits of group_dro."""
        own = self.settings
        running = {r.client: kept.get(_name(SCORE, r.client)) for g in members.values() for r in g}
        found = [mean_score(running[r.client] for r in group) for group in members.values()]
        known = [score for score in found if score is not None]
        if not known or own.combine == "mean":
            return dict.fromkeys(members, 1 / len(members))
        middle = math.fsum(known) / len(known)  # what a group that never reported counts as
        means = [middle if score is None else score for score in found]
        if own.combine == "worst":
            weights = worst_group(means)
        elif own.combine == "appa":
            index = fairness(means) if rewarded else None
            even = index is not None and index >= own.fair
            weights = reverse_softmax(means, math.inf if even else own.temperature)
        else:
            names = [f"{LOGIT}{first}" for first in members]
            now = [mean_score(scores.get(r.client) for r in g) for g in members.values()]
            away = [v for name, v in kept.items() if name.startswith(LOGIT) and name not in names]
            logits = group_dro([kept.get(name) for name in names], now, own.rate, away)
            kept |= dict(zip(names, logits, strict=True))
            weights = softmax(logits)
        most = max(own.most, 1 / len(weights))
        return dict(zip(members, capped(weights, [most] * len(weights)), strict=True))


def _name(kind: str, client: int) -> str:
    return f"{kind}{client:06d}"
