"""What a method is: a protocol between server and clients, written once and knowing no engine.

The server side of a round is a generator: it yields an :class:`Exchange`, receives the replies that
passed every check (perhaps fewer than it asked for, sorted by client), may do so again, and returns
the next state. What it keeps of a client is named by the client's id (:func:`of_clients`). The client
side is a set of handlers, one for each action. Whatever must outlive a round is in the state or in what
the client keeps; a generator is never saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedloom.accounting.costs import SERVER
from fedloom.accounting.ledger import Ledger
from fedloom.accounting.traffic import ParameterTraffic, Traffic
from fedloom.aggregation.merging import Merging, merged
from fedloom.aggregation.rules import AggregationSettings, combined
from fedloom.data.client_rows import TokenShare
from fedloom.data.public import PublicRows
from fedloom.errors import CheckpointError, RoundFailed
from fedloom.federation.presence import Presence
from fedloom.federation.protocol import Cohort, Replies, Round
from fedloom.methods.contract.averaging import note_averaging_error, weights_of
from fedloom.methods.contract.checks import general, require_linear_layers, summed_alone
from fedloom.methods.contract.client import Client, Handler
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.traits import MethodTraits
from fedloom.methods.declaration import Declaration
from fedloom.models.adapters import AdapterModel
from fedloom.models.heads import PersonalModules
from fedloom.models.split_model import ClientPart
from fedloom.objectives.base import Objective
from fedloom.privacy.distributed_mean import DistributedMean
from fedloom.privacy.private_mean import PrivateMean
from fedloom.randomness import generator
from fedloom.reports.sections.spec import SectionSpec
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors, tensor_bytes
from fedloom.training.results import LocalResult
from fedloom.training.settings import TrainingSettings, Work
from fedloom.training.steps import BatchMaker, train_locally
from fedloom.wire.messages import Payload, Reply

Reveal = Literal[
    "adapters",
    "control_variates",
    "logits",
    "activations",
    "targets",
    "embeddings",
    "first_tokens",
    "expert_probes",
    "inner_products",
    "grades",
    "rows",
]
"""What a client's replies can hold beside numbers: each but the first two has a line of its own in a
client's ``[policy]``, and rows have none."""

ADAPTERS_ALONE: frozenset[Reveal] = frozenset({"adapters"})


def by_place(tensor: Tensor, dimension: int, presence: Presence) -> dict[int, Tensor]:
    """Return by client id what a release before kept by place, along a dimension of clients.

    Raises:
        CheckpointError: It has not a place for each client, so that whose they are cannot be told.
    """
    clients, places = presence.enrolled, tensor.shape[dimension]
    if places != len(clients):
        raise CheckpointError(
            f"the checkpoint keeps what it knows of {places} clients by their place, as fedloom did "
            f"before, and {len(clients)} take part: whose it is cannot be told; start a new run"
        )
    return dict(zip(clients, tensor.unbind(dimension), strict=True))


class ModelSpec(NamedTuple):
    """A backbone, as the experiment names it, and the LoRA rank of the adapter on it."""

    path: str
    rank: int


class Models(Protocol):
    """What models a client can have, all of its own backbone; each is built when it is asked for."""

    @property
    def whole(self) -> AdapterModel:
        """The backbone with the adapter."""

    def front(self, blocks: int, *, tail: bool) -> ClientPart:
        """The first blocks alone, with norm and head behind them if ``tail``.

        Raises:
            ModelError: The backbone cannot be cut there, or the adapter has nothing in these blocks.
        """


@dataclass(frozen=True)
class Variant:
    """A way to train with a method, whose cost ``fedloom advise`` counts.

    Attributes:
        name: Framework and configuration.
        method: Settings of the method.
        training: Settings of ``[training]`` that it needs otherwise.
        remark: What to know before it is tried.
    """

    name: str
    method: NamedSettings
    training: Mapping[str, object] = field(default_factory=dict)
    remark: str = ""


class FirstRound(Protocol):
    """A client's first round, of which compute is counted on a model without weights.

    Attributes:
        seed: The experiment's seed.
        client: The client's id.
        rows: Of the client.
        training: How it trains.
        public: The public rows as its model reads them.
    """

    seed: int
    client: int
    rows: int
    training: TrainingSettings
    public: PublicRows | None

    def own_rows(self) -> float:
        """Return the operations of training on the client's own rows."""

    def own_forward_passes(self) -> float:
        """Return those of the forward passes of that training alone."""

    def reading(self, indices: NDArray[np.int64]) -> float:
        """Return those of reading some of its own rows once, each sequence by itself."""

    def passes(
        self, share: TokenShare, indices: NDArray[np.int64], *, scoring: bool = False
    ) -> float:
        """Return those of rows: forward and, with gradients on, backward.

        They are laid out as a batch is when training, or as rows are that are scored.
        """


@dataclass
class ServerSide:
    """What a method has on the server beside its state.

    Attributes:
        model: The server's own model.
        objective: What the federation minimises.
        training: Settings of local training.
        seed: The experiment's seed.
        participations: Rounds that a client takes part in on average.
        max_length: Tokens a training sequence of a client has at most.
        width: Classes, or tokens of the vocabulary.
        public: The public rows that every party has, where the experiment has some.
        ledger: Where the server's costs go.
        cohort: Clients of a round.
        ranks: LoRA rank of each client.
        aggregation: How updates are put together.
        rounds: Of the run.
        sums_alone: Whether it sees sums of replies alone: an exchange with a few clients has none.
        maker: Makes batches of answers, where the objective has some generated.
    """

    model: AdapterModel
    objective: Objective
    training: TrainingSettings
    seed: int
    participations: float
    max_length: int
    width: int
    public: PublicRows | None
    ledger: Ledger
    cohort: int
    ranks: Mapping[int, int]
    aggregation: AggregationSettings
    rounds: int = 1
    sums_alone: bool = False
    maker: BatchMaker | None = None

    def train(
        self,
        share: TokenShare,
        objective: Objective,
        cohort: Cohort,
        *,
        work: Work,
        purpose: str,
        maker: BatchMaker | None = None,
    ) -> LocalResult:
        """Train what the server's model holds on rows that the server has, in place.

        Args:
            share: The rows.
            objective: What is minimised.
            cohort: Of the round, with its learning rate.
            work: How much is done.
            purpose: Tells it apart from other trainings of the round.
            maker: Makes the batches, in place of rows shuffled anew in each epoch.
        """
        return train_locally(
            self.model,
            share,
            objective,
            self.training,
            learning_rate=cohort.learning_rate,
            seed=self.seed,
            client=SERVER,
            round=cohort.round,
            work=work,
            purpose=purpose,
            maker=maker,
        )


class Method(MethodTraits):
    """Base of all methods; what experiments are checked by is in :class:`MethodTraits`.

    Attributes:
        declares: What it is, in words and facts.
        reveals: What replies hold beside numbers; each method's file says it, and a client's policy goes
            by it. An object may narrow it by its settings.
        taken: Its settings that a client takes over from a server as they are: they can neither choose
            rows nor cost much.
        bounded: Those that it takes over where they are no larger than a line of its ``[policy]``, which
            is named.
        named_models: Those that name a backbone, which a client must allow.
        least: Settings with which replies hold the least; the others reveal more.
        sections: What a report shows of it: figures that it wrote into the rounds' ``cohort.details``.
        aggregation: The rule.
        private: Takes the mean instead, under client-level privacy; the run gives it.
        server: What it has on the server, from :meth:`setup` on.
    """

    declares: Declaration
    reveals: frozenset[Reveal]
    taken: tuple[str, ...] = ()
    bounded: Mapping[str, str] = MappingProxyType({})
    named_models: tuple[str, ...] = ()
    least: Mapping[str, object] = MappingProxyType({})
    sections: tuple[SectionSpec, ...] = ()
    aggregation = AggregationSettings()
    private: PrivateMean | DistributedMean | None = None
    server: ServerSide

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield everything in an experiment that this method does not go with, each as one message.

        A method that adds to it begins with ``yield from super().check(view)``.
        """
        yield from general(cls, view)
        yield from summed_alone(cls, cls.declares.secure_aggregation, view)

    @classmethod
    def variants(cls, own: NamedSettings | None, view: ExperimentView) -> Iterator[Variant]:
        """Yield what ``fedloom advise`` counts for this method beside FedLLM; here nothing.

        Args:
            own: The settings of an experiment with this method, ``None`` for one with another.
            view: The experiment.
        """
        yield from ()

    def server_model(self, spec: ModelSpec) -> ModelSpec:
        """Return backbone and rank of the server, given those of ``[model]`` and ``[adapter]``."""
        return spec

    def client_model(self, models: Models) -> AdapterModel:
        """Return the model that a client has; here the whole."""
        return models.whole

    def compute(self, first: FirstRound) -> float:
        """Return the operations of a client in its first round; here those on its own rows."""
        return first.own_rows()

    @property
    def parts(self) -> PersonalModules:
        """The parts of the model, beside the adapter, that its clients have."""
        return PersonalModules()

    def setup(self, server: ServerSide) -> None:
        """Take what there is on the server, once, before the first round.

        Raises:
            ModelError: A rule of products is set, and layers are not the product of their factors.
        """
        self.server = server
        self.aggregation = server.aggregation
        if server.aggregation.of_products:
            require_linear_layers(
                server.model.stacked, f"aggregation.rule = {server.aggregation.rule!r}"
            )

    @property
    def means_alone(self) -> bool:
        """Whether a round needs the means of replies alone, so that each can be added and let go of.

        So it is where a server that sees sums alone suffices. Rules that compare updates need all of them
        (median, Krum and the others), and so does the private mean, which clips each.
        """
        own = self.aggregation
        plain = (own is None or own.rule == "mean") and self.private is None
        return plain and self.declares.secure_aggregation.holds

    def averaged(
        self, replies: Sequence[Reply], cohort: Cohort, start: Tensors, *, noted: bool = False
    ) -> Tensors:
        """Return what the rule makes of the adapters that clients sent back for ``start``.

        Under client-level privacy it is the private mean, in which clients weigh alike; there may be no
        reply at all then, and notes say nothing.

        The replies are used up: the mean is written where the first one's adapter was. If ``noted``, the
        round's notes say what averaging LoRA's factors apart loses.

        Raises:
            RoundFailed: Too few clients answered for the rule.
            PrivacyError: The privacy budget would be passed.
        """
        if isinstance(self.private, DistributedMean):
            found = replies if isinstance(replies, Replies) else Replies(replies)
            return self.private.summed(found.mean(by="clients"), cohort.round)
        if self.private is not None:
            changed = (reply.payload.tensors for reply in replies)
            clients = [reply.client for reply in replies]
            return self.private.mean(changed, start, cohort.round, clients)
        own = self.aggregation
        if own.rule == "mean":
            known = replies if isinstance(replies, Replies) else Replies(replies)
            if noted:
                note_averaging_error(known, cohort, by_rows=self.by_rows)
            return known.mean(by="rows" if self.by_rows else "clients")
        if own.merging is not None:
            return self._merged(own.merging, replies, cohort, start)
        adapters = [reply.payload.tensors for reply in replies]
        weights = weights_of(replies, by_rows=self.by_rows)
        largest = own.max_norm or math.inf
        try:
            return combined(own.rule, adapters, weights, start, own.bad, largest)
        except ValueError as error:
            raise RoundFailed(
                f"round {cohort.round}: aggregation.rule = {own.rule!r} has too few updates: {error}"
            ) from error

    def _merged(
        self, own: Merging, replies: Sequence[Reply], cohort: Cohort, start: Tensors
    ) -> Tensors:
        """Return the merge of adapters that began with ``start``; a note says what its rank loses."""

        def draws(place: int) -> np.random.Generator:
            return generator(self.server.seed, "merging", replies[place].client, cohort.round)

        adapters = [reply.payload.tensors for reply in replies]
        weights = weights_of(replies, by_rows=self.by_rows)
        found, lost = merged(adapters, weights, start, own, draws)
        cohort.notes.update({} if lost is None else {"rank_error": lost})
        return found

    def privacy_statement(self) -> str | None:
        """Return what may be said about privacy beyond that rows stay with their clients, if anything."""
        return None

    def initial_state(self, adapter: Tensors) -> State:
        """Return the state before the first round, given the adapter as it is initialised."""
        return State(adapter)

    def round(self, state: State, cohort: Cohort) -> Round:
        """Play one round: yield exchanges, receive replies, return the next state."""
        raise TypeError(f"{type(self).__name__} must define round(state, cohort)")

    def handlers(self) -> dict[str, Handler]:
        """Return the client side: a handler for each action."""
        raise TypeError(f"{type(self).__name__} must define handlers()")

    def shared(self, state: State) -> Tensors | None:
        """Return the global adapter, or ``None`` where every client has its own."""
        return state.tensors

    def ensemble(self, state: State) -> Mapping[str, Tensors]:
        """Return adapters that are saved beside the shared one, by name; here none."""
        return {}

    def sent_for_evaluation(self, state: State) -> Tensors | None:
        """Return what clients are sent to be judged with; ``None`` where all of it is their own."""
        return None if self.own_models else self.shared(state)

    def sent_to_unseen(self, state: State) -> Tensors | None:
        """Return what a client is sent that has just joined; here what every other is sent."""
        return self.sent_for_evaluation(state)

    def traffic(self, adapter: Tensors) -> Traffic:
        """Return the closed form of a client's bytes in a round; here the adapter down and up."""
        size = tensor_bytes(adapter)
        return ParameterTraffic(size, size)

    def sent_shapes(self, adapter: Tensors) -> Tensors:
        """Return tensors of the shapes that a client sends, for closed forms; here the adapter."""
        return adapter

    def sent_in_even_rounds(self, adapter: Tensors) -> Tensors:
        """Return those that it sends in rounds 2, 4, ...; here the same."""
        return self.sent_shapes(adapter)

    def received_shapes(self, adapter: Tensors) -> Tensors:
        """Return those that it is sent; here what it sends."""
        return self.sent_shapes(adapter)

    def load(self, client: Client, payload: Payload) -> None:
        """Write the adapter that ``client`` would use now into its model, for evaluation."""
        client.model.write(payload.tensors)

    def personalise(self, client: Client, learning_rate: float, work: Work) -> None:
        """Fit what a client that just joined has in its model to its rows; here the whole adapter.

        What it is judged by afterwards is what the model holds then.
        """
        client.train(learning_rate, purpose="settling ", work=work)
