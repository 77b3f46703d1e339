"""A client as a method's handlers see it: model, rows, store and training."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass, field
from typing import Any, TypedDict, TypeVar, Unpack

from fedloom.data.client_rows import TokenShare
from fedloom.data.public import PublicRows
from fedloom.errors import PluginError
from fedloom.models.adapters import AdapterModel
from fedloom.objectives.base import Objective
from fedloom.randomness import generator
from fedloom.tensors import Tensors
from fedloom.training.coordinates import Coordinates
from fedloom.training.results import LocalResult, OnStep, StepHook
from fedloom.training.settings import ALONE, Part, TrainingSettings, Work
from fedloom.training.steps import BatchMaker, Driver, StepOptions, Training, local_loss, row_losses
from fedloom.wire.messages import Payload

Answer = TypeVar("Answer")

Trainings = Generator[Training, LocalResult, Answer]
"""Yields trainings, is sent what came of each, and returns what it was all for."""

OPTIMIZER = "optimizer"
"""Slot of the client store with the optimizer's state, if it is kept."""


def unchanged(reply: Payload) -> Payload:
    """Return a reply as it is."""
    return reply


class TrainingOptions(TypedDict, total=False):
    """What may be said of one of a client's trainings.

    Attributes:
        purpose: Tells several trainings in one round apart.
        frozen: Names of the tensors that stay as they are.
        repeats: Optimizer steps on each batch.
        part: Which of the round's trainings it is.
        work: How much (default: what is due of a round's).
        coordinates: What is trained in place of the model's tensors, which are a function of it.
        driver: Makes the steps, where it is not the client's.
    """

    purpose: str
    frozen: Collection[str]
    repeats: int
    part: Part
    work: Work | None
    coordinates: Coordinates | None
    driver: Driver | None


@dataclass
class Client:
    """The client that a handler works on.

    Attributes:
        id: The client's id.
        round: From 1; 0 for the evaluation before any training.
        model: The backbone with the adapter; it holds another client's parameters until written.
        initial: The adapter as every party initialises it from the seed, or what the run starts from.
        share: The client's training rows.
        objective: What it minimises.
        training: Settings of local training.
        seed: The experiment's seed.
        noise_seed: Seed of noise that hides the client's rows: between machines a secret of the client,
            different for every message; in a simulation the experiment's seed.
        participations: Rounds that a client takes part in on average, T |S| / N.
        rounds: T, rounds of the run.
        store: The client store by slot; never in a message. Changes by a handler are stored if the
            handler succeeds, and discarded if it fails.
        max_length: Tokens a training sequence has at most.
        width: Classes, or tokens of the vocabulary.
        public: The public rows that every party has, where the experiment has some.
        own_start: Whether ``initial`` is this client's own model, of an earlier run.
        session: State between the exchanges of a round; never saved.
        last: Results of the trainings of this request, for the ledger.
        begun: The first of them.
        on_step: Told of each step of its trainings, in a run that is watched so.
        driver: Makes its trainings, where row-level privacy hides its rows.
        maker: Makes the batches of its trainings, where the objective has answers generated.
        as_read: Returns a reply as the server will read it, which ``[wire]`` may change; the handler must
            return that very reply afterwards.
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
    store: dict[str, Tensors]
    max_length: int = 0
    width: int = 0
    public: PublicRows | None = None
    own_start: bool = False
    session: dict[str, Any] = field(default_factory=dict)
    last: LocalResult | None = None
    begun: Part | None = None
    on_step: OnStep | None = None
    driver: Driver | None = None
    maker: BatchMaker | None = None
    as_read: Callable[[Payload], Payload] = unchanged

    @property
    def work(self) -> Work:
        """The work of the client on its own rows in a round."""
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
        **options: Unpack[TrainingOptions],
    ) -> LocalResult:
        """Train the adapter that the model holds on this client's rows, in place.

        Args:
            learning_rate: Of this round.
            before_step: Called before each optimizer step; see :func:`local_steps`.
            after_step: Called after each optimizer step.
            options: See :class:`TrainingOptions`.
        """
        return carried_out(self.training_steps(learning_rate, before_step, after_step, **options))

    def training_steps(
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
        coordinates: Coordinates | None = None,
        driver: Driver | None = None,
    ) -> Trainings[LocalResult]:
        """Yield what :meth:`train` would carry out, to whoever may do it for several clients at a time.

        A handler that is a generator says ``result = yield from client.training_steps(rate)`` and goes on
        when the model holds what was trained. Args are those of :meth:`train`, and of
        :class:`TrainingOptions`.

        Raises:
            PluginError: Row-level privacy hides the rows, and the method makes steps of its own.
        """
        slot = f"{OPTIMIZER} {purpose}".strip()
        options: StepOptions = {
            "learning_rate": learning_rate,
            "seed": self.seed,
            "client": self.id,
            "round": self.round,
            "work": work or self.due(part, repeats),
            "purpose": purpose,
            "repeats": repeats,
            "state": self.store.get(slot),
            "before_step": before_step,
            "after_step": after_step,
            "on_step": self.on_step,
            "coordinates": coordinates,
            "maker": self.maker,
        }
        if driver is not None and self.driver is not None:
            raise PluginError(
                'privacy.unit = "row": the method makes steps of its own, which have no noise; its '
                "declaration should say that it does not go with row-level privacy"
            )
        driver = driver or self.driver
        result = yield Training(
            self.model, self.share, self.objective, self.training, frozen, options, driver
        )
        if result.optimizer_state:
            self.store[slot] = result.optimizer_state
        self.last = result.after(self.last)
        return result

    def loss(self, batches: int) -> float:
        """Return the mean loss of what the model holds over some batches of this client's rows.

        They are the same batches whenever it is asked for in a round.

        Raises:
            PluginError: Row-level privacy hides the rows, of which a loss would tell.
        """
        self._require_open_losses()
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

    def row_losses(self, rows: int) -> tuple[list[float], list[float]]:
        """Return losses of what the model holds on so many of this client's rows, and their weights.

        Of more rows, others are drawn in each round; see :func:`~fedloom.training.steps.row_losses`.

        Raises:
            PluginError: Row-level privacy hides the rows, of which a loss would tell.
        """
        self._require_open_losses()
        chosen = list(range(len(self.share)))
        if rows < len(chosen):
            drawn = generator(self.seed, "rows whose losses are asked for", self.id, self.round)
            chosen = sorted(drawn.choice(len(chosen), rows, replace=False).tolist())
        return row_losses(self.model, self.share, self.objective, self.training, chosen)

    def _require_open_losses(self) -> None:
        """Refuse losses of rows that row-level privacy hides."""
        if self.driver is not None:
            raise PluginError(
                'privacy.unit = "row": the method asks for a loss of rows, which has no noise; its '
                "declaration should say that it does not go with row-level privacy"
            )


Handler = Callable[[Client, Payload], Payload | Trainings[Payload]]
"""Client side of one action: returns the reply, or yields the trainings that it needs and returns it then
(:meth:`Client.training_steps`), so that clients of a simulation can be trained together."""


def carried_out(steps: Trainings[Answer]) -> Answer:
    """Carry out trainings as they are asked for, each alone; return what comes of them."""
    result: LocalResult | None = None
    while True:
        try:
            training = next(steps) if result is None else steps.send(result)
        except StopIteration as stop:
            answer: Answer = stop.value
            return answer
        try:
            result = training.alone()
        except BaseException as error:
            steps.throw(error)
            raise
