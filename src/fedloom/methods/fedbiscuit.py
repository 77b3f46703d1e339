"""FedBiscuit: several binary selectors, each of a group of clients; by majority they label pairs for DPO.

Source: Wu et al. 2024, "Towards Federated RLHF with Aggregated Client Preference for LLMs",
https://arxiv.org/abs/2407.03038, and the authors' code. In a warm-up one adapter after the other is
trained by whoever is drawn. Then, every some rounds, all clients tell the loss of each adapter on rows
that they do not train on, and the server divides them into groups of one size
(``aggregation/clusters.py``); a client trains its group's adapter alone, and the server takes a mean of
each. ``fedloom label`` has all adapters vote on pairs. It works with any objective; with one adapter and
``step = "mean"`` it is FedAvg.

The published step of an adapter is sum_k (w_k - w) / N, over the few of its group that answered and all N
clients: ``step = "damped"``, with means by rows. Ours: an absent client keeps its group; one without a
group that is drawn tells its losses in that round and joins the adapter with the least; a client that was
not drawn since groups were formed is judged by the adapter that it found best itself.

What makes groups is that warm-ups differ in who is drawn. Where all clients take part in every round,
adapters come out of it alike, and groups are as good as drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from fedloom.aggregation.clusters import balanced_groups
from fedloom.federation.informed_selection import LEAST_ROWS
from fedloom.federation.protocol import Cohort, Replies, Round
from fedloom.methods.bases.client_groups import (
    group_requests,
    groups_of,
    numbers_of,
    warm_up_rounds,
)
from fedloom.methods.bases.parameter_averaging import LEARNING_RATE, TRAIN_REPLY_NUMBERS
from fedloom.methods.bases.selectors import Step, losses_of, stepped, validation_rows
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import ADAPTERS_ALONE, Method
from fedloom.methods.declaration import EACH_ANSWER, TOGETHER, Absence, Declaration, no
from fedloom.randomness import generator
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors, join_parts, part_of
from fedloom.wire.messages import Exchange, Payload
from fedloom.wire.schema import NumberSpec, Schema, score

MOST = 64
"""Adapters at most."""

INDEX = NumberSpec("selector", -1.0, MOST - 1.0)
"""Number of a request: which adapter it is of the client's group, -1 in the warm-up."""

CHOSEN = "selector"
"""Slot of the client store: the number of the adapter that it uses."""


class FedBiscuitSettings(NamedSettings):
    """``[method] name = "fedbiscuit"``."""

    name: Literal["fedbiscuit"] = "fedbiscuit"
    selectors: int = Field(default=3, ge=1, le=MOST)
    """U, adapters (published: 3 or 5); an odd number has no ties when they vote."""
    warm_up_share: float = Field(default=0.3, ge=0, le=1)
    """Share of the rounds in which adapters are trained one after the other by all who are drawn, one
    round of each at least (published: 150 of 500)."""
    regroup_every: int = Field(default=10, ge=1)
    """Rounds after which groups are formed anew (published: 50 of 500)."""
    step: Step = "mean"
    """mean: to the mean of a group's answers; damped: of that way the share that those who answered are
    of all clients (published, after the warm-up)."""
    validation_share: float = Field(default=0.05, gt=0, lt=1)
    """Share of a client's rows that it chooses by and does not train on (published: 0.05), 8 rows at
    least; a client with fewer than 16 chooses by all of them, and trains on all."""
    validation_rows: int = Field(default=200, ge=LEAST_ROWS, le=100_000)
    """Most of these (published: 200)."""


class FedBiscuit(Method):
    """Federated averaging of several adapters, each within a group of clients."""

    declares = Declaration(
        "FedBiscuit",
        "https://arxiv.org/abs/2407.03038",
        "adapted",
        "each pair is asked in both orders; the whole step to a group's mean, by rows, unless damped",
        "FedLLM",
        "one adapter, down and up; when groups are formed, all of them down to every client",
        "which adapter it uses",
        secure_aggregation=EACH_ANSWER,
        client_privacy=no("groups are formed of single clients' losses"),
        row_privacy=no("the losses by which groups are formed have no noise"),
        asynchronous=TOGETHER,
        compression=no("clients of unlike groups are sent unlike adapters"),
        absence=Absence(
            "is in no mean; its group stays",
            "first there when groups exist, it tells its losses and joins the adapter with the least",
            "is in no mean and no group that is formed later",
        ),
        problem="preferences are private and groups of clients disagree; judges label pairs for DPO",
    )
    reveals = ADAPTERS_ALONE
    taken = ("warm_up_share", "regroup_every", "step", "validation_share", "validation_rows")
    bounded = MappingProxyType({"selectors": "max_steps"})
    averages = True
    personal = True

    def __init__(self, settings: FedBiscuitSettings) -> None:
        """Keep the settings; rules other than the mean see a group's few answers alone."""
        self.settings = settings
        self.averages = settings.selectors == 1

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also too few rounds to train each adapter, and too few clients of a group for a rule."""
        yield from super().check(view)
        federation, rule, count = view.federation, view.aggregation, view.method.selectors
        if federation is None or count == 1:
            return
        if federation.rounds <= count:
            yield (
                f"federation.rounds = {federation.rounds}: method.selectors = {count} adapters are "
                f"warmed up in one round each at least, and then groups train: use {count + 1} rounds or "
                "more, or fewer selectors"
            )
        if rule is not None:
            setting, drawn = "method.selectors", federation.cohort_size
            yield from rule.contradictions_of_groups(setting, count, federation.clients, drawn)

    def initial_state(self, adapter: Tensors) -> State:
        """Return so many times the same adapter."""
        return State(join_parts(**{_name(u): adapter for u in range(self.settings.selectors)}))

    def round(self, state: State, cohort: Cohort) -> Round:
        """Warm an adapter up; or form groups, if they are due, and train each group's."""
        own, groups, tensors = self.settings, groups_of(state), dict(state.tensors)
        warm = warm_up_rounds(own.warm_up_share, self.server.rounds, own.selectors)
        if cohort.round <= warm or own.selectors == 1:
            number = (cohort.round - 1) * own.selectors // warm if cohort.round <= warm else 0
            of = dict.fromkeys(cohort.clients, number)
        else:
            due = (cohort.round - warm - 1) % own.regroup_every == 0
            unknown = [client for client in cohort.clients if client not in groups]
            asked = cohort.presence.available if due else unknown
            if asked:
                replies = yield self._scores(state, cohort, tuple(asked))
                groups = self._grouped(groups, replies, cohort, anew=due)
            of = {client: groups[client] for client in cohort.clients if client in groups}
            cohort.details["groups"] = {str(c): group for c, group in sorted(groups.items())}
        replies = yield self._training(state, cohort, of, grouped=bool(groups))
        members = len(cohort.presence.members)
        for number in sorted({of[client] for client in replies.answered}):
            its = Replies(reply for reply in replies if of[reply.client] == number)
            start, answered = part_of(state.tensors, _name(number)), len(its)
            mean = self.averaged(its, cohort, start, noted=own.selectors == 1)
            step: Step = own.step if cohort.round > warm else "mean"
            tensors |= join_parts(**{_name(number): stepped(start, mean, step, answered, members)})
        return State(tensors, numbers_of(groups))

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"score": self._score, "train": self._train}

    def shared(self, state: State) -> Tensors:
        """Return the adapter of most clients, of equally many the first."""
        sizes = Counter(groups_of(state).values())
        return part_of(state.tensors, _name(max(sizes, key=lambda u: (sizes[u], -u), default=0)))

    def ensemble(self, state: State) -> Mapping[str, Tensors]:
        """Return all adapters."""
        names = map(_name, range(self.settings.selectors))
        return {name.replace("/", "-"): part_of(state.tensors, name) for name in names}

    def sent_for_evaluation(self, state: State) -> Tensors:
        """Return all adapters."""
        return state.tensors

    def load(self, client: Client, payload: Payload) -> None:
        """Write the adapter that the client uses; the first where it knows of none."""
        chosen = client.store.get(CHOSEN, {CHOSEN: torch.zeros(1)})[CHOSEN]
        client.model.write(part_of(payload.tensors, _name(int(chosen))))

    def _scores(self, state: State, cohort: Cohort, clients: tuple[int, ...]) -> Exchange:
        """Return the exchange in which clients tell the loss of each adapter."""
        losses = tuple(score(_loss(number)) for number in range(self.settings.selectors))
        sent, reply = Payload(state.tensors), Schema((), losses)
        request = Schema.of(state.tensors)
        return Exchange.broadcast("score", cohort.round, clients, sent, request, reply)

    def _grouped(
        self, groups: Mapping[int, int], replies: Replies, cohort: Cohort, *, anew: bool
    ) -> dict[int, int]:
        """Return the groups, anew of those that answered, or with newcomers; others keep theirs."""
        names = [_loss(number) for number in range(self.settings.selectors)]
        losses = {reply.client: [reply.payload.numbers[n] for n in names] for reply in replies}
        if not anew:
            return {**groups, **{client: int(np.argmin(own)) for client, own in losses.items()}}
        seed, round = self.server.seed, cohort.round
        drawn = {client: generator(seed, "groups", client, round).random() for client in losses}
        kept = {client: own for client, own in groups.items() if client in cohort.presence.members}
        return {**kept, **balanced_groups(losses, sorted(drawn, key=drawn.__getitem__))}

    def _training(
        self, state: State, cohort: Cohort, of: Mapping[int, int], *, grouped: bool
    ) -> Exchange:
        """Return the exchange in which each client trains the adapter that is named for it."""
        adapter = part_of(state.tensors, _name(0))
        request = Schema.of(adapter, (LEARNING_RATE, INDEX))
        reply = Schema.of(adapter, TRAIN_REPLY_NUMBERS, cohort.reported)

        def sent(number: int) -> Payload:
            index = float(number) if grouped else -1.0
            numbers = {LEARNING_RATE.name: cohort.learning_rate, INDEX.name: index}
            return Payload(part_of(state.tensors, _name(number)), numbers)

        return Exchange("train", cohort.round, request, reply, group_requests(of, sent, request))

    def _rows(self, client: Client) -> np.ndarray:
        """Return the rows that a client chooses by; none where there is nothing to choose."""
        own = self.settings
        most = own.validation_rows if own.selectors > 1 else 0
        return validation_rows(client, own.validation_share, most)

    def _score(self, client: Client, payload: Payload) -> Payload:
        adapters = [part_of(payload.tensors, _name(u)) for u in range(self.settings.selectors)]
        losses = losses_of(client, adapters, self._rows(client))
        client.store[CHOSEN] = {CHOSEN: torch.tensor([int(np.argmin(losses))])}
        return Payload(numbers={_loss(number): own for number, own in enumerate(losses)})

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        rows, whole = self._rows(client), client.share
        client.share = whole.take(np.setdiff1d(np.arange(len(whole)), rows)) if len(rows) else whole
        client.model.write(payload.tensors)
        result = yield from client.training_steps(payload.numbers["learning_rate"])
        trained_on, client.share = len(client.share), whole
        if (index := int(payload.numbers[INDEX.name])) >= 0:
            client.store[CHOSEN] = {CHOSEN: torch.tensor([index])}
        return Payload(client.model.read(), {"examples": trained_on}, result.metrics)


def _name(number: int) -> str:
    return f"selector/{number:03d}"


def _loss(number: int) -> str:
    return f"loss_{number}"
