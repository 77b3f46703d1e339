"""HiLoRA: an adapter for all, one for a group of clients, and one of each client, one after the other.

Source: HiLoRA, 2026, https://arxiv.org/abs/2603.02785; a reconstruction after a note on it and a third
party's code, as no official code was found. The rank of ``[adapter]`` has three parts, thirds: root,
group and leaf (of 8: 4, 2 and 2). In the first rounds all train the root; the server takes the best of
its rank for the mean of their products, with orthonormal columns in B. It keeps a running mean of how
each client's B moved, and from the spans of these forms groups (``aggregation/clusters.py``). Then each
group trains its part in the same way, on top of the root; then each client its leaf, of which nothing
is sent. A penalty keeps a part's B off the spans of those below: ``penalty`` ||B_below^T B||_F^2 for
each.

Here groups go by how B moved from the root, as all clients begin with the same B; and clients may stay
one group. A client that is first there when groups are formed trains the root once on trial, and joins
the group whose members' movements are nearest to its own. A client learns its group when it trains in
it: one that moved the root and was not drawn since is judged, saved and settled with the root and its
leaf alone, as the table of groups is not sent to all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field

from fedloom.accounting.traffic import ParameterTraffic, Traffic
from fedloom.aggregation.lora import B, only_factors, rank_of, without_factors
from fedloom.aggregation.lora_coordinates import orthonormal_b
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.client_groups import (
    formed,
    group_means,
    groups_of,
    movements,
    nearest_groups,
    numbers_of,
)
from fedloom.methods.bases.rank_parts import (
    GROUP,
    INDEX,
    INDEX_NUMBER,
    LEAF,
    OTHER,
    PART,
    ROOT,
    PartHooks,
    adapter_of,
    part_exchange,
    part_of_round,
    rank_part,
    whole_of,
)
from fedloom.methods.contract.checks import optimizer_anew, require_linear_layers
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import ADAPTERS_ALONE, Method, ServerSide
from fedloom.methods.declaration import EACH_ANSWER, OWN_STEPS, TOGETHER, Absence, Declaration, no
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors, join_parts, part_of, tensor_bytes
from fedloom.training.results import LocalResult
from fedloom.training.settings import ALONE, Part, Work
from fedloom.wire.messages import Payload


class HiLoRASettings(NamedSettings):
    """``[method] name = "hilora"``."""

    name: Literal["hilora"] = "hilora"
    root_share: float = Field(default=0.3, gt=0, lt=1)
    """Share of the rounds in which all train the root; one at least."""
    group_share: float = Field(default=0.4, gt=0, lt=1)
    """Share of the rounds, after these, in which groups train their parts, one at least of three or more
    rounds; in the others, the last at least, clients train their leaves. Both are below 1 together."""
    most_groups: int = Field(default=10, ge=1)
    """Groups of clients, at most."""
    penalty: float = Field(default=0.1, ge=0)
    """Weight of a part's overlap with those below it."""


class HiLoRA(Method):
    """Trains a root, a part for each group, and a leaf of each client."""

    declares = Declaration(
        "HiLoRA",
        "https://arxiv.org/abs/2603.02785",
        "reconstructed",
        "groups by how B moved from the root, perhaps one; parts are of equal rank",
        "FedLLM",
        "the part that is trained, down and up, with those below it down; leaves do not travel",
        "its leaf, and which group it is in",
        secure_aggregation=EACH_ANSWER,
        client_privacy=no("groups are formed of single answers"),
        row_privacy=OWN_STEPS,
        asynchronous=TOGETHER,
        compression=no("clients of unlike groups are sent unlike parts"),
        absence=Absence(
            "is in no mean; its leaf and its group stay; away since groups exist, it is judged without",
            "first there when groups exist, it trains the root on trial and joins the nearest group",
            "is in no mean; the movement that groups were formed of stays",
        ),
    )
    reveals = ADAPTERS_ALONE
    taken = ("root_share", "group_share", "most_groups", "penalty")
    two_factors = True
    personal = True
    no_start = (
        "its adapter has parts that a start has not; merge it into its model (fedloom export)"
    )

    def __init__(self, settings: HiLoRASettings) -> None:
        """Keep the settings."""
        self.settings = settings
        self.fresh: Tensors = {}

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also shares and a rank that leave no part for someone."""
        yield from super().check(view)
        yield from optimizer_anew(view, "trains other parts in later rounds")
        own, rounds = view.method, view.federation.rounds if view.federation else 0
        if own.root_share + own.group_share >= 1:
            yield (
                f"method.root_share = {own.root_share:g} and method.group_share = {own.group_share:g} "
                "leave no round for the clients' leaves: let them be below 1 together"
            )
        elif rounds and part_of_round(own.root_share, own.group_share, rounds, rounds) < 2:
            yield (
                f"federation.rounds = {rounds} leaves no round for the clients' leaves: set "
                "it to 3 or more, for a round of each part at least"
            )
        if view.adapter is not None and view.adapter.rank < 3:
            yield f"adapter.rank = {view.adapter.rank} is that of three parts: set it to 3 or more"

    def setup(self, server: ServerSide) -> None:
        """Store the adapter as it is initialised."""
        super().setup(server)
        require_linear_layers(server.model.stacked, 'method.name = "hilora"')
        self.fresh = server.model.read()

    def initial_state(self, adapter: Tensors) -> State:
        """Return the root's part, and what is no factor."""
        return State(join_parts(root=rank_part(adapter, 0), other=without_factors(adapter)))

    def trainings_of(self, round: int, rounds: int) -> int:
        """Return one; of the last of several rounds two, for a client's only training on trial.

        That can be in any round after the first: a client without a group trains on trial alone until an
        answer of it arrives, then in the same round a second time, and never on trial again.
        """
        return 2 if round == rounds > 1 else 1

    def round(self, state: State, cohort: Cohort) -> Round:
        """Train the round's part; form groups before the first that is theirs."""
        own, rounds = self.settings, self.server.rounds
        part = part_of_round(own.root_share, own.group_share, cohort.round, rounds)
        groups = groups_of(state)
        tensors, root = dict(state.tensors), part_of(state.tensors, ROOT)
        if part and not groups:
            groups = formed(tensors, self.settings.most_groups)
            for group in sorted(set(groups.values())):
                tensors |= join_parts(**{f"{GROUP}/{group:03d}": rank_part(self.fresh, 1)})
        unknown = tuple(client for client in cohort.clients if client not in groups)
        if part and unknown:
            replies = yield part_exchange(cohort, tensors, {}, "probe", 0, unknown)
            tensors |= movements(tensors, root, replies)
            groups |= nearest_groups(tensors, groups, replies.answered)
        asked = tuple(client for client in cohort.clients if part == 0 or client in groups)
        of = groups if part else {}
        replies = yield part_exchange(cohort, tensors, of, "train", part, asked)
        if part == 0:
            tensors |= movements(tensors, root, replies)
        if part < 2 and replies:
            for group, mean in group_means(replies, of).items():
                name = f"{GROUP}/{group:03d}" if part else ROOT
                rank = rank_of(part_of(tensors, name))
                tensors |= join_parts(**{name: orthonormal_b(only_factors(mean), rank)})
            tensors |= join_parts(other=without_factors(replies.mean()))
        if groups:
            cohort.details["groups"] = {str(c): group for c, group in sorted(groups.items())}
        return State(tensors, numbers_of(groups))

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train, "probe": self._probe}

    def shared(self, state: State) -> Tensors:
        """Return the adapter of a client without a group: root and initial parts."""
        parts = [part_of(state.tensors, "root"), rank_part(self.fresh, 1), rank_part(self.fresh, 2)]
        found = {**whole_of(parts), **part_of(state.tensors, "other")}
        return {name: found[name] for name in self.fresh}

    def sent_for_evaluation(self, state: State) -> Tensors:
        """Return the root and all groups' parts."""
        names = ("root/", "other/", "group/")
        return {n: t for n, t in state.tensors.items() if n.startswith(names)}

    def traffic(self, adapter: Tensors) -> Traffic:
        """Count a part down and up, as while the root is trained."""
        size = tensor_bytes({**rank_part(adapter, 0), **without_factors(adapter)})
        return ParameterTraffic(size, size)

    def load(self, client: Client, payload: Payload) -> None:
        """Write root, its group's part and its leaf, each as it is initialised where there is none."""
        index = int(client.store.get(LEAF, {INDEX: torch.tensor([-1])})[INDEX])
        group = part_of(payload.tensors, f"{GROUP}/{index:03d}")
        root, other = (part_of(payload.tensors, name) for name in (ROOT, OTHER))
        client.model.write(adapter_of(client, root, group, other))

    def personalise(self, client: Client, learning_rate: float, work: Work) -> None:
        """Train the leaf."""
        hooks = PartHooks(client.model.read(), 2, self.settings.penalty, client.model.device)
        client.train(learning_rate, hooks.before, hooks.after, purpose="settling ", work=work)

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        part, index = (int(payload.numbers[name]) for name in (PART.name, INDEX_NUMBER.name))
        share = Part(1, 2) if client.session.get("probed") else ALONE
        result = yield from self._fit(client, payload, part, share, "")
        trained = client.model.read()
        own = client.store.get(LEAF, {})
        if part == 2:
            own = {**rank_part(trained, 2), **without_factors(trained)}
        client.store[LEAF] = {**own, INDEX: torch.tensor([index])}
        sent = {} if part == 2 else {**rank_part(trained, part), **without_factors(trained)}
        return Payload(sent, {"examples": len(client.share)}, result.metrics)

    def _probe(self, client: Client, payload: Payload) -> Trainings[Payload]:
        result = yield from self._fit(client, payload, 0, Part(0, 2), "probe ")
        client.session["probed"] = True
        sent = {n: t for n, t in rank_part(client.model.read(), 0).items() if B in n}
        return Payload(sent, {"examples": len(client.share)}, result.metrics)

    def _fit(
        self, client: Client, payload: Payload, part: int, share: Part, purpose: str
    ) -> Trainings[LocalResult]:
        root, group, other = (part_of(payload.tensors, name) for name in (ROOT, GROUP, OTHER))
        start = adapter_of(client, root, group, other)
        client.model.write(start)
        hooks = PartHooks(start, part, self.settings.penalty, client.model.device)
        rate = payload.numbers["learning_rate"]
        result = yield from client.training_steps(
            rate, hooks.before, hooks.after, purpose=purpose, part=share
        )
        client.model.flops += result.steps * hooks.flops(start)
        return result
