"""Replies that Flower itself cannot read, beside others."""

from types import SimpleNamespace

import pytest
from flwr.app import Error
from google.protobuf.message import DecodeError

from fedloom.engines.flower.transport import FlowerTransport
from fedloom.wire.envelope import LONGEST


class MessageGrid:
    """Hands out what there is for an id, once, as Flower does: also what it then cannot read."""

    def __init__(self, **there):
        self.there = there

    def pull_messages(self, ids):
        found = [(id, self.there.pop(id)) for id in ids if id in self.there]
        for id, message in found:
            if isinstance(message, Exception):
                raise message
            message.metadata = message.metadata or SimpleNamespace(reply_to_message_id=id)
        return [message for _, message in found]


def failed(reason, to=None):
    metadata = SimpleNamespace(reply_to_message_id=to) if to is not None else None
    error = Error(code=1, reason=reason)
    return SimpleNamespace(has_error=lambda: True, error=error, metadata=metadata)


@pytest.mark.parametrize("to", ["", "b", "another"])
def test_what_answers_something_else_is_nobodys_answer(to):
    """Flower hands a run whatever is addressed to it, with the reply that was asked for."""
    transport = FlowerTransport(MessageGrid(a=failed("slipped in", to), b=failed("no room")))
    assert dict(transport.receive(["a", "b"])) == {"b": "no room"}


@pytest.mark.parametrize("error", [ValueError("bad head"), KeyError("object"), DecodeError("wire")])
def test_a_reply_that_cannot_be_read_takes_no_other_with_it(error):
    transport = FlowerTransport(MessageGrid(a=failed("no room"), b=error, c=failed("no time")))
    found = dict(transport.receive(["a", "b", "c", "d"]))
    assert found["a"] == "no room" and found["c"] == "no time" and found.keys() == set("abc")
    assert found["b"].startswith(f"its answer cannot be read: {type(error).__name__}")


def test_a_link_that_is_down_is_no_fault_of_a_client():
    with pytest.raises(ConnectionError):
        list(FlowerTransport(MessageGrid(a=ConnectionError())).receive(["a"]))


def test_what_a_stranger_says_is_not_kept_at_any_length():
    transport = FlowerTransport(
        MessageGrid(a=failed("x" * 10**6), b=ValueError("y" * 10**6), c=failed(""))
    )
    found = dict(transport.receive("abc"))
    assert len(found["a"]) == len(found["b"]) == LONGEST and found["c"] == "it failed"
