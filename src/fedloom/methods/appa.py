"""APPA: groups of clients that are served worst count most, by the rewards that they report.

Each client trains with rewards of its own (``clients.groups.NAME.rewards``) and reports their mean. h_g
is the running mean of group g's, and the server's mean over groups has the weights

    appa        w_g prop. to exp((1 - h_g) / T); all alike once 1 / (1 + CoV) of the h_g is at ``fair``
    worst       all weight for the group with the lowest h_g (max-min)
    group_dro   log q_g <- log q_g - eta s_g with the round's s_g, w = softmax (Sagawa et al. 2020)
    mean        all groups alike, however many clients or rows they have

Within a group clients weigh by their rows. With an objective that reports no reward the score is the
training loss with its sign turned.

**A reconstruction** of APPA (https://arxiv.org/abs/2604.04261), whose text was not to be had: there one
policy is trained on the server by rewards r = sum_g w_g r_g that groups give to the same answers. Here
groups' policy gradients are weighed, which is the same to first order, as the gradient is linear in the
reward; advantages are standardised within a client, and answers stay where they are generated. Who
reports a low reward gets weight, so scores are to be on one scale, and a group can lie: ``most`` bounds a
group's weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from fedloom.aggregation.group_scores import (
    DECAY,
    fairness,
    group_dro,
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
    OWN_STEPS,
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
"""Before a client's id among the numbers of the state: its running mean; before the lowest id of a group:
log q of group_dro."""

WEIGHTS = "group_weights"
"""In the rounds' details: the weight of each client's group, by the client's id."""


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
    most: float = Field(default=1.0, gt=0, le=1)
    """Largest weight of a group (1: no bound); where all groups would pass it, they weigh alike."""


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
        row_privacy=OWN_STEPS,
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
    taken = ("groups", "combine", "temperature", "fair", "rate", "most")
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

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send the adapter, weigh groups by what their clients report, take the mean."""
        replies = yield training_exchange(cohort, state.tensors)
        adapters = [reply.payload.tensors for reply in replies]
        kept = dict(state.numbers) | self._running(replies, state)
        members = self._members(replies)
        weights = self._weights(members, replies, kept)
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

    def _running(self, replies: Sequence[Reply], state: State) -> dict[str, float]:
        """Return the running means of those that report a score, by name."""
        found = {}
        for reply in replies:
            name, now = _name(SCORE, reply.client), _score(reply)
            if now is not None:
                found[name] = running_mean(state.numbers.get(name), now, DECAY)
        return found

    def _weights(
        self,
        members: Mapping[int, Sequence[Reply]],
        replies: Sequence[Reply],
        kept: dict[str, float],
    ) -> dict[int, float]:
        """Return the weight of each group; ``kept`` gets the logits of group_dro."""
        own = self.settings
        scores = [_of_group(kept, reply_group) for reply_group in members.values()]
        known = [score for score in scores if score is not None]
        if not known or own.combine == "mean":
            return dict.fromkeys(members, 1 / len(members))
        middle = math.fsum(known) / len(
            known
        )  # a group that never reported counts as the others do
        means = [middle if score is None else score for score in scores]
        if own.combine == "worst":
            weights = worst_group(means)
        elif own.combine == "appa":
            rewarded = any("reward" in reply.payload.metrics for reply in replies)
            index = fairness(means) if rewarded else None
            even = index is not None and index >= own.fair
            weights = reverse_softmax(means, math.inf if even else own.temperature)
        else:
            names = [_name(LOGIT, first) for first in members]
            now = [_of_round(group, middle) for group in members.values()]
            logits = group_dro([kept.get(name, 0.0) for name in names], now, own.rate)
            kept |= dict(zip(names, logits, strict=True))
            weights = softmax(logits)
        most = max(own.most, 1 / len(weights))
        return dict(zip(members, capped(weights, [most] * len(weights)), strict=True))


def _name(kind: str, client: int) -> str:
    return f"{kind}{client:06d}"


def _score(reply: Reply) -> float | None:
    """Return the mean reward that a client reports, else its loss with the sign turned, if it does."""
    metrics = reply.payload.metrics
    loss = metrics.get("loss")
    return metrics.get("reward", None if loss is None else -loss)


def _of_group(kept: Mapping[str, float], own: Sequence[Reply]) -> float | None:
    known = [kept[name] for r in own if (name := _name(SCORE, r.client)) in kept]
    return math.fsum(known) / len(known) if known else None


def _of_round(own: Sequence[Reply], otherwise: float) -> float:
    known = [score for reply in own if (score := _score(reply)) is not None]
    return math.fsum(known) / len(known) if known else otherwise
