"""The exchange in which clients tell what their rows lose: bounds of what is asked, means by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from fedloom.errors import MessageError, TrainingError
from fedloom.methods.contract.row_losses import RowLosses, summary
from fedloom.tensors import State
from fedloom.wire.messages import Payload, decode


def test_the_mean_counts_weights_and_the_root_mean_square_rows():
    """(1 x 1 + 3 x 5) / 4 = 4; (1 + 25) / 2 = 13."""
    found = summary([1.0, 5.0], [1.0, 3.0])
    assert found == {"loss": 4.0, "root_mean_square": pytest.approx(math.sqrt(13))}


@pytest.mark.parametrize(
    ("losses", "weights"), [([1.0, 2.0], [0.0, 0.0]), ([1.0, math.inf], [1.0, 1.0]), ([], [])]
)
def test_losses_of_nothing_and_infinite_ones_are_refused(losses, weights):
    with pytest.raises(TrainingError, match="are not finite, or nothing counts in them"):
        summary(losses, weights)


def exchange(sent):
    method = SimpleNamespace(sent_for_evaluation=lambda state: sent)
    return RowLosses(method).request(State({}), 3, {4, 1}, 8)


def test_clients_are_sent_what_they_are_judged_with_and_how_many_rows_are_asked_for():
    own = exchange({"w": torch.ones(1)})
    assert list(own.requests) == [1, 4] and own.round == 3
    request = decode(own.requests[4], own.request_schema)
    assert request.tensors["w"].item() == 1 and request.numbers == {"rows": 8.0}
    assert not decode(exchange(None).requests[1], exchange(None).request_schema).tensors
    (asked,) = own.request_schema.numbers
    assert asked.holds(8.0) and not asked.holds(7.0) and asked.holds(2.0**40)
    assert not asked.holds(2.0**41)
    loss, square = own.reply_schema.metrics or own.reply_schema.numbers
    assert loss.holds(-1.0) and not square.holds(-1.0)


def test_a_client_tells_no_loss_of_fewer_than_eight_rows():
    loaded = []
    method = SimpleNamespace(load=lambda client, payload: loaded.append(payload))
    client = SimpleNamespace(row_losses=lambda rows: ([float(rows)], [1.0]))
    handler = RowLosses(method).handler()
    reply = handler(client, Payload(numbers={"rows": 8.0}))
    assert reply.numbers["loss"] == 8.0 and len(loaded) == 1
    with pytest.raises(MessageError, match="losses of 7 rows are asked for, 8 is the least"):
        handler(client, Payload(numbers={"rows": 7.0}))
    assert len(loaded) == 1
