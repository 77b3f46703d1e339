"""What a method is: a protocol between server and clients, written once and knowing no engine.

The server side of a round is a generator: it yields an :class:`Exchange`, receives the replies that
passed every check (perhaps fewer than it asked for, sorted by client), may do so again, and returns
the next state. What it keeps of a client is named by the client's id (:func:`of_clients`). The client
side is a set of handlers, one for each action. Whatever must outlive a round is in the state or in what
the client keeps; a generator is never saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from fedloom.accounting.ledger import Ledger
from fedloom.accounting.traffic import ParameterTraffic, Traffic
from fedloom.aggregation.lora import averaging_error, error_flops
from fedloom.aggregation.means import weighted_mean
from fedloom.aggregation.rules import NEEDED, combined
from fedloom.checkpoint import State
from fedloom.data.batches import TokenShare
from fedloom.data.public import PublicRows
from fedloom.errors import CheckpointError, RoundFailed
from fedloom.messages import (
    FINITE,
    Exchange,
    NumberSpec,
    Payload,
    Reply,
    Schema,
    StoredTensors,
    Tensors,
    amount,
)
from fedloom.methods.checks import general
from fedloom.methods.declaration import Declaration
from fedloom.methods.view import ExperimentView
from fedloom.models.adapters import AdapterModel
from fedloom.models.cut import FrontHalf
from fedloom.models.heads import PersonalParts
from fedloom.objectives.base import Objective
from fedloom.presence import Presence
from fedloom.settings import NamedSettings, Settings
from fedloom.training.local import LOSS, LocalResult, StepHook, local_loss, train_locally
from fedloom.training.optimizers import ALONE, Part, TrainingSettings, Work

OPTIMIZER = "optimizer"
"""Where a client keeps its optimizer's tensors, if it does."""

EXAMPLES = NumberSpec("examples", 1.0, 2.0**40)
"""Training rows that a client weighs by; not more than it registered with (``admission.py``)."""

TRAIN_REPLY_NUMBERS = (EXAMPLES,)

LEARNING_RATE = amount("learning_rate", FINITE)
"""Of a round, to clients."""

EVALUATE = "evaluate"
"""The action that trains nothing."""

ADAPTER = "adapter"
"""Where the adapter is, among the parts of a state, a payload or what a client keeps."""


Reveal = Literal[
    "adapters",
    "control_variates",
    "logits",
    "activations",
    "targets",
    "embeddings",
    "expert_probes",
    "rows",
]
"""What a client's replies can hold beside numbers: each but the first two has a line of its own in a
client's ``[policy]``, and rows have none."""

ADAPTERS_ALONE: frozenset[Reveal] = frozenset({"adapters"})


AFFORDABLE = 1e11
"""Floating point operations, two seconds of two cores, above which a round does not say what averaging
LoRA's factors apart loses."""


def join_parts(**parts: Tensors) -> Tensors:
    """Return several sets of tensors as one, each name after its part: ``control/NAME``."""
    return {f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()}


def part_of(tensors: Tensors, part: str) -> Tensors:
    """Return the tensors of one part of what :func:`join_parts` made; empty if it is not there."""
    opening = f"{part}/"
    return {n.removeprefix(opening): t for n, t in tensors.items() if n.startswith(opening)}


def of_clients(part: str, tensors: Mapping[int, Tensor]) -> Tensors:
    """Return a tensor of each of some clients, named by its id: ``PART/000007``."""
    return {f"{part}/{client:06d}": tensor for client, tensor in sorted(tensors.items())}


def by_client(tensors: Tensors, part: str) -> dict[int, Tensor]:
    """Return the tensors that :func:`of_clients` named, by client id ascending."""
    return {int(name): tensor for name, tensor in sorted(part_of(tensors, part).items())}


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


@dataclass(frozen=True)
class Cohort:
    """The clients of one round.

    Attributes:
        round: From 1.
        clients: Sampled client ids, ascending.
        presence: Who belongs to the federation and who is there as the round begins.
        learning_rate: Of this round.
        rejected: Clients left out so far, and why. A method adds those whose answers passed every check
            and turned out to be of no use.
        last: Whether no round follows.
        notes: What a method has to say about the round, beside its clients' metrics; for the record.
        details: Whatever more there is to show of it, as plain JSON.
        warnings: What the user should know of it at once.
        reported: Names and ranges of what its clients report of a training.
    """

    round: int
    clients: tuple[int, ...]
    presence: Presence
    learning_rate: float
    rejected: dict[int, str] = field(default_factory=dict)
    last: bool = False
    notes: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    reported: tuple[NumberSpec, ...] = (LOSS,)

    @property
    def sizes(self) -> dict[int, int]:
        """Training rows of each client that can be asked in this round, as it registered them."""
        return {client: self.presence.rows[client] for client in self.presence.available}

    @property
    def returned(self) -> tuple[int, ...]:
        """Sampled clients that answered in an earlier round and not in the last that they could have.

        What they keep is as old as that answer.
        """
        earlier = self.presence.interrupted & self.presence.answered_last.keys()
        return tuple(client for client in self.clients if client in earlier)


class Replies(list[Reply]):
    """The replies to an exchange that passed every check, by client id ascending.

    Attributes:
        missing: Each other client that was asked, and why its answer does not count.
    """

    def __init__(self, replies: Iterable[Reply] = (), missing: Mapping[int, str] | None = None):
        super().__init__(replies)
        self.missing = dict(missing or {})

    @property
    def answered(self) -> tuple[int, ...]:
        """Clients whose answers count, ascending."""
        return tuple(reply.client for reply in self)


@dataclass
class Client:
    """What a handler sees on a client.

    Attributes:
        id: The client's id.
        round: From 1; 0 for the evaluation before any training.
        model: The backbone with the adapter; it holds another client's leftovers until written.
        initial: The adapter as every party initialises it from the seed, or what the run starts from.
        share: The client's training rows.
        objective: What it minimises.
        training: How.
        seed: The experiment's seed.
        noise_seed: What noise that hides the client's rows is drawn from: between machines a secret of
            the client's, another for every message; in a simulation the experiment's seed.
        participations: Rounds that a client takes part in on average, T |S| / N.
        rounds: T, rounds of the run.
        kept: What the client keeps between rounds, by slot; never in a message. What a handler
            changes here is stored if the handler ends well, and forgotten if it fails.
        max_length: Tokens a training sequence has at most.
        width: Classes, or tokens of the vocabulary.
        public: The public rows that every party has, where the experiment has some.
        own_start: Whether ``initial`` is this client's own model, of an earlier run.
        session: What lives from one exchange to the next and ends with the round; never saved.
        last: What the trainings of this request did, for the ledger.
        begun: The first of them.
    """

    id: int
    round: int
    model: AdapterModel
    initial: Tensors
    share: TokenShare
    objective: Objective
    training: TrainingSettings
    seed: int
    noise_seed: int
    participations: float
    rounds: int
    kept: dict[str, Tensors]
    max_length: int = 0
    width: int = 0
    public: PublicRows | None = None
    own_start: bool = False
    session: dict[str, Any] = field(default_factory=dict)
    last: LocalResult | None = None
    begun: Part | None = None

    @property
    def work(self) -> Work:
        """How much the client does on its own rows in a round."""
        return self.training.work(len(self.share), self.participations)

    def due(self, part: Part, repeats: int = 1) -> Work:
        """Return how much one of a round's trainings is: each the whole, or all together."""
        if self.training.amount_per == "model":
            return self.work
        self.begun, done = self.begun or part, self.last
        spent = Work()
        if done is not None:
            answers = done.examples * self.share.tokens.width
            spent = Work(steps=done.steps, examples=answers, tokens=done.tokens)
        return self.work.part(part, self.begun, spent, repeats)

    def train(
        self,
        learning_rate: float,
        before_step: StepHook | None = None,
        after_step: StepHook | None = None,
        *,
        purpose: str = "",
        frozen: Collection[str] = (),
        repeats: int = 1,
        part: Part = ALONE,
        work: Work | None = None,
    ) -> LocalResult:
        """Train the adapter that the model holds on this client's rows, in place.

        Args:
            learning_rate: Of this round.
            before_step: Called before each optimizer step; see :func:`train_locally`.
            after_step: Called after each optimizer step.
            purpose: Tells several trainings in one round apart.
            frozen: Names of the tensors that stay as they are.
            repeats: Optimizer steps on each batch.
            part: Which of the round's trainings it is.
            work: How much (default: what is due of a round's).
        """
        slot = f"{OPTIMIZER} {purpose}".strip()
        with self.model.frozen(frozen):
            result = train_locally(
                self.model,
                self.share,
                self.objective,
                self.training,
                learning_rate=learning_rate,
                seed=self.seed,
                client=self.id,
                round=self.round,
                work=work or self.due(part, repeats),
                purpose=purpose,
                repeats=repeats,
                state=self.kept.get(slot),
                before_step=before_step,
                after_step=after_step,
            )
        if result.optimizer_state:
            self.kept[slot] = result.optimizer_state
        self.last = result.after(self.last)
        return result

    def loss(self, batches: int) -> float:
        """Return the mean loss of what the model holds over some batches of this client's rows.

        They are the same batches whenever it is asked for in a round.
        """
        return local_loss(
            self.model,
            self.share,
            self.objective,
            self.training,
            seed=self.seed,
            client=self.id,
            round=self.round,
            batches=batches,
        )


class ModelSpec(NamedTuple):
    """A backbone, as the experiment names it, and the LoRA rank of the adapter on it."""

    path: str
    rank: int


class Models(Protocol):
    """What models a client can have, all of its own backbone; each is built when it is asked for."""

    @property
    def whole(self) -> AdapterModel:
        """The backbone with the adapter."""

    def front(self, blocks: int, *, tail: bool) -> FrontHalf:
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
        training: How it trains.
        public: The public rows as its model reads them.
    """

    seed: int
    client: int
    training: TrainingSettings
    public: PublicRows | None

    def own_rows(self) -> float:
        """Return the operations of training on the client's own rows."""

    def passes(
        self, share: TokenShare, indices: NDArray[np.int64], size: int | None = None
    ) -> float:
        """Return those of rows: forward and, with gradients on, backward.

        They are laid out ``size`` at a time, or else as a batch is when training.
        """


@dataclass
class ServerSide:
    """What a method has on the server beside its state.

    Attributes:
        model: The server's own model.
        objective: What the federation minimises.
        training: How.
        seed: The experiment's seed.
        participations: Rounds that a client takes part in on average.
        max_length: Tokens a training sequence of a client has at most.
        width: Classes, or tokens of the vocabulary.
        public: The public rows that every party has, where the experiment has some.
        ledger: Where the server's costs go.
        cohort: Clients of a round.
        ranks: LoRA rank of each client.
        aggregation: How updates are put together.
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


class AggregationSettings(Settings):
    """``[aggregation]``: how the server puts the clients' updates together."""

    rule: Literal[
        "mean",
        "median",
        "trimmed_mean",
        "krum",
        "multi_krum",
        "geometric_median",
        "clipped_mean",
    ] = "mean"
    """The mean by rows, or a rule that some bad clients cannot move far: ``aggregation/robust.py``."""
    bad: int = Field(default=0, ge=0)
    """Of trimmed_mean, krum and multi_krum: f, clients of a round that may be bad."""
    max_norm: float | None = Field(default=None, gt=0)
    """Of clipped_mean: largest norm of a client's change over all tensors."""

    def contradictions(self, cohort: int) -> list[str]:
        """Return what in these settings cannot both be meant, with so many clients in a round."""
        found = []
        if self.bad and self.rule not in NEEDED:
            found.append(f"aggregation.bad is a setting of {', '.join(NEEDED)}, not {self.rule}")
        if (self.max_norm is None) == (self.rule == "clipped_mean"):
            found.append('aggregation.max_norm and aggregation.rule = "clipped_mean" go together')
        if self.rule in NEEDED and cohort < 2 * self.bad + NEEDED[self.rule]:
            found.append(
                f"aggregation.rule = {self.rule!r} with aggregation.bad = {self.bad} needs "
                f"{2 * self.bad + NEEDED[self.rule]} clients in a round, there are {cohort}"
            )
        return found


Handler = Callable[[Client, Payload], Payload]
"""Client side of one action."""

Round = Generator[Exchange, Replies, State]
"""Server side of one round."""


class Method:
    """Base of all methods.

    Attributes:
        declares: What it is, in words and facts.
        pools_data: Whether the rows of all clients are put together in client 0 (centralised).
        own_models: Whether each client keeps an adapter of its own and is judged by it.
        personal: Whether a client judges and uses what the server sends together with what it keeps.
        needs_public: Whether all parties must have public rows.
        mixed_ranks: Whether clients that share parameters may have LoRA factors of different ranks.
        mixed_models: Whether its clients may have different models and adapters of any rank.
        shares_parameters: Whether what travels is parameters of the adapter, all of them or some.
        two_factors: Whether it treats the two factors of LoRA apart.
        submixtures: Whether each client can keep a model of its own, of experts that the backbone has.
        whole_at_clients: Whether a client has the whole model, and can be judged by it.
        moves_backbone: Whether weights that are frozen while training change between rounds.
        by_rows: Whether clients weigh by their rows in means of adapters, or all alike.
        averages: Whether it takes means of adapters by :meth:`averaged`, which other rules may replace.
        reveals: What replies hold beside numbers; each method's file says it, and a client's policy goes
            by it. An object may narrow it by its settings.
        trainings: How often a client goes over a round's work at most in one request.
        repeats: Optimizer steps on each batch.
        taken: Its settings that a client takes over from a server as they are: they can neither choose
            rows nor cost much.
        bounded: Those that it takes over where they are no larger than a line of its ``[policy]``, which
            is named.
        named_models: Those that name a backbone, which a client must allow.
        least: Settings with which replies hold the least; the others reveal more.
        no_start: Why it cannot start from an adapter that exists, and what can be done, where it cannot.
        aggregation: The rule.
        server: What it has on the server, from :meth:`equip` on.
    """

    declares: Declaration
    pools_data = False
    own_models = False
    personal = False
    needs_public = False
    mixed_ranks = False
    mixed_models = False
    shares_parameters = True
    two_factors = False
    submixtures = False
    whole_at_clients = True
    moves_backbone = False
    averages = False
    by_rows = True
    reveals: frozenset[Reveal]
    trainings = 1
    repeats = 1
    taken: tuple[str, ...] = ()
    bounded: Mapping[str, str] = MappingProxyType({})
    named_models: tuple[str, ...] = ()
    least: Mapping[str, object] = MappingProxyType({})
    no_start = ""
    aggregation = AggregationSettings()
    server: ServerSide

    def __init__(self, settings: Any) -> None:
        """Take the settings of ``[method]``; each method keeps what it needs of them."""

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield everything in an experiment that this method does not go with, each as one message.

        A method that adds to it begins with ``yield from super().check(view)``.
        """
        yield from general(cls, view)

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
    def parts(self) -> PersonalParts:
        """The parts of the model, beside the adapter, that its clients have."""
        return PersonalParts()

    def equip(self, server: ServerSide) -> None:
        """Take what there is on the server, once, before the first round."""
        self.server = server
        self.aggregation = server.aggregation

    def averaged(
        self, replies: Sequence[Reply], cohort: Cohort, start: Tensors, *, noted: bool = False
    ) -> Tensors:
        """Return what the rule makes of the adapters that clients sent back for ``start``.

        The replies are used up: the mean is written where the first one's adapter was. If ``noted``, the
        round's notes say what averaging LoRA's factors apart loses.

        Raises:
            RoundFailed: Too few clients answered for the rule.
        """
        own = self.aggregation
        if own.rule == "mean":
            first = replies[0].payload.tensors
            return mean_adapter(replies, cohort if noted else None, out=first, by_rows=self.by_rows)
        adapters = [reply.payload.tensors for reply in replies]
        weights = _weights(replies, by_rows=self.by_rows)
        largest = own.max_norm or math.inf
        try:
            return combined(own.rule, adapters, weights, start, own.bad, largest)
        except ValueError as error:
            raise RoundFailed(
                f"round {cohort.round}: aggregation.rule = {own.rule!r} has too few updates: {error}"
            ) from error

    def trainings_of(self, round: int, rounds: int) -> int:
        """Return how many trainings a client makes in a round (from 1) of so many, in all requests."""
        return 1

    def promise(self) -> str | None:
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

    def travelling(self, state: State) -> Tensors | None:
        """Return what clients are sent to be judged with; ``None`` where all of it is their own."""
        return None if self.own_models else self.shared(state)

    def welcome(self, state: State) -> Tensors | None:
        """Return what a client is sent that has just joined; here what every other is sent."""
        return self.travelling(state)

    def traffic(self, adapter: Tensors) -> Traffic:
        """Return the closed form of a client's bytes in a round; here the adapter down and up."""
        size = tensor_bytes(adapter)
        return ParameterTraffic(size, size)

    def load(self, client: Client, payload: Payload) -> None:
        """Write the adapter that ``client`` would use now into its model, for evaluation."""
        client.model.write(payload.tensors)

    def settle(self, client: Client, learning_rate: float, work: Work) -> None:
        """Fit what a client that just joined has in its model to its rows; here the whole adapter.

        What it is judged by afterwards is what the model holds then.
        """
        client.train(learning_rate, purpose="settling ", work=work)


def proximal_gradient(start: Tensors, strength: float) -> StepHook:
    """Return a hook that adds mu (w - w_t), the gradient of mu/2 ||w - w_t||^2, to the gradients.

    Args:
        start: w_t, on the model's device.
        strength: mu.
    """

    def add(parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start[name], alpha=strength)

    return add


def tensor_bytes(tensors: Tensors) -> int:
    """Return the bytes of tensors without a header."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def train_and_upload(client: Client, payload: Payload, part: Part = ALONE) -> Payload:
    """Start from the adapter received, train, send the adapter back: the client of FedAvg."""
    client.model.write(payload.tensors)
    result = client.train(payload.numbers["learning_rate"], part=part)
    return Payload(client.model.read(), {"examples": len(client.share)}, result.metrics)


def mean_adapter(
    replies: Sequence[Reply],
    cohort: Cohort | None = None,
    out: Tensors | None = None,
    *,
    by_rows: bool = True,
) -> Tensors:
    """Return the mean of the adapters that clients sent back, weighted by their rows or all alike.

    It is written to ``out``, which may be the first of them, if given.

    With a ``cohort`` the round's notes say what averaging LoRA's factors apart loses, unless the adapters
    are so many and large that they wait on disk or that it takes more than :data:`AFFORDABLE`.
    """
    adapters = [reply.payload.tensors for reply in replies]
    weights = _weights(replies, by_rows=by_rows)
    stored = isinstance(adapters[0], StoredTensors)
    if cohort is not None and not stored and error_flops(adapters) <= AFFORDABLE:
        error = averaging_error(adapters, weights)
        cohort.notes.update({} if error is None else {"aggregation_error": error})
    return weighted_mean(adapters, weights, out)


def _weights(replies: Sequence[Reply], *, by_rows: bool) -> list[float]:
    return [reply.payload.numbers["examples"] if by_rows else 1.0 for reply in replies]


def training_exchange(
    cohort: Cohort, adapter: Tensors, more: Mapping[NumberSpec, float] | None = None
) -> Exchange:
    """Ask the whole cohort to train ``adapter`` and send it back with the number of examples.

    Numbers in ``more`` travel with the learning rate.
    """
    numbers = {LEARNING_RATE: cohort.learning_rate, **(more or {})}
    return Exchange.broadcast(
        "train",
        cohort.round,
        cohort.clients,
        Payload(adapter, {spec.name: value for spec, value in numbers.items()}),
        Schema.of(adapter, tuple(numbers)),
        Schema.of(adapter, TRAIN_REPLY_NUMBERS, cohort.reported),
    )
