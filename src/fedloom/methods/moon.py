"""MOON: a client's hidden states are held near those of the shared model and away from its own last ones.

Source: Li, He and Song 2021, "Model-Contrastive Federated Learning", https://arxiv.org/abs/2103.16257,
algorithm 1 and equation 3: a client minimises F_k(w) + mu l, with l the contrastive term
(``objectives/contrastive.py``) of representations of each text by the model in training, the shared
model that it received, and the model that it sent last. The server is FedAvg's.

Adapted, by choices of ours: z is the mean of the last hidden states where completion tokens are
predicted, or of a classifier the one at a text's last token, without the paper's projection head; the
two other models are the same backbone under other adapters, without dropout. A client that has sent
nothing yet has no negatives, l = 0, and trains as in FedAvg. Later a step costs a forward pass more for
the shared model, and one for each earlier model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedloom.data.batch import Predicting, Sequences
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import show_reported, training_exchange
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import ADAPTERS_ALONE, Method
from fedloom.methods.declaration import DRIFT, Absence, averaging, no
from fedloom.models.adapters import AdapterModel
from fedloom.objectives.contrastive import contrastive_loss, text_means
from fedloom.reports.sections.spec import SectionSpec
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors
from fedloom.training.results import BALANCE, LocalResult
from fedloom.training.steps import Training, train_locally
from fedloom.wire.messages import Payload
from fedloom.wire.schema import amount

PREVIOUS = "previous"
"""Slot of the client store with the adapter that it sent last; earlier ones have a number behind."""

CONTRAST = "contrastive_loss"
"""Metric: l, the mean over the texts of the round."""


class MOONSettings(NamedSettings):
    """``[method] name = "moon"``."""

    name: Literal["moon"] = "moon"
    mu: float = Field(default=1.0, ge=0)
    """Weight of the contrastive term (the authors' code: 1); 0 is FedAvg."""
    temperature: float = Field(default=0.5, gt=0)
    """tau, above 0 (paper: 0.5)."""
    buffer: int = Field(default=1, ge=1, le=8)
    """Earlier adapters that a client keeps as negatives, the last ones (paper: 1); each costs a forward
    pass a step."""


class MOON(Method):
    """FedAvg with a contrastive term at the clients."""

    declares = averaging(
        "MOON",
        "https://arxiv.org/abs/2103.16257",
        "adapted",
        "mean hidden states in place of a projection head",
        keeps="the adapter that it sent last",
        row_privacy=no("the contrastive term reads hidden states of three models in each step"),
        absence=Absence(
            "the mean is over those that answered; what it keeps stays as it is",
            "trains with the adapter that it sent last as its negative; the first time, without the term",
            "is in no mean",
        ),
        problem=DRIFT,
    )
    reveals = ADAPTERS_ALONE
    taken = ("mu", "temperature", "buffer")
    sections = (
        SectionSpec(
            "line_chart",
            "MOON's contrastive term",
            "Mean of l over clients' texts: 0 of those without an earlier adapter; ln 2 where the shared "
            "model and one earlier are alike.",
            CONTRAST,
        ),
    )
    averages = True

    def __init__(self, settings: MOONSettings) -> None:
        """Keep the settings."""
        self.settings = settings

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also that there must be texts whose hidden states can be compared."""
        yield from super().check(view)
        if view.adapter is not None and view.adapter.kind in ("experts", "submixture"):
            yield (
                f"adapter.kind = {view.adapter.kind!r}: method.name = {view.name!r} adds a term to the "
                'loss where mixtures have theirs: use adapter.kind = "lora"'
            )

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send the adapter, average what comes back."""
        replies = yield training_exchange(cohort, state.tensors, metrics=(amount(CONTRAST),))
        show_reported(cohort, replies, CONTRAST)
        return State(self.averaged(replies, cohort, state.tensors, noted=True))

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train}

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        client.model.write(payload.tensors)
        slots = [PREVIOUS, *(f"{PREVIOUS} {age}" for age in range(1, self.settings.buffer))]
        earlier = [client.store[slot] for slot in slots if slot in client.store]
        driver = None
        if earlier and self.settings.mu:
            driver = Contrasting([payload.tensors, *earlier], self.settings)
        result = yield from client.training_steps(payload.numbers["learning_rate"], driver=driver)
        trained = client.model.read()
        for slot, kept in zip(slots, [trained, *earlier], strict=False):
            client.store[slot] = kept
        metrics = {CONTRAST: 0.0, **result.metrics}
        return Payload(trained, {"examples": len(client.share)}, metrics)


@dataclass
class Contrasting:
    """Makes the steps of one training with the contrastive term in the loss.

    Attributes:
        others: The adapter that was received, then the client's earlier ones.
        settings: Weight and temperature.
    """

    others: Sequence[Tensors]
    settings: MOONSettings

    def train(self, training: Training) -> LocalResult:
        """Carry out a training; the loss it reports is without the term, which is beside it."""
        model = ContrastedModel(training.model, self.others, self.settings)
        shared, model.shared_prompts = model.shared_prompts, False
        try:
            result = train_locally(
                model, training.share, training.objective, training.settings, **training.options
            )
        finally:
            model.shared_prompts = shared
        metrics = dict(result.metrics)
        added = metrics.pop(BALANCE.name, 0.0)
        if "loss" in metrics:
            metrics["loss"] -= added
        return replace(result, metrics={**metrics, CONTRAST: added / self.settings.mu})


@dataclass
class Pass:
    """A pass with gradients.

    Attributes:
        states: z, ``(texts, width)``.
        again: Returns them by what the model holds then.
    """

    states: Tensor
    again: Callable[[], Tensor]


class ContrastedModel(AdapterModel):
    """A model whose loss has the contrastive term: a second view of an :class:`AdapterModel`.

    Attributes:
        others: Adapters whose hidden states are compared with, the received one first.
        settings: Weight and temperature.
        passes: Those with gradients since the term was last asked for.
    """

    __slots__ = ("others", "passes", "settings")  # all else is the model's own
    alone = True

    def __init__(
        self, model: AdapterModel, others: Sequence[Tensors], settings: MOONSettings
    ) -> None:
        """Share what the model has."""
        self.__dict__ = model.__dict__
        self.others, self.settings = others, settings
        self.passes: list[Pass] = []

    def predicting(self, sequences: Sequences) -> Predicting | None:
        """Read sequences as far as the output layer, and note their hidden states."""
        found = super().predicting(sequences)
        if found is None:
            return None

        def again() -> Tensor:
            read = AdapterModel.predicting(self, sequences)
            assert read is not None, "it was not before"
            return text_means(read.states, sequences.completion_mask)

        if torch.is_grad_enabled():
            means = text_means(found.states, sequences.completion_mask)
            self.passes.append(Pass(means, again))
        return found

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        """Run the model, and note the hidden states at each text's last token."""

        def run() -> tuple[Any, Tensor]:
            output = AdapterModel.__call__(
                self,
                input_ids=input_ids,
                attention_mask=attention_mask,
                output_hidden_states=True,
                **options,
            )
            states = output.hidden_states[-1][:, -input_ids.shape[1] :]  # after virtual tokens
            rows = torch.arange(len(states), device=states.device)
            return output, states[rows, attention_mask.sum(-1) - 1]

        output, last = run()
        if torch.is_grad_enabled():
            self.passes.append(Pass(last, lambda: run()[1]))
        return output

    def penalty(self) -> Tensor | None:
        """Return mu l, the mean over the texts of the passes since it was last asked for."""
        passes, self.passes = self.passes, []
        if not passes:
            return None
        compared: list[list[Tensor]] = [[] for _ in passes]
        for other in self.others:
            with self.reference(other):
                for own, found in zip(passes, compared, strict=True):
                    found.append(own.again())
        losses = [
            contrastive_loss(own.states, shared, previous, self.settings.temperature)
            for own, (shared, *previous) in zip(passes, compared, strict=True)
        ]
        return self.settings.mu * torch.cat(losses).mean()
