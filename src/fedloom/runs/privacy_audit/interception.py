"""What clients send, as the server sees it: an engine of which each answer is looked at as it passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedloom.engines.in_process import SimulationEngine
from fedloom.errors import MessageError
from fedloom.federation.engine import Engine
from fedloom.federation.protocol import EVALUATE
from fedloom.models.adapters import AdapterModel
from fedloom.tensors import Tensors
from fedloom.training.synthetic_inputs import SYNTHETIC_INPUTS
from fedloom.wire.messages import Answer, Exchange

CLIENTS_A_ROUND = 4
"""Clients whose answers are kept in a round, the first that are asked."""


@dataclass(frozen=True)
class Update:
    """What a client sent in answer to one request.

    Attributes:
        round: From 1.
        client: Its id.
        action: Of the request.
        changes: By name, the tensors sent less those received.
        received: What the client was sent.
        tokens: Distinct token ids that it trained on: the truth.
        steps: Optimizer steps.
    """

    round: int
    client: int
    action: str
    changes: Tensors
    received: Tensors
    tokens: frozenset[int]
    steps: int


@dataclass
class InterceptingEngine:
    """Passes requests and answers on, and keeps what is in them.

    Attributes:
        engine: Carries them.
        local: The clients, in this process.
        wanted: Names of tensors that are kept.
        updates: What was kept so far.
        unreadable: Answers that hold no tensors that could be read, by reason.
    """

    engine: Engine
    local: SimulationEngine
    wanted: Set[str]
    updates: list[Update] = field(default_factory=list)
    unreadable: set[str] = field(default_factory=set)

    def __getattr__(self, name: str) -> Any:
        """Return what the engine has."""
        return getattr(self.engine, name)

    def exchange(self, exchange: Exchange) -> Iterator[Answer]:
        """Carry requests to clients, and keep the first answers of training."""
        if exchange.action == EVALUATE:
            yield from self.engine.exchange(exchange)
            return
        kept = sorted(exchange.requests)[:CLIENTS_A_ROUND]
        models = {id(own.model): own.model for own in self.local.resources.values()}
        with _reading(list(models.values())) as read:
            for answer in self.engine.exchange(exchange):
                if answer.client in kept and answer.data is not None:
                    self._keep(exchange, answer.client, answer.data, frozenset(read))
                read.clear()
                yield answer

    def _keep(self, exchange: Exchange, client: int, data: bytes, read: frozenset[int]) -> None:
        """Keep what an answer changes."""
        try:
            sent = exchange.sent_to(client)
            replied = exchange.read_reply(client, data).tensors
        except MessageError as error:
            self.unreadable.add(str(error))
            return
        changes = {}
        for name, tensor in replied.items():
            if name.rpartition("/")[2] not in self.wanted:
                continue
            if not tensor.is_floating_point():
                self.unreadable.add(f"{name} is of integers")
                continue
            own = sent.get(name)
            whole = exchange.replies_are_changes or own is None or own.shape != tensor.shape
            changes[name] = tensor.clone() if whole or own is None else tensor - own
        if changes:
            received = {
                n: t.clone() for n, t in sent.items() if n.rpartition("/")[2] in self.wanted
            }
            steps = sum(
                own.steps
                for own in self.local.ledger.costs
                if (own.round, own.client, own.phase) == (exchange.round, client, exchange.action)
            )
            whole_rows = SYNTHETIC_INPUTS in changes
            tokens = self._of_rows(client) if whole_rows else self._truth(client, read)
            self.updates.append(
                Update(exchange.round, client, exchange.action, changes, received, tokens, steps)
            )

    def _of_rows(self, client: int) -> frozenset[int]:
        """Return the tokens of all rows of a client, of which synthetic inputs are made."""
        return frozenset(self.local.shares[client].tokens.tokens.tolist())

    def _truth(self, client: int, read: frozenset[int]) -> frozenset[int]:
        """Return the tokens that were read, without those that a row of the client only ends with.

        No gradient passes through the last token of a row, as nothing is predicted from it.
        """
        tokens = self.local.shares[client].tokens
        ends = tokens.starts[1:]
        inside = set(tokens.tokens.tolist())
        if len(ends):
            last = np.zeros(len(tokens.tokens), bool)
            last[ends - 1] = tokens.width > 0 and bool(tokens.trained.any())
            inside = set(tokens.tokens[~last].tolist())
        return frozenset(read & inside)


@contextmanager
def _reading(models: list[AdapterModel]) -> Iterator[set[int]]:
    """Yield a set to which the tokens are added that models train on from now on."""
    found: set[int] = set()

    def note(module: object, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled() and inputs and not inputs[0].is_floating_point():
            found.update(torch.unique(inputs[0]).tolist())

    hooks = []
    for model in models:
        anyone: Any = model.model
        hooks.append(anyone.get_input_embeddings().register_forward_pre_hook(note))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def frequencies(shares: Mapping[int, Any]) -> dict[int, dict[int, float]]:
    """Return, for each client, how often each token occurs in the rows of all others."""
    counts: dict[int, dict[int, float]] = {}
    for client, share in shares.items():
        ids, times = torch.unique(torch.from_numpy(share.tokens.tokens), return_counts=True)
        counts[client] = dict(zip(ids.tolist(), map(float, times.tolist()), strict=True))
    everything: dict[int, float] = {}
    for own in counts.values():
        for token, count in own.items():
            everything[token] = everything.get(token, 0.0) + count
    return {
        client: {token: count - own.get(token, 0.0) for token, count in everything.items()}
        for client, own in counts.items()
    }
