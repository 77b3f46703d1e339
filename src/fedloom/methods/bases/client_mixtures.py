"""Base class of methods in which each client holds some of the server's experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from fedloom.data.client_rows import TokenShare
from fedloom.data.token_set import TokenSet
from fedloom.methods.bases.parameter_averaging import ADAPTER
from fedloom.methods.contract.client import Client
from fedloom.methods.contract.method import Method
from fedloom.tensors import State, Tensors, join_parts, part_of
from fedloom.training.layout import scoring_budget
from fedloom.training.passes import Layout
from fedloom.wire.messages import Payload


class OwnMixture(Method):
    """Base class of methods in which each client holds some of the server's experts."""

    own_models = True

    def initial_state(self, adapter: Tensors) -> State:
        """Return all experts; no client holds any yet."""
        return State(join_parts(adapter=adapter))

    def shared(self, state: State) -> Tensors | None:
        """Return ``None``: every client has its own mixture."""
        return None

    def sent_to_unseen(self, state: State) -> Tensors:
        """Return all experts."""
        return part_of(state.tensors, ADAPTER)

    def load(self, client: Client, payload: Payload) -> None:
        """Load the received mixture, or the client's own, or before its first round the initial one."""
        client.model.write(payload.tensors or client.store.get(ADAPTER, client.initial))


def passes(
    client: Client, tokens: TokenSet, before: Callable[[Tensor], None] = lambda mask: None
) -> Iterator[int]:
    """Run rows through a client's model, without gradients; yield the rows of each pass after it.

    ``before`` is called before each with the ``(rows, length)`` mask of its real tokens.
    """
    model = client.model
    budget = scoring_budget(client.training, model)
    layout = Layout(model, TokenShare(tokens), budget, by_itself=True)  # the model is called itself
    for indices, batch in layout.everything():
        read = batch.sequences
        before(read.attention_mask)
        with model.evaluating():
            model(input_ids=read.input_ids, attention_mask=read.attention_mask, logits_to_keep=1)
        yield len(indices)
