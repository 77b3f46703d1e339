"""FedDyn: a linear term at each client makes its minimum that of the whole federation.

Source: Acar et al. 2021, "Federated Learning Based on Dynamic Regularization",
https://arxiv.org/abs/2111.04263, algorithm 1. Client k of N minimises

    F_k(v) - <g_k, v> + alpha/2 ||v - w_t||^2,   then   g_k <- g_k - alpha (w_k - w_t),

and from the answers of S_t the server takes

    h <- h - alpha/N sum_{S_t} (w_k - w_t),   w_{t+1} = mean_{S_t} w_k - h/alpha.

Both are kept as sums of moves, m_k = -g_k / alpha and M = -h / alpha, as in the authors' code: the
client's problem is then FedProx's around w_t - m_k, up to a constant, and w_{t+1} = mean_{S_t} w_k + M.
Clients count alike. N counts all clients of the federation, present or not, those that left included,
whose m_k stays in M: N M is the sum of all m_k, but for what privacy.sum_bound cuts off. The model to
evaluate and to save is the mean of S_t, as in the paper's experiments; w_t alone is sent.

It is derived for clients that solve their problem. Where they make a few steps, alpha (w - w_t + m_k)
moves them little, M is a momentum that nothing damps, and w_t can swing: raise alpha or the steps of a
round. The penalty is part of the gradient, not of the weight decay, so that AdamW scales it with the
rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from fedloom.aggregation.server_optimizers import difference
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import (
    ADAPTER,
    proximal_gradient,
    training_exchange,
)
from fedloom.methods.contract.checks import whole_answers
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import ADAPTERS_ALONE, Method
from fedloom.methods.declaration import (
    CODED_CHANGES,
    DRIFT,
    OWN_STEPS,
    SUMMED,
    Absence,
    Declaration,
    no,
)
from fedloom.reports.sections.spec import SectionSpec
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors, join_parts, part_of, zeros_like
from fedloom.wire.messages import Payload
from fedloom.wire.schema import amount

MOVES = "moves"
"""Part of the state (M), and slot of a client (m_k)."""

MEAN_ROWS = amount("mean_rows", 2.0**40)
"""Training rows of a client on average, sent to clients whose alpha is scaled by it."""


class FedDynSettings(NamedSettings):
    """``[method] name = "feddyn"``."""

    name: Literal["feddyn"] = "feddyn"
    alpha: float = Field(default=0.01, gt=0)
    """Strength of the quadratic term, above 0 (the authors' experiments: 0.001 to 0.1)."""
    scaled: bool = False
    """Whether a client's alpha is multiplied by the mean number of rows over its own, as in the authors'
    code; the paper has one alpha."""


class FedDyn(Method):
    """Averages, with the sum of all moves added to what is sent."""

    declares = Declaration(
        "FedDyn",
        "https://arxiv.org/abs/2111.04263",
        "adapted",
        "on the adapter; a fixed amount of work in place of exact minima",
        "FedLLM",
        "the adapter, down and up",
        "the sum m_k of its moves",
        secure_aggregation=SUMMED,
        client_privacy=no("h adds up all changes, and would add up their noise"),
        row_privacy=OWN_STEPS,
        asynchronous=no("h and g_k move by the same change, from the adapter that all began with"),
        compression=CODED_CHANGES,
        absence=Absence(
            "h moves by the changes of those that answered, over N, the number of all clients (as in the "
            "paper, not of those there): N h stays the sum of all g_k",
            "trains with the g_k that it kept (0 at first) and today's adapter",
            "N stays; its last g_k stays in h",
        ),
        problem=DRIFT,
    )
    reveals = ADAPTERS_ALONE
    taken = ("alpha", "scaled")
    sections = (
        SectionSpec(
            "line_chart",
            "FedDyn's correction",
            "Norm of h / alpha, by which what clients are sent differs from the mean of their answers. "
            "It levels off where clients agree on a minimum; if it grows, alpha or the work of a round "
            "is too small.",
            "correction",
        ),
    )
    by_rows = False

    def __init__(self, settings: FedDynSettings) -> None:
        """Keep the settings."""
        self.settings = settings

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also that the server cannot shorten answers."""
        yield from super().check(view)
        yield from whole_answers(
            view, "has clients keep a sum of what they sent, which is the server's as well"
        )

    def initial_state(self, adapter: Tensors) -> State:
        """Start with M = 0."""
        return State(join_parts(adapter=adapter, moves=zeros_like(adapter)))

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send mean + M; M moves by the mean change, times the share that answered."""
        adapter, moves = self.shared(state), part_of(state.tensors, MOVES)
        sent = {name: tensor + moves[name] for name, tensor in adapter.items()}
        rows = cohort.presence.rows.values()
        more = {MEAN_ROWS: sum(rows) / len(rows)} if self.settings.scaled else {}
        replies = yield training_exchange(cohort, sent, more, by_rows=False)
        share = len(replies.answered) / len(cohort.presence.enrolled)  # |S| / N
        mean = replies.mean(by="clients")
        moves = {n: m + share * (mean[n] - sent[n]) for n, m in moves.items()}
        squares = sum(float(tensor.double().square().sum()) for tensor in moves.values())
        cohort.details["correction"] = squares**0.5
        return State(join_parts(adapter=mean, moves=moves))

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train}

    def shared(self, state: State) -> Tensors:
        """Return the mean of the last round's answers."""
        return part_of(state.tensors, ADAPTER)

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        start = payload.tensors
        own = client.store.get(MOVES) or zeros_like(start)
        alpha = self.settings.alpha
        if self.settings.scaled:
            alpha *= payload.numbers[MEAN_ROWS.name] / len(client.share)
        client.model.write(start)
        device = client.model.device
        centre = {name: tensor.to(device) for name, tensor in difference(start, own).items()}
        result = yield from client.training_steps(
            payload.numbers["learning_rate"], before_step=proximal_gradient(centre, alpha)
        )
        reply = Payload(client.model.read(), {"examples": len(client.share)}, result.metrics)
        moved = difference(client.as_read(reply).tensors, start)  # N M stays the sum of all m_k
        client.store[MOVES] = {name: tensor + moved[name] for name, tensor in own.items()}
        return reply
