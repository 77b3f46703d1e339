"""FedLEASE: clients alike share a LoRA expert, and each client's router mixes the experts of all groups.

Source: Wang et al. 2025, "Adaptive LoRA Experts Allocation and Selection for Federated Fine-Tuning"
(FedLEASE), https://arxiv.org/abs/2509.15087, and the authors' code. In a warm-up each client trains a
LoRA of its own. From the distances of their B (1 - cos, mean over layers) the server forms groups by
average linkage, of the number with the best silhouette; the mean of a group's adapters is its expert.
Then a client trains its group's expert and a router over all experts (``models/routed_experts.py``), the
others being frozen, and the server takes means of both within each group.

Ours: of the warm-up each client's last answer counts, and it goes on while fewer than three are known,
in the second half of the rounds while none is; there may be one group; a client that is first there when
groups exist trains on trial, and joins the group whose members' B are nearest on average.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from pydantic import Field

from fedloom.accounting.traffic import ParameterTraffic, Traffic
from fedloom.aggregation.means import weighted_mean
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.client_groups import (
    group_requests,
    groups_of,
    numbers_of,
    warm_up_rounds,
)
from fedloom.methods.bases.client_mixtures import OwnMixture
from fedloom.methods.bases.expert_groups import (
    OthersHeld,
    factors_of,
    first_experts,
    formed,
    kept_alone,
    mixture,
    nearest,
    own_expert,
    single,
    trained_part,
    without_down,
)
from fedloom.methods.bases.parameter_averaging import ADAPTER, LEARNING_RATE, TRAIN_REPLY_NUMBERS
from fedloom.methods.contract.checks import optimizer_anew
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import ADAPTERS_ALONE, ServerSide
from fedloom.methods.declaration import (
    EACH_ANSWER,
    PARTLY_HELD,
    TOGETHER,
    Absence,
    Declaration,
    no,
)
from fedloom.models.experts import ExpertModel
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors, join_parts, tensor_bytes
from fedloom.training.settings import ALONE, Part
from fedloom.wire.messages import Exchange, Payload, Reply
from fedloom.wire.schema import NumberSpec, Schema

TRIAL = NumberSpec("trial", 0.0, 1.0)
"""Number of a request: whether a training alone is on trial, before that of a mixture in one round."""

LEAST_KNOWN = 3
"""Clients whose adapters groups are formed of at least in the first half of the rounds, or all members
where they are fewer: of two, and of none, a silhouette says nothing."""


class FedLEASESettings(NamedSettings):
    """``[method] name = "fedlease"``; ``adapter.experts`` is the most groups that there may be."""

    name: Literal["fedlease"] = "fedlease"
    warm_up_share: float = Field(default=0.2, ge=0, le=1)
    """Share of the rounds in which clients train alone, one round at least (published: 5 of 25), and as
    many more as it takes until three clients have answered, in the second half of the rounds one."""
    groups: int = Field(default=0, ge=0)
    """Number of groups; 0: of the best silhouette, from 1 to ``adapter.experts``."""


class FedLEASE(OwnMixture):
    """Trains an expert for each group of clients, and a router over all of them."""

    declares = Declaration(
        "FedLEASE",
        "https://arxiv.org/abs/2509.15087",
        "adapted",
        "there may be one group; newcomers join by a training on trial",
        "FedLLM",
        "a client's own LoRA up; after the warm-up all experts and a router down, one and it up",
        "the mixture that it trained last",
        secure_aggregation=EACH_ANSWER,
        client_privacy=no("groups are formed of single answers"),
        row_privacy=no('it needs adapter.kind = "experts", of which no row\'s gradient is its own'),
        asynchronous=TOGETHER,
        compression=PARTLY_HELD,
        absence=Absence(
            "is in no mean; its group and its mixture stay",
            "first there when groups exist, it trains on trial and joins the nearest group",
            "is in no mean; the B that groups were formed of stays",
        ),
        problem="clients have unlike tasks, and some of them the same",
    )
    reveals = ADAPTERS_ALONE
    taken = ("warm_up_share", "groups")
    no_start = "its experts are formed of what clients train alone"

    def __init__(self, settings: FedLEASESettings) -> None:
        """Keep the settings."""
        self.settings = settings

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also an adapter without such a router, and more groups than it has room for."""
        yield from super().check(view)
        yield from optimizer_anew(view, "trains other experts in later rounds")
        adapter = view.adapter
        if adapter is None:
            return
        if adapter.kind != "experts" or adapter.router != "linear":
            yield (
                f"method.name = {view.name!r} mixes experts by a matrix of logits: use adapter.kind = "
                f'"experts" with adapter.router = "linear", not {adapter.kind!r} with {adapter.router!r}'
            )
        elif view.method.groups > adapter.experts:
            yield (
                f"method.groups = {view.method.groups} is above adapter.experts = {adapter.experts}, the "
                "most experts that there may be: raise adapter.experts"
            )

    def setup(self, server: ServerSide) -> None:
        """Note the adapter as it is initialised."""
        super().setup(server)
        assert isinstance(server.model, ExpertModel), "the experiment asks for experts"
        self.drawn, self.most = server.model.read(), server.model.settings.experts

    def initial_state(self, adapter: Tensors) -> State:
        """Return nothing: there are no experts yet."""
        return State({})

    def trainings_of(self, round: int, rounds: int) -> int:
        """Return one; of the last of several rounds two, for a client's only training on trial."""
        return 2 if round == rounds > 1 else 1

    def round(self, state: State, cohort: Cohort) -> Round:
        """Have clients train alone; or form groups, if there are none, and train their mixtures."""
        groups, tensors = groups_of(state), dict(state.tensors)
        warm = warm_up_rounds(self.settings.warm_up_share, self.server.rounds)
        known, members = len(factors_of(tensors)), len(cohort.presence.members)
        early = cohort.round <= self.server.rounds // 2  # later, groups of the few that are known
        least = min(LEAST_KNOWN, members) if early else 1
        if not groups and (cohort.round <= warm or known < max(1, least)):
            replies = yield self._alone(cohort, cohort.clients, trial=False)
            return State({**tensors, **kept_alone(replies)})
        if not groups:
            groups = formed(tensors, self.settings.groups, self.most)
            tensors = first_experts(tensors, groups, self.drawn) | without_down(tensors)
            self._warn(cohort, known, members)
        unknown = tuple(client for client in cohort.clients if client not in groups)
        if unknown:
            replies = yield self._alone(cohort, unknown, trial=True)
            tensors |= without_down(kept_alone(replies))
            groups |= nearest(tensors, groups, replies.answered)
        of = {client: groups[client] for client in cohort.clients if client in groups}
        replies = yield self._mixtures(tensors, cohort, of)
        tensors |= self._means(replies, of)
        cohort.details["groups"] = {str(c): group for c, group in sorted(groups.items())}
        return State(tensors, numbers_of(groups))

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"alone": self._train_alone, "train": self._train}

    def sent_to_unseen(self, state: State) -> Tensors:
        """Return the mixture of the first group; before there are groups, one expert as it is drawn."""
        return mixture(state.tensors, 0) or single(self.drawn)

    def traffic(self, adapter: Tensors) -> Traffic:
        """Count a round after the warm-up: experts and a router down, one expert and it up.

        It is the most: of as many groups as there may be. A round of the warm-up has one expert up alone,
        as has what a client that is first there later sends before.
        """
        return ParameterTraffic(tensor_bytes(self.drawn), tensor_bytes(trained_part(self.drawn)))

    def sent_shapes(self, adapter: Tensors) -> Tensors:
        """Return one expert."""
        return own_expert(adapter)

    def _warn(self, cohort: Cohort, known: int, members: int) -> None:
        """Warn where groups are formed of few clients, while others were not there."""
        needed = (self.settings.groups or self.most) + 1
        if known >= min(needed, members):
            return
        cohort.warnings.append(
            f"round {cohort.round}: groups are formed of the {known} of {members} clients that answered "
            f"in the warm-up, and do not change; {needed} or more could show so many groups: raise "
            "method.warm_up_share or federation.clients_per_round"
        )

    def _alone(self, cohort: Cohort, clients: tuple[int, ...], *, trial: bool) -> Exchange:
        """Return the exchange in which clients train a LoRA of their own."""
        numbers = {LEARNING_RATE.name: cohort.learning_rate, TRIAL.name: float(trial)}
        reply = Schema.of(own_expert(self.drawn), TRAIN_REPLY_NUMBERS, cohort.reported)
        request, sent = Schema((), (LEARNING_RATE, TRIAL)), Payload(numbers=numbers)
        return Exchange.broadcast("alone", cohort.round, clients, sent, request, reply)

    def _mixtures(self, tensors: Tensors, cohort: Cohort, of: Mapping[int, int]) -> Exchange:
        """Return the exchange in which clients train their group's expert and router."""
        numbers = {LEARNING_RATE.name: cohort.learning_rate}
        like = mixture(tensors, 0)
        request = Schema.of(like, (LEARNING_RATE,))
        reply = Schema.of(trained_part(like), TRAIN_REPLY_NUMBERS, cohort.reported)
        requests = group_requests(of, lambda g: Payload(mixture(tensors, g), numbers), request)
        return Exchange("train", cohort.round, request, reply, requests)

    def _means(self, replies: Sequence[Reply], of: Mapping[int, int]) -> Tensors:
        """Return each group's expert and router as the mean of its members', alike, as published."""
        found: Tensors = {}
        for group in sorted({of[reply.client] for reply in replies}):
            own = [reply.payload.tensors for reply in replies if of[reply.client] == group]
            found |= join_parts(**{f"expert/{group:03d}": weighted_mean(own, [1.0] * len(own))})
        return found

    def _train_alone(self, client: Client, payload: Payload) -> Trainings[Payload]:
        start = client.store.get(ADAPTER, {})
        client.model.write(start or single(client.initial))
        rate = payload.numbers["learning_rate"]
        trial = payload.numbers[TRIAL.name] > 0
        part = Part(0, 2) if trial else ALONE
        result = yield from client.training_steps(rate, purpose="alone ", part=part)
        client.session["probed"] = trial
        client.store[ADAPTER] = client.model.read()
        sent = own_expert(client.store[ADAPTER])
        return Payload(sent, {"examples": len(client.share)}, result.metrics)

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        client.model.write(payload.tensors)
        assert isinstance(client.model, ExpertModel), "the experiment asks for experts"
        held = OthersHeld(client.model)
        part = Part(1, 2) if client.session.get("probed") else ALONE
        result = yield from client.training_steps(
            payload.numbers["learning_rate"], held.before, held.after, part=part
        )
        client.store[ADAPTER] = client.model.read()
        sent = trained_part(client.store[ADAPTER])
        return Payload(sent, {"examples": len(client.share)}, result.metrics)
