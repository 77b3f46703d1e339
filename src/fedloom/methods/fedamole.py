"""FedAMoLE: every client its own mixture of LoRA experts, and experts choose their clients.

Source: Zhang et al. 2024, FedAMoLE, https://arxiv.org/abs/2411.19128, as in the authors' code
(``specs/methods.md`` 5). A client holds some of the experts of each layer; it trains them with the shared
expert and the token projection, and is judged by what it has then. With it come embeddings of some
rows it does not train on: the mean of P x over tokens, and of A_e x for each expert it holds. The server
takes unweighted means, of an expert over its holders, and then each expert goes to the
clients whose tokens are nearest to what it projects on, under limits on both sides
(``aggregation/assignment.py``). The first assignment is drawn.

Embeddings may carry noise (``privacy/gaussian.py``). The Gaussian one makes all that a client ever
sends about its embedding rows (epsilon, delta)-differentially private, for replacing one of them, against
whoever does not know what it is drawn from (``Client.noise_seed``); of a row it trains on it promises
nothing. It takes the mean over rows of each row's means over its tokens, all layers being one vector, so
that one row counts once.

Ours: clients may be absent in a round; then holders that answer are averaged, an expert without any keeps
its value, and an absent client is assigned by its last embeddings, or by drawn ones before its first
round, so that it finds experts of its own when it is back. One that left for good is assigned nothing;
where those that remain are too few for the limits, these give way as little as they must. A newcomer gets
all experts. Embeddings are sent after the last round too, for the record, and, where they carry no noise,
with them the share of tokens that each expert gets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fedloom.accounting.traffic import ParameterTraffic, Traffic
from fedloom.aggregation.assignment import (
    assign_experts,
    infeasible,
    most_by_rows,
    nearest_limits,
    relevance_of,
    similarity,
    softmax,
)
from fedloom.aggregation.means import weighted_mean
from fedloom.errors import DataError, MessageError
from fedloom.federation.presence import Presence
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.client_mixtures import OwnMixture, passes
from fedloom.methods.bases.parameter_averaging import ADAPTER, LEARNING_RATE, TRAIN_REPLY_NUMBERS
from fedloom.methods.contract.client import Client, Handler
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import Reveal, ServerSide, by_place
from fedloom.methods.declaration import (
    EACH_ANSWER,
    PARTLY_HELD,
    SEVERAL_PARTS,
    TOGETHER,
    Absence,
    Declaration,
    no,
)
from fedloom.models.experts import ExpertModel, split_name
from fedloom.privacy.gaussian import ad_hoc_noise, noise_multiplier, private_mean
from fedloom.randomness import generator
from fedloom.reports.sections.spec import SectionSpec
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors, by_client, join_parts, of_clients, part_of
from fedloom.wire.messages import Exchange, Payload, Reply, encode
from fedloom.wire.schema import Schema, TensorSpec

HELD_EXPERTS = "held"
"""Of a request: ``(layers, experts)`` uint8, which experts its client holds."""

ASSIGNMENT = "assignment"
"""Part of the state: for each client ``(layers, experts)`` uint8, the experts that it holds now."""

TOKENS = "tokens"
"""Of a reply: ``(layers, r)`` mean token embeddings."""

EMBEDDING = "embedding"
"""Part of the state: the last of these that each client has sent; without an entry it has sent none."""

OLD_HAS_EMBEDDING = "known"
"""In checkpoints of an earlier release, which kept all of this by place: ``(clients,)`` whether a client
has sent any, beside ``HELD_EXPERTS`` with a last and ``TOKENS`` with a second dimension of clients."""

PROJECTED = "projected"
"""``(layers, experts, r)`` mean embeddings of experts."""

SHARES = "shares"
"""``(held experts,)`` shares of the embedding set's tokens in the order of layers and ids, each layer's
adding up to 1; for the record alone."""

ROUNDING = 1e-3
"""By which shares may miss 1."""


class FedAMoLESettings(NamedSettings):
    """``[method] name = "fedamole"``; defaults are the authors'. Experts are counted in ``[adapter]``."""

    name: Literal["fedamole"] = "fedamole"
    clients_per_expert: int = Field(default=2, ge=1)
    """k_c, clients that hold an expert."""
    max_experts_per_client: int = Field(default=8, ge=1)
    """b_max, experts of a layer that a client holds at most."""
    min_experts_per_client: int = Field(default=2, ge=1)
    """And at least (the authors: 2, the top-k)."""
    assignment: Literal["relevance", "random", "static"] = "relevance"
    """relevance: by similarity, in every round. Ablations: random in every round; static, drawn once."""
    experts_by: Literal["relevance", "rows"] = "relevance"
    """What decides how many experts a client holds. relevance: what its experts' relevances add up to,
    within the limits. rows: no more than its share of the rows, too, so that who has few holds few (our
    own; the paper leaves numbers to relevance)."""
    homogeneous: bool = False
    """Ablation: every client holds equally many experts, to within one."""
    embedding_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of a client's rows that embeddings are computed on and that it does not train on."""
    embedding_rows: int = Field(default=200, ge=1)
    """Most of these."""
    embedding_noise: Literal["none", "gaussian", "ad_hoc"] = "none"
    """gaussian: differentially private with epsilon and delta; ad_hoc: the authors', which is not."""
    epsilon: float = Field(default=8.0, gt=0)
    """Of gaussian: for a client's embedding rows over the whole run."""
    delta: float = Field(default=1e-5, gt=0, lt=1)
    """Of gaussian: likewise."""
    embedding_clip: float = Field(default=1.0, gt=0)
    """Of gaussian: largest norm of a row's embeddings of all layers together; longer ones are cut."""
    eta: float = Field(default=50.0, gt=0)
    """Of ad_hoc: the larger, the less noise (the authors: 1, 50, 100)."""

    def limits(self, experts: int, clients: int) -> tuple[int, int, int]:
        """Return clients per expert, and most and least experts per client."""
        if not self.homogeneous:
            return self.clients_per_expert, self.max_experts_per_client, self.min_experts_per_client
        share = experts * self.clients_per_expert / clients
        return self.clients_per_expert, math.ceil(share), math.floor(share)

    def contradictions(self, experts: int, clients: int) -> list[str]:
        """Return the inequalities that no assignment can keep."""
        violated = infeasible(experts, clients, *self.limits(experts, clients))
        found = [
            f"method.name = 'fedamole' needs {text} (experts: adapter.experts; clients: that train)"
            for text in violated
        ]
        if self.homogeneous and self.experts_by == "rows":
            found.append(
                'method.experts_by = "rows" lets clients hold unlike numbers of experts, '
                "method.homogeneous = true like ones: leave one of both out"
            )
        owners = dict.fromkeys(("epsilon", "delta", "embedding_clip"), "gaussian")
        for name, kind in {**owners, "eta": "ad_hoc"}.items():
            given = getattr(self, name) != type(self).model_fields[name].default
            if self.embedding_noise != kind and given:
                found.append(
                    f"method.{name} is a setting of {kind} noise; method.embedding_noise is "
                    f"{self.embedding_noise!r}"
                )
        return found


@dataclass(frozen=True)
class ClientRecords:
    """What the server keeps of clients and experts beside the adapter.

    Attributes:
        assigned: By client id ``(layers, experts)`` uint8, not 0 where it holds the expert.
        tokens: By client id its last ``(layers, r)`` mean token embeddings; it has sent none otherwise.
        projected: ``(layers, experts, r)`` mean embeddings of experts.
    """

    assigned: dict[int, Tensor]
    tokens: dict[int, Tensor]
    projected: Tensor


class FedAMoLE(OwnMixture):
    """Experts averaged over their holders, and assigned anew."""

    declares = Declaration(
        "FedAMoLE",
        "https://arxiv.org/abs/2411.19128",
        "adapted",
        "the treatment of absent clients is our own",
        "FedLLM",
        "the client's experts, down and up; embeddings of some rows up",
        "its mixture",
        secure_aggregation=EACH_ANSWER,
        client_privacy=SEVERAL_PARTS,
        row_privacy=no("embeddings of rows travel; method.embedding_noise hides those rows alone"),
        asynchronous=TOGETHER,
        compression=PARTLY_HELD,
        absence=Absence(
            "an expert is the mean over holders that answered; without one it keeps its "
            "value. The client is assigned experts by its last embeddings, by drawn ones "
            "before its first answer",
            "gets the experts that are assigned to it now",
            "is assigned none, and its embeddings are deleted; where too few remain for "
            "the limits these give way, and `rounds.jsonl` says to what",
        ),
    )
    reveals: frozenset[Reveal] = frozenset({"adapters", "embeddings"})
    sections = (SectionSpec("expert_assignment", "Who holds which experts", "", "experts"),)
    taken = (
        "clients_per_expert",
        "max_experts_per_client",
        "min_experts_per_client",
        "assignment",
        "experts_by",
        "homogeneous",
        "embedding_fraction",
        "embedding_rows",
        "embedding_noise",
        "epsilon",
        "delta",
        "embedding_clip",
        "eta",
    )
    no_start = "it deals all experts out anew; fedavg can, with such an adapter"

    layers: tuple[str, ...]
    experts: int
    rank: int

    def __init__(self, settings: FedAMoLESettings) -> None:
        """Keep the settings."""
        self.settings = settings

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also which limits cannot hold, and what its experts and embeddings do not go with."""
        yield from super().check(view)
        adapter, method = view.adapter, view.method
        if adapter is None or view.clients is None or view.federation is None:
            return
        if adapter.kind != "experts":
            yield (
                f'method.name = {view.name!r} assigns experts: use adapter.kind = "experts", not '
                f"{adapter.kind!r}"
            )
        elif adapter.router != "relevance":
            yield (
                f"adapter.router = {adapter.router!r}: method.name = {view.name!r} routes by the experts "
                "themselves: leave it out"
            )
        training = view.federation.clients - len(view.clients.newcomers)
        yield from method.contradictions(adapter.experts, training)
        compares = view.objective is not None and view.objective.needs_mismatched
        if method.embedding_noise == "gaussian" and compares:
            yield (
                "method.embedding_noise = 'gaussian' promises something of rows that are not trained on, "
                f"and objective.name = {view.objective_name!r} compares rows with completions of other "
                "rows"
            )
        if view.training is not None and view.training.keep_optimizer_state:
            yield (
                f"training.keep_optimizer_state: a client of method.name = {view.name!r} may hold other "
                "experts in the next round"
            )

    def setup(self, server: ServerSide) -> None:
        """Note what layers and experts there are."""
        super().setup(server)
        assert isinstance(server.model, ExpertModel), "the experiment asks for experts"
        self.layers = tuple(server.model.layers)
        self.experts, self.rank = server.model.settings.experts, server.model.settings.rank

    def privacy_statement(self) -> str | None:
        """Return what the noise on embeddings guarantees."""
        chosen = self.settings
        if chosen.embedding_noise == "ad_hoc":
            return (
                "The noise on embeddings is ad hoc (the FedAMoLE authors'): it guarantees nothing."
            )
        if chosen.embedding_noise == "none":
            return None
        return (
            f"All that a client sends about the rows of its embedding set is ({chosen.epsilon:g}, "
            f"{chosen.delta:g})-differentially private over the whole run, for replacing one such row, "
            "against whoever does not know what the noise is drawn from: between machines the client's "
            "own key, in a simulation the experiment's seed. Rows that are trained on have no such "
            "guarantee."
        )

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send everyone its experts, take means, let experts choose."""
        adapter = part_of(state.tensors, ADAPTER)
        known = self._client_records(state, cohort.presence)
        assigned = known.assigned
        if not assigned.keys() >= set(cohort.presence.members):
            assigned = self._assigned(known, cohort, cohort.round - 1)
        assignment = {client: assigned[client] for client in cohort.clients}
        replies = yield self._exchange(cohort, adapter, assignment)
        adapter = self._means(adapter, replies, assignment)
        known = self._learnt(known, replies, assignment)
        cohort.details["experts"] = self._details(
            known, replies, assignment, cohort.presence.enrolled
        )
        if not cohort.last and self.settings.assignment != "static":
            assigned = self._assigned(known, cohort, cohort.round)
        gone = cohort.presence.left  # what rows of theirs have made is kept no longer
        tokens = {client: own for client, own in known.tokens.items() if client not in gone}
        return State(
            {
                **join_parts(adapter=adapter),
                **of_clients(ASSIGNMENT, assigned),
                **of_clients(EMBEDDING, tokens),
                PROJECTED: known.projected,
            }
        )

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train}

    def traffic(self, adapter: Tensors) -> Traffic:
        """Count a client with the mean number of experts, E k_c / C; each one's own is known by round."""
        share = self.settings.clients_per_expert / len(self.server.ranks)
        size = sum(
            tensor.numel() * tensor.element_size() * (share if is_domain(name) else 1.0)
            for name, tensor in adapter.items()
        )
        embeddings = 4 * self.rank * len(self.layers) * (1 + self.experts * share)
        embeddings += 4 * len(self.layers) * self.experts * share * self._sends_shares
        return ParameterTraffic(int(size) + len(self.layers) * self.experts, int(size + embeddings))

    def _client_records(self, state: State, presence: Presence) -> ClientRecords:
        """Return who holds what and the embeddings so far."""
        own = state.tensors
        projected = own.get(PROJECTED, torch.zeros(len(self.layers), self.experts, self.rank))
        if HELD_EXPERTS not in own:
            return ClientRecords(by_client(own, ASSIGNMENT), by_client(own, EMBEDDING), projected)
        sent = by_place(own[OLD_HAS_EMBEDDING], 0, presence)
        tokens = by_place(own[TOKENS], 1, presence)
        tokens = {client: embedding for client, embedding in tokens.items() if sent[client]}
        return ClientRecords(by_place(own[HELD_EXPERTS], 2, presence), tokens, projected)

    def _exchange(
        self, cohort: Cohort, adapter: Tensors, assignment: Mapping[int, Tensor]
    ) -> Exchange:
        most = pack(adapter, self.layers, torch.ones(len(self.layers), self.experts))
        specs = {
            name: TensorSpec(name, tuple(t.shape), t.dtype, ragged=name.startswith(EXPERTS))
            for name, t in most.items()
        }
        request = Schema(tuple(specs.values()), (LEARNING_RATE,))
        learnt = [spec for name, spec in specs.items() if name != HELD_EXPERTS]
        size = (len(self.layers), self.rank)
        learnt.append(TensorSpec(TOKENS, size, torch.float32))
        everything = (len(self.layers) * self.experts, self.rank)
        learnt.append(TensorSpec(PROJECTED, everything, torch.float32, ragged=True))
        if self._sends_shares:
            learnt.append(TensorSpec(SHARES, everything[:1], torch.float32, ragged=True))
        numbers = {"learning_rate": cohort.learning_rate}
        requests: dict[int, bytes] = {}
        counts: dict[int, dict[str, int]] = {}
        for client, own in assignment.items():
            packed = pack(adapter, self.layers, own)
            requests[client] = encode(Payload(packed, numbers), request)
            counts[client] = {name: len(t) for name, t in packed.items()}
            counts[client][PROJECTED] = counts[client][SHARES] = int(own.sum())

        def check(client: int, payload: Payload) -> None:
            wanted = counts[client]
            for name, tensor in payload.tensors.items():
                if name in wanted and len(tensor) != wanted[name]:
                    raise MessageError(
                        f"tensor {name} has {len(tensor)} rows, this client's experts make {wanted[name]}"
                    )
            if self._sends_shares:
                _check_shares(payload.tensors[SHARES], assignment[client])

        reply = Schema(tuple(learnt), TRAIN_REPLY_NUMBERS, cohort.reported)
        return Exchange("train", cohort.round, request, reply, requests, check)

    def _means(
        self, adapter: Tensors, replies: Sequence[Reply], assignment: Mapping[int, Tensor]
    ) -> Tensors:
        """Return unweighted means over those who sent a tensor; what nobody sent stays."""
        sent = [
            unpack(
                {**reply.payload.tensors, HELD_EXPERTS: assignment[reply.client]},
                self.layers,
                adapter,
            )
            for reply in replies
        ]
        result = dict(adapter)
        for name in adapter:
            having = [{name: tensors[name]} for tensors in sent if name in tensors]
            if having:
                result |= weighted_mean(having, [1.0] * len(having))
        return result

    def _learnt(
        self, known: ClientRecords, replies: Sequence[Reply], assignment: Mapping[int, Tensor]
    ) -> ClientRecords:
        """Return what is known with the replies' embeddings, an expert's as the mean over its holders."""
        tokens = dict(known.tokens)
        sums = torch.zeros_like(known.projected, dtype=torch.float64)
        counts = torch.zeros(*sums.shape[:2], 1, dtype=torch.float64)
        for reply in replies:
            own = assignment[reply.client].bool()
            tokens[reply.client] = reply.payload.tensors[TOKENS]
            sums[own] += reply.payload.tensors[PROJECTED].double()
            counts[own] += 1
        means = (sums / counts.clamp(min=1)).float()
        return ClientRecords(
            known.assigned, tokens, torch.where(counts > 0, means, known.projected)
        )

    @property
    def _sends_shares(self) -> bool:
        """Whether clients say how their tokens spread: not where noise hides their rows."""
        return self.settings.embedding_noise == "none"

    def _details(
        self,
        known: ClientRecords,
        replies: Sequence[Reply],
        assignment: Mapping[int, Tensor],
        clients: Sequence[int],
    ) -> dict[str, Any]:
        """Return what the report shows: who held what in this round, how tokens spread, who is alike."""
        shares: dict[str, list[list[float]]] = {}
        for reply in replies if self._sends_shares else ():
            counts = assignment[reply.client].sum(1).tolist()
            parts = torch.split(reply.payload.tensors[SHARES], counts)
            shares[str(reply.client)] = [[round(x, 3) for x in part.tolist()] for part in parts]
        alike = similarity(*self._stacked(known, clients))
        return {
            "layers": list(self.layers),
            "experts": self.experts,
            "held": {
                str(client): [torch.nonzero(layer)[:, 0].tolist() for layer in own]
                for client, own in assignment.items()
            },
            "shares": shares,
            "clients": list(clients),
            "similarity": [[round(x, 3) for x in row] for row in alike.tolist()],
        }

    def _stacked(self, known: ClientRecords, clients: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return ``(layers, clients, r)`` embeddings, and ``(clients,)`` whether each has sent any."""
        none = torch.zeros(len(self.layers), self.rank)
        tokens = torch.stack([known.tokens.get(client, none) for client in clients], 1)
        return tokens, torch.tensor([client in known.tokens for client in clients])

    def _assigned(self, known: ClientRecords, cohort: Cohort, round: int) -> dict[int, Tensor]:
        """Return the next assignment; clients that have sent no embeddings have drawn relevances.

        One is drawn for every client that ever belonged to the federation, so that a client's does not
        depend on who else is there.
        """
        members, enrolled = cohort.presence.members, cohort.presence.enrolled
        rng = generator(self.server.seed, "assignment", round=round)
        drawn = rng.random((len(self.layers), self.experts, len(enrolled)))
        drawn = drawn[:, :, [enrolled.index(client) for client in members]]
        tokens, sent = self._stacked(known, members)
        holders, most, least = self._limits(cohort)
        largest: int | list[int] = most
        if self.settings.experts_by == "rows":
            rows = [cohort.presence.rows.get(client, 0) for client in members]
            largest = most_by_rows(rows, self.experts, holders, most, least)
        layers = []
        for layer, relevance in enumerate(drawn):
            if self.settings.assignment == "relevance":
                own = relevance_of(known.projected[layer], tokens[layer])
                relevance = np.where(sent.numpy()[None], own, relevance)
            chosen = assign_experts(softmax(relevance), holders, largest, least)
            layers.append(torch.from_numpy(chosen))
        columns = torch.stack(layers).to(torch.uint8).unbind(2)
        return dict(zip(members, columns, strict=True))

    def _limits(self, cohort: Cohort) -> tuple[int, int, int]:
        """Return the limits that an assignment keeps; the round's notes have those that gave way."""
        members = len(cohort.presence.members)
        limits = self.settings.limits(self.experts, members)
        kept = nearest_limits(self.experts, members, *limits)
        names = ("clients_per_expert", "max_experts_per_client", "min_experts_per_client")
        for name, asked, found in zip(names, limits, kept, strict=True):
            if found != asked:
                cohort.notes[name] = float(found)
        return kept

    def _train(self, client: Client, payload: Payload) -> Payload:
        model = client.model
        assert isinstance(model, ExpertModel), "the experiment asks for experts"
        rows = self._embedding_rows(client)
        whole = client.share
        client.share = whole.take(np.setdiff1d(np.arange(len(whole)), rows))
        model.write(unpack(payload.tensors, self.layers, client.initial))
        result = client.train(payload.numbers["learning_rate"])
        client.store[ADAPTER] = model.read()
        client.share = whole
        sent = pack(client.store[ADAPTER], self.layers, payload.tensors[HELD_EXPERTS])
        del sent[HELD_EXPERTS]
        sent |= self._embeddings(client, _probe(client, rows, self.layers))
        return Payload(sent, {"examples": len(whole) - len(rows)}, result.metrics)

    def _embeddings(self, client: Client, seen: Probed) -> Tensors:
        """Return a client's mean embeddings, with noise if there is to be any."""
        count, chosen = len(self.layers), self.settings
        if chosen.embedding_noise == "none":
            means = seen.sums.sum(0) / seen.tokens.sum()
            shares = torch.cat(
                [routed_tokens / routed_tokens.sum() for routed_tokens in seen.routed_tokens]
            )
            return {TOKENS: means[:count], PROJECTED: means[count:], SHARES: shares}
        rng = generator(client.noise_seed, "embedding noise", client.id, client.round)
        rows = (seen.sums / seen.tokens[:, None, None]).double().numpy()
        if chosen.embedding_noise == "gaussian":
            multiplier = noise_multiplier(chosen.epsilon, chosen.delta, client.rounds)
            flat = rows.reshape(len(rows), -1)
            noisy = private_mean(flat, chosen.embedding_clip, multiplier, rng)
        else:
            largest = np.linalg.norm(rows, axis=2).max(0)
            noisy = np.stack(
                [
                    ad_hoc_noise(mean, float(norm), chosen.eta, rng)
                    for mean, norm in zip(rows.mean(0), largest, strict=True)
                ]
            )
        means = torch.from_numpy(noisy.reshape(rows.shape[1:])).float()
        return {TOKENS: means[:count], PROJECTED: means[count:]}

    def _embedding_rows(self, client: Client) -> NDArray[np.int64]:
        """Draw the rows of a client's embedding set, the same in every round.

        Raises:
            DataError: It has a single row.
        """
        count = len(client.share)
        if count < 2:
            raise DataError(
                f"client {client.id} has {count} training row: its embedding set would be empty, or all "
                "it has; give it more rows (partition.minimum)"
            )
        wanted = min(round(self.settings.embedding_fraction * count), self.settings.embedding_rows)
        rng = generator(client.seed, "embedding set", client.id)
        return np.sort(rng.choice(count, size=max(1, wanted), replace=False)).astype(np.int64)


def _check_shares(shares: Tensor, assignment: Tensor) -> None:
    """Check that in each layer the shares of a client's experts are at least 0 and add up to 1.

    Raises:
        MessageError: They do not, by more than rounding.
    """
    for layer, own in enumerate(torch.split(shares, assignment.sum(1).tolist())):
        if len(own) and (float(own.min()) < 0 or abs(float(own.sum()) - 1) > ROUNDING):
            raise MessageError(
                f"shares of tokens in layer {layer} must be at least 0 and add up to 1",
                "out_of_range",
            )


EXPERTS = "experts "
"""Before the sizes of the layers whose experts lie in one tensor."""


def is_domain(name: str) -> bool:
    """Return whether a tensor is of a domain expert, which some clients do not hold."""
    return ".experts." in name


def pack(tensors: Tensors, layers: Sequence[str], assignment: Tensor) -> Tensors:
    """Return what travels: what all have by name, and held experts in one tensor for each size of layer.

    Args:
        tensors: All experts, or at least those held.
        layers: Their order.
        assignment: ``(layers, experts)``, not 0 where an expert goes along.
    """
    packed = {name: tensor for name, tensor in tensors.items() if not is_domain(name)}
    rows: dict[str, list[Tensor]] = {}
    for number, layer in enumerate(layers):
        for expert in torch.nonzero(assignment[number])[:, 0].tolist():
            a, b = (tensors[f"{layer}.experts.{expert}.{factor}"] for factor in "AB")
            key = f"{EXPERTS}{a.shape[1]} {b.shape[0]}"
            rows.setdefault(key, []).append(torch.cat([a.reshape(-1), b.reshape(-1)]))
    packed |= {key: torch.stack(some) for key, some in sorted(rows.items())}
    return {**packed, HELD_EXPERTS: assignment.to(torch.uint8)}


def unpack(packed: Tensors, layers: Sequence[str], like: Tensors) -> Tensors:
    """Return experts by name from what :func:`pack` made; ``like`` has the sizes of every layer."""
    found = {name: t for name, t in packed.items() if not name.startswith(EXPERTS) and name in like}
    taken: dict[str, int] = {}
    sizes = {split_name(name)[0]: t.shape for name, t in like.items() if name.endswith("shared.A")}
    widths = {split_name(name)[0]: t.shape for name, t in like.items() if name.endswith("shared.B")}
    for number, layer in enumerate(layers):
        (rank, inputs), (outputs, _) = sizes[layer], widths[layer]
        key = f"{EXPERTS}{inputs} {outputs}"
        for expert in torch.nonzero(packed[HELD_EXPERTS][number])[:, 0].tolist():
            row = packed[key][taken.get(key, 0)]
            taken[key] = taken.get(key, 0) + 1
            found[f"{layer}.experts.{expert}.A"] = row[: rank * inputs].reshape(rank, inputs)
            found[f"{layer}.experts.{expert}.B"] = row[rank * inputs :].reshape(outputs, rank)
    return found


@dataclass(frozen=True)
class Probed:
    """What a client's mixture shows on some rows.

    Attributes:
        sums: ``(rows, layers + held experts, r)``: sums over a row's tokens of P x in each layer, then of
            A_e x of each held expert in the order of layers and ids.
        tokens: ``(rows,)``, tokens of each row.
        routed_tokens: For each layer ``(n,)``, tokens that pass each expert.
    """

    sums: Tensor
    tokens: Tensor
    routed_tokens: list[Tensor]


def _probe(client: Client, rows: NDArray[np.int64], layers: Sequence[str]) -> Probed:
    """Run some rows of a client; the sequences of a pair are one row."""
    model = client.model
    assert isinstance(model, ExpertModel), "the experiment asks for experts"
    tokens = client.share.tokens.take(rows)
    sums, lengths, routed_tokens = [], [], []
    with model.watching() as seen:
        for count in passes(client, tokens):
            own = [seen[name] for name in layers]
            parts = [layer.token[:, None] for layer in own] + [layer.experts for layer in own]
            whole = torch.cat(parts, 1).cpu()
            sums.append(whole.view(tokens.width, count, *whole.shape[1:]).sum(0))
            lengths.append(own[0].tokens.cpu().view(tokens.width, -1).sum(0))
            routed_tokens.append([layer.routed_tokens.sum(0).cpu() for layer in own])
    return Probed(
        torch.cat(sums),
        torch.cat(lengths),
        [torch.stack(of).sum(0) for of in zip(*routed_tokens, strict=True)],
    )
