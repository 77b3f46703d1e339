"""What clients send, as the server sees it: an engine of which each answer is looked at as it passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedloom.data.token_set import TokenSet
from fedloom.engines.in_process import SimulationEngine
from fedloom.errors import MessageError
from fedloom.federation.engine import Engine
from fedloom.federation.protocol import EVALUATE
from fedloom.models.adapters import AdapterModel
from fedloom.tensors import Tensors
from fedloom.training.synthetic_inputs import SYNTHETIC_INPUTS
from fedloom.wire.messages import Answer, Exchange

MOST_COMPARED = 200_000
"""Rows of a client times sequences that were read, up to which it is found out which rows they are."""

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
        rows: Token ids of the rows that it trained on, each once and up to the last token from which one
            is predicted, whole where a class is; the truth as well, empty where the rows could not be
            told apart.
        steps: Optimizer steps.
        learnt: The rows once more, with the last token that is predicted, and of each token whether it
            is; in the order in which they were read. Two rows may differ in that token alone.
    """

    round: int
    client: int
    action: str
    changes: Tensors
    received: Tensors
    tokens: frozenset[int]
    rows: tuple[tuple[int, ...], ...]
    steps: int
    learnt: tuple[tuple[tuple[int, ...], tuple[bool, ...]], ...] = ()


@dataclass
class Reads:
    """What models read while they were trained.

    Attributes:
        tokens: Distinct ids.
        lines: The ids of each sequence of a pass, as bytes of int64; padding and all, in order.
    """

    tokens: set[int] = field(default_factory=set)
    lines: dict[bytes, None] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget it."""
        self.tokens.clear()
        self.lines.clear()


@dataclass
class InterceptingEngine:
    """Passes requests and answers on, and keeps what is in them.

    Attributes:
        engine: Carries them.
        local: The clients, in this process.
        wanted: Names of tensors that are kept.
        updates: What was kept so far.
        sent: What was sent last, so that what all clients are sent is kept once.
        unreadable: Answers that hold no tensors that could be read, by reason.
    """

    engine: Engine
    local: SimulationEngine
    wanted: Set[str]
    updates: list[Update] = field(default_factory=list)
    sent: Tensors = field(default_factory=dict, repr=False)
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
                    self._keep(exchange, answer.client, answer.data, read)
                read.clear()
                yield answer

    def _keep(self, exchange: Exchange, client: int, data: bytes, read: Reads) -> None:
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
            received = self._received(sent)
            steps = sum(
                own.steps
                for own in self.local.ledger.costs
                if (own.round, own.client, own.phase) == (exchange.round, client, exchange.action)
            )
            tokens, rows = self._truth(client, read)
            if SYNTHETIC_INPUTS in changes:
                tokens, rows = self._of_rows(client), ()
            self.updates.append(
                Update(
                    exchange.round,
                    client,
                    exchange.action,
                    changes,
                    received,
                    tokens,
                    rows,
                    steps,
                    self._learnt(client, read) if rows else (),
                )
            )

    def _received(self, sent: Tensors) -> Tensors:
        """Return a copy of what a client was sent, the last one where that was the same."""
        own = {n: t for n, t in sent.items() if t.is_floating_point()}
        last = self.sent
        if own.keys() != last.keys() or any(not torch.equal(t, last[n]) for n, t in own.items()):
            self.sent = {n: t.clone() for n, t in own.items()}
        return self.sent

    def _of_rows(self, client: int) -> frozenset[int]:
        """Return the tokens of all rows of a client, of which synthetic inputs are made."""
        return frozenset(self.local.shares[client].tokens.tokens.tolist())

    def _truth(
        self, client: int, read: Reads
    ) -> tuple[frozenset[int], tuple[tuple[int, ...], ...]]:
        """Return the tokens that were trained on, and the rows that they are of.

        No gradient passes through the tokens from which none that is learnt is predicted. Rows are
        found in what was read; where they do not explain all of it (answers that share their prompt),
        each token is counted that is inside any row of the client.
        """
        tokens = self.local.shares[client].tokens
        predicts = predicts_tokens(tokens)
        ids = tokens.tokens.astype(np.int64)
        few = len(tokens.starts) * len(read.lines) <= MOST_COMPARED
        lines = list(read.lines) if few else []
        rows: dict[tuple[int, ...], None] = {}
        inside: set[int] = set()
        seen: set[int] = set()
        for start, end in zip(tokens.starts[:-1], tokens.starts[1:], strict=True):
            own = ids[start:end]
            learnt = np.flatnonzero(tokens.trained[start:end])
            row = tuple(own[: learnt[-1] if predicts and len(learnt) else len(own)].tolist())
            inside.update(row)
            if row and any(_holds(line, own) for line in lines):
                rows[row] = None
                seen.update(own.tolist())
        if not rows or len(read.tokens - seen) > 1:  # one more is that of padding
            return frozenset(read.tokens & inside), ()
        found = {token for row in rows for token in row}
        return frozenset(found & read.tokens), tuple(rows)

    def _learnt(
        self, client: int, read: Reads
    ) -> tuple[tuple[tuple[int, ...], tuple[bool, ...]], ...]:
        """Return the rows that were read, up to the last token that is predicted, and which are."""
        tokens = self.local.shares[client].tokens
        found: dict[tuple[tuple[int, ...], tuple[bool, ...]], int] = {}
        for start, end in zip(tokens.starts[:-1], tokens.starts[1:], strict=True):
            own = tokens.tokens[start:end].astype(np.int64)
            learnt = np.flatnonzero(tokens.trained[start:end])
            place = next((n for n, line in enumerate(read.lines) if _holds(line, own)), None)
            if place is None or not len(learnt) or not learnt[-1]:
                continue
            size = int(learnt[-1]) + 1
            flags = tokens.trained[start : start + size].tolist()
            found.setdefault((tuple(own[:size].tolist()), tuple(flags)), place)
        return tuple(sorted(found, key=found.__getitem__))


def predicts_tokens(tokens: TokenSet) -> bool:
    """Return whether tokens of the rows are predicted, so that of their last ones no update tells.

    Where a class is, it is read off the last token.
    """
    return tokens.width > 0 and bool(tokens.trained.any())


def _holds(line: bytes, row: np.ndarray[Any, np.dtype[np.int64]]) -> bool:
    """Return whether a row is part of what was read in one line."""
    wanted, start = row.tobytes(), 0
    while (start := line.find(wanted, start)) >= 0:
        if start % row.itemsize == 0:
            return True
        start += 1
    return False


@contextmanager
def _reading(models: list[AdapterModel]) -> Iterator[Reads]:
    """Yield what models train on from now on."""
    found = Reads()

    def note(module: object, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled() and inputs and not inputs[0].is_floating_point():
            ids = inputs[0].detach().cpu().long()
            found.tokens.update(torch.unique(ids).tolist())
            found.lines |= {line.numpy().tobytes(): None for line in ids.reshape(-1, ids.shape[-1])}

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
