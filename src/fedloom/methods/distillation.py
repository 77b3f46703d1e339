"""KD-FedLLM: clients and server teach each other by their logits on public data; no parameter travels.

Source: arXiv 2501.04436 (second framework), with the rules of FedMKT (Fan et al. 2024,
https://arxiv.org/abs/2406.02224) and the treatment of missing entries of arXiv 2509.01750. The order of
a round is a reconstruction after the former's description:

1. each client trains its own adapter on its own rows, and sends what it says about public rows;
2. the server puts the answers together and distils them into its own model, which may be larger or of
   another architecture;
3. the server sends back what its model says now (or the clients' consensus), and clients distil that.

Public rows are drawn from (seed, "public", round), which every party knows, so no ids travel. A client
keeps its adapter from round to round.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import MappingProxyType
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedloom.accounting.costs import SERVER
from fedloom.accounting.traffic import LogitTraffic, Traffic
from fedloom.aggregation.soft_labels import Rule, SoftLabels, combine, joined, likeliest, shortened
from fedloom.data.batching import epoch_batches
from fedloom.data.client_rows import TokenShare
from fedloom.data.public import PublicRows
from fedloom.errors import MessageError
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import ADAPTER, LEARNING_RATE, TRAIN_REPLY_NUMBERS
from fedloom.methods.contract.checks import TASKS, tasks_only
from fedloom.methods.contract.client import Client, Handler
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import FirstRound, Method, ModelSpec, Reveal, Variant
from fedloom.methods.declaration import TOGETHER, Absence, Declaration, no, yes
from fedloom.models.adapters import AdapterModel
from fedloom.objectives.base import Head
from fedloom.objectives.distillation import Distillation, logits_in_parts
from fedloom.randomness import generator
from fedloom.settings.schema import NamedSettings, Of
from fedloom.tensors import State, Tensors
from fedloom.training.layout import scoring_budget
from fedloom.training.passes import Layout
from fedloom.training.results import reported
from fedloom.training.settings import Part, TrainingSettings, Work
from fedloom.training.steps import train_locally
from fedloom.wire.messages import Exchange, Payload
from fedloom.wire.row_codecs import Encoding, pack_rows, row_specs, unpack_rows
from fedloom.wire.schema import Schema, TensorSpec, prefixed

VALUES, INDICES, COUNTS = "values", "indices", "counts"
"""Names in the payloads: log-probabilities, which entries they are of, and how many a position has."""

DISTIL = "distil_"
"""Before the names of what clients report of learning from the server."""

LEAST, LEAST_SURE = -1e4, 1e-3
"""Bounds of an honest log-probability, rounding included."""


class DistillationSettings(NamedSettings):
    """``[method] name = "distillation"``."""

    name: Literal["distillation"] = "distillation"
    rule: Rule = "mean"
    """How the server puts answers together: mean of logits or of probabilities (mean_prob), weighted by
    rows; by each answer's entropy or confidence; or the answer with the lowest loss, text by text, which
    needs public.labelled."""
    temperature: float = Field(default=2.0, gt=0)
    """T of the distillation loss."""
    teacher_share: Annotated[float, Of("public.labelled", (True,))] = Field(default=0.5, gt=0, le=1)
    """Share of the teacher in the loss on labelled public rows, the labels having the rest; on unlabelled
    ones the teacher is alone."""
    top_k: int | None = Field(default=None, ge=1)
    """Logits kept of each position (default: all)."""
    top_mass: float | None = Field(default=None, gt=0, lt=1)
    """Of each position only as many logits (top_k at most) as reach this probability."""
    encoding: Encoding = "fp16"
    """Of a logit on the wire: fp32, bf16, fp16, or int8 with a scale a position."""
    down: Literal["server", "consensus"] = "server"
    """What clients learn from: the server's model as it is then, or the clients' answers combined."""
    rows_per_round: int | None = Field(default=None, ge=1)
    """Public rows of a round, drawn anew (default: all of them)."""
    server_epochs: int = Field(default=5, ge=1)
    """Passes of the server over the round's public rows."""
    client_epochs: Annotated[int, Of("training.amount_per", ("model",))] = Field(default=5, ge=1)
    """Passes of a client over them."""
    server_model: str | None = None
    """Backbone of the server (default: model.path)."""
    server_rank: int | None = Field(default=None, ge=1)
    """LoRA rank of the server (default: adapter.rank)."""


class DistillationMethod(Method):
    """Logits travel: up what clients say, down what the server's model has learnt from it."""

    declares = Declaration(
        "KD-FedLLM",
        "https://arxiv.org/abs/2501.04436",
        "reconstructed",
        "rules of FedMKT (2406.02224)",
        "KD-FedLLM",
        "logits on public rows, up and down",
        "an adapter of its own",
        secure_aggregation=no("answers are put together text by text"),
        client_privacy=no("an answer is not a change of parameters"),
        row_privacy=yes("logits are those of a model that private steps made"),
        asynchronous=TOGETHER,
        compression=no("logits have an encoding of their own: method.encoding"),
        absence=Absence(
            "the teacher is made of those that answered",
            "learns from the next round's teacher, with its own adapter as it was",
            "is in no teacher",
        ),
    )
    reveals: frozenset[Reveal] = frozenset({"logits"})

    own_models = True
    needs_public = True
    mixed_models = True
    shares_parameters = False
    taken = (
        "rule",
        "temperature",
        "teacher_share",
        "top_k",
        "top_mass",
        "encoding",
        "down",
        "rows_per_round",
        "server_epochs",
    )
    bounded = MappingProxyType({"client_epochs": "max_steps", "server_rank": "max_rank"})
    named_models = ("server_model",)

    def __init__(self, settings: DistillationSettings) -> None:
        """Keep the settings."""
        self.settings = settings

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also what the rule, ranks and the server's own model do not go with."""
        yield from super().check(view)
        yield from tasks_only(view)
        method, adapter = view.method, view.adapter
        labelled = view.public is not None and view.public.labelled
        if method.rule == "lowest_loss" and not labelled:
            yield 'method.rule = "lowest_loss" needs public.labelled = true'
        if adapter is not None and adapter.kind != "lora":
            for name, group in view.groups.items():
                if group.rank:
                    yield f"clients.groups.{name}.rank is a setting of lora"
            if method.server_rank:
                yield "method.server_rank is a setting of lora"
        if adapter is not None and adapter.start is not None:
            for name in ("server_model", "server_rank"):
                if getattr(method, name) is not None:
                    yield f"adapter.start is of one model and rank: leave method.{name} out"

    @classmethod
    def variants(cls, own: NamedSettings | None, view: ExperimentView) -> Iterator[Variant]:
        """Yield it as it is set, or with the likeliest tokens alone."""
        if view.objective_name not in TASKS:
            return
        logits = DistillationSettings(top_k=None if view.objective_name == "classification" else 32)
        logits = own if isinstance(own, DistillationSettings) else logits
        kept = f"top {logits.top_k} logits" if logits.top_k else "all logits"
        remark = "It needs public rows, and learns no more than these can show."
        yield Variant(f"KD-FedLLM, {kept}, {logits.encoding}", logits, remark=remark)

    def server_model(self, spec: ModelSpec) -> ModelSpec:
        """Return the server's own, where the settings name one."""
        own = self.settings
        return ModelSpec(own.server_model or spec.path, own.server_rank or spec.rank)

    def compute(self, first: FirstRound) -> float:
        """Add scoring the public rows once, and learning from them."""
        assert first.public is not None, "the method's rows have been read"
        share = self.rows_of_round(first.public, first.seed, 1).share
        rows, training = np.arange(len(share)), first.training
        with torch.no_grad():
            scoring = first.passes(share, rows, scoring=True)
        order = generator(first.seed, "distil batches", first.client, 1)
        epochs = self.settings.client_epochs
        batches = epoch_batches(len(share), training.batch_size, order, epochs=epochs)
        learning = sum(first.passes(share, indices) for indices in batches)
        return first.own_rows() + (scoring + learning)

    def round(self, state: State, cohort: Cohort) -> Round:
        """Collect answers, learn from them, send back what is known then."""
        server, settings = self.server, self.settings
        assert server.public is not None, "assembly gives public rows to methods that need them"
        public = self.rows_of_round(server.public, server.seed, cohort.round)
        head = server.objective.head
        wire = SoftLabelWire(settings, public)
        replies = yield Exchange.broadcast(
            "train",
            cohort.round,
            cohort.clients,
            Payload(numbers={"learning_rate": cohort.learning_rate}),
            Schema(numbers=(LEARNING_RATE,)),
            Schema(wire.specs, TRAIN_REPLY_NUMBERS, cohort.reported),
            lambda client, payload: wire.check(payload.tensors),
        )
        with server.ledger.measure(cohort.round, SERVER, "train") as cost:
            before = server.model.flops
            consensus = combine(
                [wire.unpack(reply.payload.tensors) for reply in replies],
                [reply.payload.numbers["examples"] for reply in replies],
                settings.rule,
                labels=true_entries(public, head),
                groups=_groups(public.share),
            )
            server.model.write(state.tensors)
            result = train_locally(
                server.model,
                replace(public.share, teacher=consensus),
                self._objective(public, head),
                server.training,
                learning_rate=cohort.learning_rate,
                seed=server.seed,
                client=SERVER,
                round=cohort.round,
                work=Work(epochs=settings.server_epochs),
                purpose="distil ",
            )
            if settings.down == "server":
                known = answers(server.model, public, head, settings, server.training)
            else:
                known = shortened(consensus, settings.top_k, settings.top_mass)
            tensors = server.model.read()
            cost.flops = server.model.flops - before
            cost.tokens, cost.examples, cost.steps = result.tokens, result.examples, result.steps
        yield Exchange.broadcast(
            "distil",
            cohort.round,
            tuple(reply.client for reply in replies),
            Payload(wire.pack(known), {"learning_rate": cohort.learning_rate}),
            Schema(wire.specs, (LEARNING_RATE,)),
            Schema(metrics=prefixed(DISTIL, reported(self._objective(public, head)))),
        )
        return State(tensors)

    def trainings_of(self, round: int, rounds: int) -> int:
        """Train on the client's own rows, then on the public ones."""
        return 2

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train, "distil": self._distil}

    def traffic(self, adapter: Tensors) -> Traffic:
        """Return the closed form for the public rows of a round."""
        server, settings = self.server, self.settings
        assert server.public is not None, "assembly gives public rows to methods that need them"
        wire = SoftLabelWire(settings, self.rows_of_round(server.public, server.seed, 1))
        index = wire.index.itemsize if wire.sparse else 0
        return LogitTraffic(wire.positions, wire.k, settings.encoding, index, wire.adaptive)

    def load(self, client: Client, payload: Payload) -> None:
        """Write the client's own adapter, or the initial one before its first training."""
        client.model.write(client.store.get(ADAPTER, client.initial))

    def _train(self, client: Client, payload: Payload) -> Payload:
        self.load(client, payload)
        result = client.train(payload.numbers["learning_rate"], part=Part(0, 2))
        client.store[ADAPTER] = client.model.read()
        public, wire = self._client_rows(client)
        said = answers(client.model, public, client.objective.head, self.settings, client.training)
        numbers = {"examples": len(client.share)}
        return Payload(wire.pack(said), numbers, result.metrics)

    def _distil(self, client: Client, payload: Payload) -> Payload:
        public, wire = self._client_rows(client)
        wire.check(payload.tensors)
        self.load(client, payload)
        client.last = train_locally(
            client.model,
            replace(public.share, teacher=wire.unpack(payload.tensors)),
            self._objective(public, client.objective.head),
            client.training,
            learning_rate=payload.numbers["learning_rate"],
            seed=client.seed,
            client=client.id,
            round=client.round,
            work=self._distilling(client),
            purpose="distil ",
            on_step=client.on_step,
        )
        client.store[ADAPTER] = client.model.read()
        metrics = client.last.metrics
        return Payload(metrics={DISTIL + name: value for name, value in metrics.items()})

    def _distilling(self, client: Client) -> Work:
        """Return how much a client distils: what is left of its round, or passes over public rows."""
        if client.training.amount_per == "round":
            return client.due(Part(1, 2))
        return Work(epochs=self.settings.client_epochs)

    def _client_rows(self, client: Client) -> tuple[PublicRows, SoftLabelWire]:
        assert client.public is not None, "the engine gives clients the public rows"
        public = self.rows_of_round(client.public, client.seed, client.round)
        return public, SoftLabelWire(self.settings, public)

    def rows_of_round(self, public: PublicRows, seed: int, round: int) -> PublicRows:
        """Return the public rows of a round, the same for every party."""
        total = len(public.share)
        count = self.settings.rows_per_round or total
        if count >= total:
            return public
        drawn = generator(seed, "public", round=round).choice(total, count, replace=False)
        return replace(public, share=public.share.take(np.sort(drawn)))

    def _objective(self, public: PublicRows, head: Head) -> Distillation:
        settings = self.settings
        return Distillation(
            head, settings.temperature, settings.teacher_share, labelled=public.labelled
        )


class SoftLabelWire:
    """The form in which knowledge about N positions travels.

    Whole: N rows of values. The k likeliest: the same with their indices, in the smallest integers that
    hold the width. Different numbers of them: one list of values and indices, and a count a position.
    """

    def __init__(self, settings: DistillationSettings, public: PublicRows) -> None:
        """Fix the schema for knowledge about these rows."""
        width = public.width
        self.encoding: Encoding = settings.encoding
        self.positions, self.width = int(public.share.positions[-1]), width
        self.k = min(settings.top_k or width, width)
        self.adaptive = settings.top_mass is not None
        self.sparse = self.adaptive or self.k < width
        self.index = index_dtype(width)
        self.specs = self._specs()

    def pack(self, soft_labels: SoftLabels) -> Tensors:
        """Return what travels."""
        if not self.sparse:
            return pack_rows(VALUES, soft_labels.values, self.encoding)
        assert soft_labels.indices is not None, "knowledge of a part has indices"
        if not self.adaptive:
            values = pack_rows(VALUES, soft_labels.values, self.encoding)
            return {**values, INDICES: soft_labels.indices.to(self.index)}
        assert soft_labels.present is not None, "rows of different lengths say which entries count"
        present = soft_labels.present
        packed = pack_rows(VALUES, soft_labels.values.masked_fill(~present, 0.0), self.encoding)
        counts = present.sum(-1).to(torch.int32)
        indices = soft_labels.indices[present].to(self.index)
        return {**packed, VALUES: packed[VALUES][present], INDICES: indices, COUNTS: counts}

    def unpack(self, tensors: Tensors) -> SoftLabels:
        """Return what :meth:`pack` packed; tensors that passed :meth:`check`."""
        if not self.sparse:
            values = unpack_rows(VALUES, tensors, self.encoding)
            return SoftLabels(self.width, values.log_softmax(-1))
        if not self.adaptive:
            values = unpack_rows(VALUES, tensors, self.encoding)
            return SoftLabels(self.width, values, tensors[INDICES].to(torch.int64))
        counts = tensors[COUNTS].long()
        present = torch.arange(self.k).unsqueeze(0) < counts.unsqueeze(1)
        values = torch.zeros(self.positions, self.k, dtype=tensors[VALUES].dtype)
        indices = torch.zeros(self.positions, self.k, dtype=torch.int64)
        values[present] = tensors[VALUES]
        indices[present] = tensors[INDICES].to(torch.int64)
        whole = unpack_rows(VALUES, {**tensors, VALUES: values}, self.encoding)
        return SoftLabels(self.width, whole, indices, present)

    def check(self, tensors: Tensors) -> None:
        """Check what a schema cannot say.

        Raises:
            MessageError: Values that are no log-probabilities, counts that do not add up, entries out of
                order, twice or beyond the width.
        """
        if self.adaptive:
            self._check_counts(tensors)
        known = self.unpack(tensors)
        if float(known.values.max()) > LEAST_SURE or float(known.values.min()) < LEAST:
            raise MessageError(
                f"logits: a log-probability is not between {LEAST:g} and 0", "out_of_range"
            )
        if known.indices is not None:
            self._check_indices(known.indices, known.present)

    def _check_counts(self, tensors: Tensors) -> None:
        counts, entries = tensors[COUNTS].long(), len(tensors[VALUES])
        if int(counts.min()) < 1 or int(counts.max()) > self.k or int(counts.sum()) != entries:
            raise MessageError(
                f"logits: the counts must be 1 to {self.k} and add up to the {entries} values sent"
            )
        if len(tensors[INDICES]) != entries:
            raise MessageError(f"logits: {len(tensors[INDICES])} indices for {entries} values")

    def _check_indices(self, indices: Tensor, present: Tensor | None) -> None:
        if int(indices.min()) < 0 or int(indices.max()) >= self.width:
            raise MessageError(
                f"logits: index {int(indices.max())} is not below the width of {self.width}",
                "out_of_range",
            )
        rising = indices[:, 1:] > indices[:, :-1]
        if present is not None:
            rising = rising | ~present[:, 1:]
        if not bool(rising.all()):
            raise MessageError("logits: the indices of a position must rise and occur once")

    def _specs(self) -> tuple[TensorSpec, ...]:
        n, k = self.positions, self.k
        if not self.adaptive:
            values = row_specs(VALUES, n, k, self.encoding)
            return (*values, TensorSpec(INDICES, (n, k), self.index)) if self.sparse else values
        flat = row_specs(VALUES, n, k, self.encoding)
        values = (TensorSpec(VALUES, (n * k,), flat[0].dtype, ragged=True), *flat[1:])
        return (
            *values,
            TensorSpec(INDICES, (n * k,), self.index, ragged=True),
            TensorSpec(COUNTS, (n,), torch.int32),
        )


def index_dtype(width: int) -> torch.dtype:
    """Return the smallest unsigned integers that number ``width`` entries (int32 above 65536)."""
    if width <= 1 << 8:
        return torch.uint8
    return torch.uint16 if width <= 1 << 16 else torch.int32


def answers(
    model: AdapterModel,
    public: PublicRows,
    head: Head,
    settings: DistillationSettings,
    training: TrainingSettings,
) -> SoftLabels:
    """Return what the adapter that ``model`` holds says about public rows, no more than is kept.

    Args:
        model: Of a client or the server.
        public: The rows, as this model reads them.
        head: What of.
        settings: How many entries of a position are kept.
        training: What a pass holds.
    """
    starts = public.share.positions
    layout = Layout(model, public.share, scoring_budget(training, model))
    parts, places = [], []
    with model.evaluating():
        for indices, batch in layout.everything():
            places += [np.arange(starts[row], starts[row + 1]) for row in indices]
            for logits in logits_in_parts(model, batch, head):
                logps = logits[:, : public.width].float().log_softmax(-1).cpu()
                parts.append(likeliest(logps, settings.top_k, settings.top_mass))
    return joined(parts).take(torch.from_numpy(np.concatenate(places).argsort()))


def true_entries(public: PublicRows, head: Head) -> Tensor | None:
    """Return ``(positions,)``: the class or token that is true at each; ``None`` where nobody says."""
    tokens = public.share.tokens
    if not public.labelled:
        return None
    if head == "classification":
        return torch.from_numpy(tokens.labels)
    return torch.from_numpy(tokens.tokens[tokens.trained].astype(np.int64))


def _groups(public: TokenShare) -> Tensor:
    """Return ``(positions,)``: which row each lies in."""
    lengths = np.diff(public.positions)
    return torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
