"""Split-FedLLM: first blocks on the clients, the rest on the server; activations and gradients travel.

Source: arXiv 2501.04436 (third framework); its steps are those of SplitFed (Thapa et al. 2022,
https://arxiv.org/abs/2004.12088) on LoRA, as in SplitLoRA (Lin et al. 2024,
https://arxiv.org/abs/2407.00952), whose code cuts GPT-2 after block 3 and averages every 100 steps.

A step: the client sends the activations of its last block; the server goes on, takes the loss and sends
back the gradient of what it got; the client goes on with that. Then both make their optimizer steps.
With ``labels = "server"`` the client sends what is true too. With ``labels = "client"`` (U-shape) norm
and head are its own: the server sends its last block's activations, and gets their gradient.

All clients take a step at a time. ``server = "sequential"`` (SplitFedV2): one back half, which steps
after every client's batch, in client order. ``"parallel"`` (V1): a copy for every client, averaged with
the front halves. Padding does not travel.

Gradients are clipped by their norm over both halves, as those of a whole model are: the server sends the
squared norm of its own with the gradient, the client that of its own with its next activations, and the
back half steps when that has come. A back half that learns from client after client therefore asks one
at a time, unless ``training.max_grad_norm`` is 0. The batch of a client lost in between does not count.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedloom.accounting.costs import SERVER
from fedloom.accounting.traffic import ActivationTraffic, Traffic
from fedloom.aggregation.means import weighted_mean
from fedloom.data.batch import Batch, Sequences
from fedloom.errors import MessageError
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import LEARNING_RATE, TRAIN_REPLY_NUMBERS
from fedloom.methods.contract.checks import TASKS, tasks_only
from fedloom.methods.contract.client import Client, Handler
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import Method, Models, Reveal, ServerSide, Variant
from fedloom.methods.declaration import Absence, Declaration, no
from fedloom.models.adapters import PROMPTS, AdapterModel
from fedloom.models.split_model import ClientPart, ServerPart, last_tokens
from fedloom.objectives.base import Objective
from fedloom.randomness import derive_seed
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import (
    State,
    Tensors,
    is_finite,
    join_parts,
    largest_value,
    part_of,
    tensor_bytes,
)
from fedloom.training.dropout import DropoutStream
from fedloom.training.optimizers import make_optimizer
from fedloom.training.results import Gradients, LocalResult, RemoteGradients, Totals
from fedloom.training.steps import local_steps, squared_norm, update
from fedloom.wire.messages import Exchange, Payload, Reply, encode
from fedloom.wire.row_codecs import Encoding, pack_rows, row_specs, unpack_rows
from fedloom.wire.schema import FINITE, NumberSpec, Schema, TensorSpec, amount, fraction

FRONT, BACK = "front", "back"
"""Parts of the state: the clients' half of the adapter and the server's."""

ROWS, TARGETS = "rows", "targets"
"""Names in the payloads: a line of integers for each sequence, and the completions' tokens."""

LARGEST_EXPONENT = 126
"""Of the power of two that a gradient is divided by, either way."""

SQUARED_NORM = amount("squared_norm", FINITE)
"""Of the gradients of a half's own parameters, 0 where nothing is clipped."""

STEP_NUMBERS = (
    NumberSpec("loss"),
    NumberSpec("exponent", -1100.0, 1100.0),
    fraction("pause"),
    SQUARED_NORM,
)
"""Beside a gradient: the loss of the batch, the power of two it was divided by, whether to stop there.
The first two are any finite number and any power that float64 has: what a client sent may lead to
them."""

OWN_LOSS_NUMBERS = (
    amount("loss"),
    NumberSpec("exponent", -LARGEST_EXPONENT, LARGEST_EXPONENT),
)
"""The first two of them, from a client in U-shape."""

WAITING = fraction("waiting")
"""Whether a client has more steps to take."""


PLAIN: Mapping[str, object] = MappingProxyType(
    {
        "micro_batch_size": None,
        "accumulation": None,
        "tokens_per_pass": "auto",
        "keep_optimizer_state": False,
        "gradient_checkpointing": False,
    }
)
"""Training as both halves can do it."""


class SplitSettings(NamedSettings):
    """``[method] name = "split"``."""

    name: Literal["split"] = "split"
    cut: int = Field(default=1, ge=1)
    """Blocks on the client, counted from the embeddings; the model must have more."""
    labels: Literal["server", "client"] = "server"
    """Where labels are: at the server, with the head; or at the client, which then has norm and head too
    (U-shape)."""
    server: Literal["sequential", "parallel"] = "sequential"
    """One back half that learns from client after client, or one a client, averaged."""
    average_every: int | None = Field(default=None, ge=1)
    """Steps of a client after which front halves (and parallel back halves) are averaged and handed out
    again (default: once a round)."""
    activations: Encoding = "fp32"
    """Of activations on the wire: fp32, bf16, fp16, or int8 with a scale a token."""
    gradients: Encoding = "fp32"
    """Of gradients on the wire."""
    activation_noise: float = Field(default=0.0, ge=0)
    """Normal noise on the client's activations, as a share of their root mean square; 0 is none."""


class Split(Method):
    """A model cut in two, or in three with both ends at the client."""

    declares = Declaration(
        "Split-FedLLM",
        "https://arxiv.org/abs/2501.04436",
        "reconstructed",
        "steps of SplitFed (2004.12088) on LoRA",
        "Split-FedLLM",
        "activations up and their gradients down in every step; the client's half of the adapter",
        "nothing",
        secure_aggregation=no("the server computes with each client's activations"),
        client_privacy=no("activations are no changes of parameters"),
        row_privacy=no("activations of rows travel"),
        asynchronous=no("both halves step together"),
        compression=no(
            "activations have codecs of their own: method.activations, method.gradients"
        ),
        absence=Absence(
            "its batches are lost; front halves are averaged over those that finished",
            "begins with today's front half",
            "is in no mean",
        ),
    )
    reveals: frozenset[Reveal] = frozenset({"adapters", "activations", "targets"})
    shares_parameters = False
    whole_at_clients = False
    least = MappingProxyType({"labels": "client"})
    taken = (
        "cut",
        "labels",
        "server",
        "average_every",
        "activations",
        "gradients",
        "activation_noise",
    )

    def __init__(self, settings: SplitSettings) -> None:
        """Keep the settings."""
        self.settings = settings
        self.u_shape = settings.labels == "client"
        if self.u_shape:  # labels and the tokens to learn stay where they are
            self.reveals = self.reveals - {"targets"}

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also how its two halves cannot train."""
        yield from super().check(view)
        yield from tasks_only(view)
        training, adapter = view.training, view.adapter
        if training and (training.counts_examples or training.tokens_per_pass != "auto"):
            yield (
                "method split sends an optimizer batch at a time: leave training.micro_batch_size, "
                "training.accumulation and training.tokens_per_pass out"
            )
        if training and training.keep_optimizer_state:
            yield (
                "method split makes its optimizers anew in every round: leave "
                "training.keep_optimizer_state out"
            )
        if training and training.gradient_checkpointing:
            yield (
                "method split keeps activations on both sides: leave "
                "training.gradient_checkpointing out"
            )
        if adapter is not None and adapter.kind in PROMPTS:
            yield (
                f'adapter.kind = "{adapter.kind}" puts its tokens before the first block; '
                'method split needs "lora", "ia3" or "full"'
            )

    @classmethod
    def variants(cls, own: NamedSettings | None, view: ExperimentView) -> Iterator[Variant]:
        """Yield it with activations as they are set, and in 8 bits."""
        if view.objective_name not in TASKS:
            return
        split = own if isinstance(own, SplitSettings) else SplitSettings()
        for encoding in dict.fromkeys([split.activations, "int8"]):
            changed = split.model_copy(update={"activations": encoding, "gradients": encoding})
            yield Variant(
                f"Split-FedLLM, cut {split.cut}, {encoding}",
                changed,
                PLAIN,
                "Clients must be online for every step, and activations tell the server much about the "
                "texts: see method.labels and method.activation_noise.",
            )

    def client_model(self, models: Models) -> AdapterModel:
        """Return the client's blocks alone."""
        return models.front(self.settings.cut, tail=self.u_shape)

    def setup(self, server: ServerSide) -> None:
        """View the server's blocks of its model."""
        super().setup(server)
        self.back = ServerPart(server.model, self.settings.cut, tail=self.u_shape)

    @property
    def clips(self) -> bool:
        """Whether the halves need each other's norm before they step."""
        return bool(self.server.training.max_grad_norm)

    def initial_state(self, adapter: Tensors) -> State:
        """Part the adapter in the clients' half and the server's."""
        back = {name: tensor for name, tensor in adapter.items() if name in self.back.parameters}
        front = {name: tensor for name, tensor in adapter.items() if name not in back}
        return State(join_parts(front=front, back=back))

    def shared(self, state: State) -> Tensors:
        """Return both halves as the adapter of the whole model."""
        both = {**part_of(state.tensors, FRONT), **part_of(state.tensors, BACK)}
        return dict(sorted(both.items()))

    def traffic(self, adapter: Tensors) -> Traffic:
        """Return the closed form for the steps a client takes."""
        settings, wire = self.settings, _wire(self.server, self.settings)
        front = {name: t for name, t in adapter.items() if name not in self.back.parameters}
        return ActivationTraffic(
            tensor_bytes(front),
            wire.hidden,
            settings.activations,
            settings.gradients,
            4 * wire.fields,
            wire.told and not wire.classifies,
            self.u_shape,
            settings.average_every or 0,
        )

    def round(self, state: State, cohort: Cohort) -> Round:
        """Let all clients take their steps; average in the end, and before it every few steps."""
        front = part_of(state.tensors, FRONT)
        trainer = _ServerTrainer(self, cohort, part_of(state.tensors, BACK))
        training, finished = cohort.clients, 0.0
        while training:
            collected, paused = yield from self._segment(cohort, training, front, trainer)
            weights = [reply.payload.numbers["examples"] for reply in collected]
            parts = [reply.payload.tensors for reply in collected]
            # Who finished earlier in this round stands by what was averaged then.
            front = _mean_with(parts, weights, front, finished)
            trainer.average(
                {r.client: w for r, w in zip(collected, weights, strict=True)}, finished
            )
            own = {reply.client for reply in collected}
            training = tuple(client for client in paused if client in own)
            finished += sum(
                reply.payload.numbers["examples"]
                for reply in collected
                if reply.client not in training
            )
        self.server.model.hold(self.server.model.parameters)
        return State(join_parts(front=front, back=trainer.back))

    def _segment(
        self, cohort: Cohort, training: tuple[int, ...], front: Tensors, trainer: _ServerTrainer
    ) -> Generator[Exchange, list[Reply], tuple[list[Reply], tuple[int, ...]]]:
        """Hand out front halves, take steps until an average is due, and collect them.

        Returns:
            The front halves that came back, and who has more steps to take.
        """
        wire, last = trainer.wire, self.settings.average_every or math.inf
        replies = yield wire.start(cohort, training, front)
        trained = {reply.client for reply in replies}
        paused: tuple[int, ...] = ()
        step = 0
        while replies:
            step += 1
            unfinished: list[Reply] = []
            for group in self._groups(replies):
                asked = {reply.client for reply in group}
                if self.u_shape:
                    group = yield wire.ask_for_loss(cohort, trainer.continue_with(group))
                learnt = trainer.learn_from_loss(group) if self.u_shape else trainer.learn(group)
                answers: list[Reply] = []
                if learnt:
                    answers = yield wire.answer(cohort, learnt, trainer.bounds, pause=step >= last)
                    trainer.confirm(learnt, answers)
                trained -= asked - {reply.client for reply in answers}
                unfinished += [r for r in answers if r.payload.numbers["waiting"]]
            paused = tuple(reply.client for reply in unfinished)
            replies = unfinished if step < last else []
        collected = yield wire.collect(cohort, tuple(sorted(trained)), front)
        return collected, paused if step >= last else ()

    def _groups(self, replies: list[Reply]) -> list[list[Reply]]:
        """Return who is answered together: one back half cannot wait for two clients' words at once."""
        waits = self.u_shape or self.clips
        alone = waits and self.settings.server == "sequential"
        return [[reply] for reply in replies] if alone else [replies]

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {
            "start": self._start,
            "loss": self._loss,
            "step": self._step,
            "collect": self._collect,
        }

    def _start(self, client: Client, payload: Payload) -> Payload:
        """Take over a front half; go forward with the first or the next batch."""
        session, model = client.session, _front(client)
        if "steps" not in session:
            session["parameters"] = model.parameters_of(payload.tensors)
            model.hold(session["parameters"])
            session["steps"] = self._client_steps(client, payload.numbers["learning_rate"])
            next(session["steps"])
        else:
            model.hold(session["parameters"])
            model.write(payload.tensors)
        return self._forward(client)

    def _step(self, client: Client, payload: Payload) -> Payload:
        """Go back with the server's gradient, make a step, go forward with the next batch."""
        session = client.session
        _front(client).hold(session["parameters"])
        gradient = unpack_gradient(payload, self.settings.gradients)
        _check_gradient(gradient, session["tokens"])
        try:
            numbers = payload.numbers
            session["steps"].send((gradient, numbers["loss"], numbers["squared_norm"]))
        except StopIteration as stop:
            client.last = session["result"] = stop.value
            return _wire(client, self.settings).nothing(session.get("norm", 0.0), waiting=False)
        if payload.numbers["pause"]:
            return _wire(client, self.settings).nothing(session.get("norm", 0.0), waiting=True)
        return self._forward(client)

    def _loss(self, client: Client, payload: Payload) -> Payload:
        """U-shape: from the server's activations to the loss; send back their gradient."""
        session = client.session
        _front(client).hold(session["parameters"])
        hidden = unpack_rows("hidden", payload.tensors, self.settings.activations)
        _check_gradient(hidden, session["tokens"])
        gradient, loss = session["steps"].send(hidden)
        packed, exponent = pack_gradient(gradient, self.settings.gradients)
        return Payload(packed, {"loss": loss, "exponent": exponent})

    def _collect(self, client: Client, payload: Payload) -> Payload:
        """Send the front half, and what was seen in the round once it is done."""
        result: LocalResult | None = client.session.get("result")
        tensors = {n: p.detach().cpu().clone() for n, p in client.session["parameters"].items()}
        metrics = result.metrics if result else {}
        return Payload(tensors, {"examples": len(client.share)}, metrics)

    def _forward(self, client: Client) -> Payload:
        tokens, batch = client.session["steps"].send(None)
        client.session["tokens"] = len(tokens)
        norm = client.session.get("norm", 0.0)
        return _wire(client, self.settings).step(tokens, batch, client.model.pad, norm)

    def _client_steps(
        self, client: Client, learning_rate: float
    ) -> Generator[Any, Any, LocalResult]:
        """Return the client's steps; they wait before each batch, and for the server inside it."""
        model, objective = _front(client), client.objective
        noise = torch.Generator().manual_seed(
            derive_seed(client.noise_seed, "activation noise", client.id, client.round)
        )

        def gradients(parts: list[Batch], totals: Totals) -> RemoteGradients:
            (batch,) = parts
            yield None
            mask = batch.sequences.attention_mask.bool()
            hidden = model(input_ids=batch.sequences.input_ids, attention_mask=mask.long())
            tokens = hidden[mask]
            answer = yield self._noisy(tokens.detach(), noise), batch
            if self.u_shape:
                answer = yield _own_loss(model, objective, batch, answer)
            gradient, loss, norm = answer
            torch.autograd.backward(tokens, gradient.to(tokens.device))
            if client.training.max_grad_norm:
                client.session["norm"] = squared_norm(model.parameters)
            totals.add(batch, {"loss": torch.tensor(loss)}, objective.weight(batch), {})
            return Gradients(float(loss), norm)

        return local_steps(
            model,
            client.share,
            gradients,
            client.training,
            learning_rate=learning_rate,
            seed=client.seed,
            client=client.id,
            round=client.round,
            work=client.work,
            on_step=client.on_step,
        )

    def _noisy(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        if not self.settings.activation_noise:
            return tokens
        size = self.settings.activation_noise * tokens.square().mean().sqrt()
        return tokens + size * torch.randn(tokens.shape, generator=generator).to(tokens.device)


class SplitWire:
    """The forms in which a split model's halves speak to each other."""

    def __init__(
        self,
        settings: SplitSettings,
        objective: Objective,
        *,
        rows: int,
        max_length: int,
        hidden: int,
        width: int,
    ) -> None:
        """Fix the schemas.

        Args:
            settings: Encodings, and where labels are.
            objective: Classification or SFT.
            rows: Sequences in a batch at most.
            max_length: Tokens of one at most.
            hidden: Numbers an activation has.
            width: Classes or vocabulary.
        """
        self.settings, self.max_length, self.width = settings, max_length, width
        self.hidden = hidden
        self.told = settings.labels == "server"
        self.classifies = objective.head == "classification"
        tokens = rows * max_length
        self.activations = row_specs(
            "activations", tokens, hidden, settings.activations, ragged=True
        )
        self.gradient = row_specs("gradient", tokens, hidden, settings.gradients, ragged=True)
        self.entered = row_specs("hidden", tokens, hidden, settings.activations, ragged=True)
        self.fields = (3 if self.classifies else 2) if self.told else 1
        facts = [TensorSpec(ROWS, (rows, self.fields), torch.int32, ragged=True)]
        if self.told and not self.classifies:
            facts.append(TensorSpec(TARGETS, (tokens,), torch.int32, ragged=True))
        self.step_schema = Schema((*self.activations, *facts), (WAITING, SQUARED_NORM))

    def step(self, tokens: Tensor, batch: Batch, pad: int, norm: float) -> Payload:
        """Return what a client sends: activations of all tokens, and what the server must know.

        ``norm`` is the squared norm of its gradients in the step before, 0 in the first.
        """
        sequences = batch.sequences
        lengths = sequences.attention_mask.sum(-1)
        fields = [lengths]
        if self.told and self.classifies:
            assert batch.labels is not None, "labelled examples carry labels"
            fields += [last_tokens(sequences.input_ids, pad), batch.labels]
        elif self.told:
            fields += [lengths - sequences.completion_mask.sum(-1)]
        tensors = pack_rows("activations", tokens, self.settings.activations)
        tensors[ROWS] = torch.stack(fields, -1).to(torch.int32).cpu()
        if self.told and not self.classifies:
            tensors[TARGETS] = sequences.input_ids[sequences.completion_mask].to(torch.int32).cpu()
        return Payload(tensors, {"waiting": 1.0, "squared_norm": norm})

    def nothing(self, norm: float, *, waiting: bool) -> Payload:
        """Return what a client sends that has no batch under way: whether it has more to do."""
        tensors = pack_rows("activations", torch.zeros(0, self.hidden), self.settings.activations)
        tensors[ROWS] = torch.zeros(0, self.fields, dtype=torch.int32)
        if self.told and not self.classifies:
            tensors[TARGETS] = torch.zeros(0, dtype=torch.int32)
        return Payload(tensors, {"waiting": float(waiting), "squared_norm": norm})

    def batch(self, tensors: Tensors) -> tuple[Tensor, Batch, Tensor | None]:
        """Return padded activations, their batch as far as it is known, and its rows' last columns."""
        tokens = unpack_rows("activations", tensors, self.settings.activations)
        facts = tensors[ROWS].long()
        lengths = facts[:, 0]
        columns = torch.arange(int(lengths.max()))
        mask = columns < lengths.unsqueeze(1)
        activations = torch.zeros(*mask.shape, self.hidden)
        activations[mask] = tokens
        ids = torch.zeros(mask.shape, dtype=torch.int64)
        completion = torch.zeros_like(mask)
        labels, last, first = None, None, 1
        if self.told and self.classifies:
            last, labels = facts[:, 1], facts[:, 2]
        elif self.told:
            completion = mask & (columns >= facts[:, 1].unsqueeze(1))
            ids[completion] = tensors[TARGETS].long()
            first = int(facts[:, 1].min())  # below the longest, as checked
        sequences = Sequences(ids, mask.long(), completion, first)
        count = int(completion.sum())
        rows = tuple(range(len(facts)))
        return activations, Batch(rows, sequences, count, int(lengths.sum()), labels), last

    def check(self, payload: Payload, *, pause: bool = False) -> None:
        """Check what a schema cannot say of a client's step.

        Raises:
            MessageError: Lengths, labels or targets that do not belong together or are out of range.
        """
        facts, tokens = payload.tensors[ROWS].long(), len(payload.tensors["activations"])
        if not len(facts):
            if tokens or (payload.numbers["waiting"] and not pause):
                raise MessageError("activations without their lengths, or none where a step is due")
            return
        lengths = facts[:, 0]
        if int(lengths.min()) < 1 or int(lengths.max()) > self.max_length:
            raise MessageError(
                f"a sequence must have 1 to {self.max_length} tokens", "out_of_range"
            )
        if int(lengths.sum()) != tokens or any(
            len(payload.tensors[spec.name]) != tokens for spec in self.activations
        ):
            raise MessageError(f"{tokens} activations for sequences of {int(lengths.sum())} tokens")
        if self.told and self.classifies:
            last, labels = facts[:, 1], facts[:, 2]
            if bool((last < 0).any() or (last >= lengths).any()):
                raise MessageError(
                    "the token to classify by lies outside its sequence", "out_of_range"
                )
            if bool((labels < 0).any() or (labels >= self.width).any()):
                raise MessageError(f"a label is not among the {self.width} classes", "out_of_range")
        elif self.told:
            targets = payload.tensors[TARGETS]
            left = lengths - facts[:, 1]
            if bool((facts[:, 1] < 1).any() or (left < 1).any()) or int(left.sum()) != len(targets):
                raise MessageError("prompts, completions and targets do not add up")
            if int(targets.min()) < 0 or int(targets.max()) >= self.width:
                raise MessageError(f"a target is not among the {self.width} tokens", "out_of_range")

    def start(self, cohort: Cohort, clients: tuple[int, ...], front: Tensors) -> Exchange:
        """Hand out a front half and ask for the first activations."""
        return Exchange.broadcast(
            "start",
            cohort.round,
            clients,
            Payload(front, {"learning_rate": cohort.learning_rate}),
            Schema.of(front, (LEARNING_RATE,)),
            self.step_schema,
            lambda client, payload: self.check(payload),
        )

    def answer(
        self, cohort: Cohort, learnt: Sequence[_Learnt], left: dict[int, int], *, pause: bool
    ) -> Exchange:
        """Send every client its gradient and ask for the next activations, or for a pause.

        Args:
            cohort: Of the round.
            learnt: What there is for each client.
            left: Steps that each client's rows still make at most.
            pause: Whether to stop there, for an average.
        """
        schema = Schema(self.gradient, STEP_NUMBERS)
        requests = {}
        for one in learnt:
            packed, exponent = pack_gradient(one.gradient, self.settings.gradients)
            numbers = {"loss": one.loss, "exponent": exponent, "pause": float(pause)}
            numbers["squared_norm"] = one.norm
            requests[one.client] = encode(Payload(packed, numbers), schema)

        def check(client: int, payload: Payload) -> None:
            if payload.numbers["waiting"] and left[client] <= 0:
                raise MessageError("it wants to go on and has taken all the steps its rows make")
            self.check(payload, pause=pause)

        return Exchange("step", cohort.round, schema, self.step_schema, requests, check)

    def ask_for_loss(self, cohort: Cohort, hidden: dict[int, Tensor]) -> Exchange:
        """U-shape: send every client the activations of the last block and ask for their gradient."""
        schema, encoding = Schema(self.entered), self.settings.activations

        def check(client: int, payload: Payload) -> None:
            gradient = unpack_gradient(payload, self.settings.gradients)
            _check_gradient(gradient, len(hidden[client]))

        return Exchange(
            "loss",
            cohort.round,
            schema,
            Schema(self.gradient, OWN_LOSS_NUMBERS),
            {
                c: encode(Payload(pack_rows("hidden", t, encoding)), schema)
                for c, t in hidden.items()
            },
            check,
        )

    def collect(self, cohort: Cohort, clients: tuple[int, ...], front: Tensors) -> Exchange:
        """Ask for front halves."""
        return Exchange.broadcast(
            "collect",
            cohort.round,
            clients,
            Payload(),
            Schema(),
            Schema.of(front, TRAIN_REPLY_NUMBERS, cohort.reported),
        )


@dataclass(frozen=True)
class _Learnt:
    """What the server has for a client after a batch.

    Attributes:
        client: Its id.
        gradient: Of its activations.
        loss: Of the batch.
        norm: Squared, of the gradients of the back half.
    """

    client: int
    gradient: Tensor
    loss: float
    norm: float


@dataclass
class _Copy:
    """A back half in training: shared by all clients, or of one."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    stream: DropoutStream


class _ServerTrainer:
    """The server's side of a round: back halves, their optimizers, and graphs that wait for a loss."""

    def __init__(self, method: Split, cohort: Cohort, back: Tensors) -> None:
        self.method, self.cohort, self.back = method, cohort, back
        self.model, self.server = method.back, method.server
        self.wire = _wire(self.server, method.settings)
        self.parallel = method.settings.server == "parallel"
        clients = cohort.clients
        if self.parallel:
            self.copies = {client: self._copy(client) for client in clients}
        else:
            self.copies = dict.fromkeys(clients, self._copy(SERVER))
        self.waiting: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        training = self.server.training
        self.bounds = {
            client: training.work(rows, self.server.participations).most_steps(
                rows, training.batch_size
            )
            for client, rows in cohort.sizes.items()
        }

    def _copy(self, client: int) -> _Copy:
        parameters = self.model.parameters_of(self.back)
        optimizer = make_optimizer(parameters, self.server.training, self.cohort.learning_rate)
        seed = derive_seed(self.server.seed, "server dropout", client, self.cohort.round)
        return _Copy(parameters, optimizer, DropoutStream(seed, self.model))

    def learn(self, replies: Sequence[Reply]) -> list[_Learnt]:
        """Go forward to the loss and back with every client's batch, in client order."""
        learnt = []
        with self._measured():
            for reply in replies:
                activations, batch, last = self.wire.batch(reply.payload.tensors)
                batch = _on(batch, self.model.device)
                entered, mask, hidden = self._forward(reply.client, activations, batch)
                ending = self.model.ending
                assert ending is not None, "the head is here where labels are"
                ending.hidden, ending.last = hidden, last
                with self.copies[reply.client].stream.drawing():
                    loss, _ = self.server.objective.loss(ending, batch, None)
                    loss.backward()  # type: ignore[no-untyped-call]
                learnt += self._learnt(reply.client, entered, mask, float(loss.detach()))
        return learnt

    def continue_with(self, replies: Sequence[Reply]) -> dict[int, Tensor]:
        """U-shape: go forward through the server's blocks; return ``(tokens, hidden)`` a client."""
        result = {}
        with self._measured():
            for reply in replies:
                activations, batch, _ = self.wire.batch(reply.payload.tensors)
                batch = _on(batch, self.model.device)
                entered, mask, hidden = self._forward(reply.client, activations, batch)
                self.waiting[reply.client] = (entered, mask, hidden)
                result[reply.client] = hidden.detach()[mask]
        return result

    def learn_from_loss(self, replies: Sequence[Reply]) -> list[_Learnt]:
        """U-shape: go back through the server's blocks with the clients' gradients."""
        learnt = []
        encoding = self.method.settings.gradients
        with self._measured():
            for reply in replies:
                entered, mask, hidden = self.waiting.pop(reply.client)
                gradient = unpack_gradient(reply.payload, encoding)
                self.model.hold(self.copies[reply.client].parameters)
                torch.autograd.backward(hidden[mask], gradient.to(hidden.device))
                loss = reply.payload.numbers["loss"]
                learnt += self._learnt(reply.client, entered, mask, loss)
        self.waiting.clear()  # of clients that were lost on the way
        return learnt

    def average(self, weights: dict[int, float], finished: float) -> None:
        """Take the mean of the copies of those who came back; all go on with it."""
        own = [_values(self.copies[client]) for client in weights]
        if not self.parallel:
            if own:  # else all who had steps left are lost, and what was averaged before stands
                self.back = own[0]
            return
        self.back = _mean_with(own, list(weights.values()), self.back, finished)
        with torch.no_grad():
            for copy in self.copies.values():
                for name, parameter in copy.parameters.items():
                    parameter.copy_(self.back[name])

    def _forward(
        self, client: int, activations: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        copy = self.copies[client]
        self.model.hold(copy.parameters)
        entered = activations.to(self.model.device).requires_grad_()
        mask = batch.sequences.attention_mask
        with copy.stream.drawing():
            hidden = self.model(input_ids=entered, attention_mask=mask)
        return entered, mask.bool(), hidden

    def _learnt(self, client: int, entered: Tensor, mask: Tensor, loss: float) -> list[_Learnt]:
        """Return what the client gets, or nothing if its batch was of no use.

        The back half steps at once where nothing is clipped, and else in :meth:`personalise`.
        """
        copy = self.copies[client]
        assert entered.grad is not None, "the loss depends on the activations"
        gradients = [
            entered.grad,
            *(p.grad for p in copy.parameters.values() if p.grad is not None),
        ]
        if not (math.isfinite(loss) and all(map(is_finite, gradients))):
            copy.optimizer.zero_grad()
            self.cohort.rejected[client] = (
                f"the loss of its batch is {loss}, or has no finite gradient"
            )
            return []
        self.bounds[client] -= 1
        norm = 0.0
        if self.method.clips:
            norm = squared_norm(copy.parameters)
        else:
            update(copy.parameters, copy.optimizer, self.server.training)
        return [_Learnt(client, entered.grad[mask], loss, norm)]

    def confirm(self, learnt: Sequence[_Learnt], answers: Sequence[Reply]) -> None:
        """Make the steps that waited for the norms of the clients' halves, of those that answered."""
        if not self.method.clips:
            return
        norms = {reply.client: reply.payload.numbers["squared_norm"] for reply in answers}
        with self._measured():
            for one in learnt:
                copy = self.copies[one.client]
                if one.client in norms:
                    training, norm = self.server.training, norms[one.client]
                    update(copy.parameters, copy.optimizer, training, elsewhere=norm)
                else:
                    copy.optimizer.zero_grad()

    @contextmanager
    def _measured(self) -> Iterator[None]:
        with self.server.ledger.measure(self.cohort.round, SERVER, "train") as cost:
            before = self._flops()
            yield
            cost.flops = self._flops() - before

    def _flops(self) -> float:
        return self.model.flops


def pack_gradient(gradient: Tensor, encoding: Encoding) -> tuple[Tensors, float]:
    """Return a gradient as it travels, divided by a power of two so that it fits any encoding.

    Returns:
        The tensors, and the exponent. Of fp32 and bf16 no bit is lost.
    """
    largest = largest_value(gradient)
    exponent = math.frexp(largest)[1] if math.isfinite(largest) and largest > 0 else 0
    return pack_rows("gradient", gradient * 2.0**-exponent, encoding), float(exponent)


def unpack_gradient(payload: Payload, encoding: Encoding) -> Tensor:
    """Return what :func:`pack_gradient` packed, from a peer that is not trusted.

    Raises:
        MessageError: The exponent is out of the range of float32.
    """
    exponent = payload.numbers["exponent"]
    if abs(exponent) > LARGEST_EXPONENT:
        raise MessageError(
            f"a gradient's exponent is {exponent:g}, beyond {LARGEST_EXPONENT}", "out_of_range"
        )
    scale: float = 2.0**exponent
    return unpack_rows("gradient", payload.tensors, encoding) * scale


def _own_loss(
    model: ClientPart, objective: Objective, batch: Batch, hidden: Tensor
) -> tuple[Tensor, float]:
    """U-shape: norm, head and loss at the client; return the gradient of ``hidden`` and the loss."""
    mask = batch.sequences.attention_mask.bool()
    table = torch.zeros(*mask.shape, hidden.shape[-1], device=model.device)
    table[mask] = hidden.to(model.device)
    table.requires_grad_()
    ending = model.ending
    assert ending is not None, "in U-shape the head is the client's"
    ending.hidden = table
    if objective.head == "classification":
        ending.last = last_tokens(batch.sequences.input_ids, model.pad)
    loss, _ = objective.loss(ending, batch, None)
    loss.backward()  # type: ignore[no-untyped-call]
    assert table.grad is not None, "the loss depends on the activations"
    return table.grad[mask], float(loss.detach())


def _check_gradient(rows: Tensor, tokens: int) -> None:
    """Check that there is a finite row for each token that was sent.

    Raises:
        MessageError: The number differs, or a number is not finite.
    """
    if len(rows) != tokens:
        raise MessageError(f"gradient or activations of {len(rows)} tokens came back for {tokens}")
    if not is_finite(rows):
        raise MessageError(
            "gradient or activations that came back hold NaN or infinity", "not_finite"
        )


def _mean_with(
    tensors: list[Tensors], weights: list[float], before: Tensors, weight: float
) -> Tensors:
    """Return the weighted mean, in which what was before counts by ``weight``, if that is above 0."""
    if not weight:
        return weighted_mean(tensors, weights)
    return weighted_mean([*tensors, before], [*weights, weight])


def _wire(party: Client | ServerSide, settings: SplitSettings) -> SplitWire:
    model = party.model
    config: Any = model.model.config
    return SplitWire(
        settings,
        party.objective,
        rows=party.training.batch_size,
        max_length=party.max_length,
        hidden=int(config.hidden_size),
        width=party.width,
    )


def _front(client: Client) -> ClientPart:
    assert isinstance(client.model, ClientPart), (
        "assembly gives clients of this method a front half"
    )
    return client.model


def _values(copy: _Copy) -> Tensors:
    return {name: p.detach().cpu().clone() for name, p in copy.parameters.items()}


def _on(batch: Batch, device: torch.device) -> Batch:
    labels = None if batch.labels is None else batch.labels.to(device)
    return Batch(
        batch.rows, batch.sequences.to(device), batch.completion_tokens, batch.tokens, labels
    )
