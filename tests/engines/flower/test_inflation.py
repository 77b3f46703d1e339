"""A message of Flower takes no more memory than it may, whatever its parts stand for."""

import json

import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import (
    inflatable_class_registry,
    inflate_object_from_contents,
)

from fedloom.engines.flower import inflation
from fedloom.engines.flower.inflation import HEADS, ByteBudget, bound_arrays, bound_pulls
from fedloom.errors import ConnectionFailed, MessageError

MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def registry():
    before = dict(inflatable_class_registry)
    yield
    inflatable_class_registry.update(before)


def packed(size, count=1):
    arrays = {
        str(i): Array(dtype="uint8", shape=(size,), stype=f"x{i}", data=bytes(size))
        for i in range(count)
    }
    content = RecordDict({"a": ArrayRecord(arrays)})
    return content.object_id, {
        id: own.deflate() for id, own in get_all_nested_objects(content).items()
    }


def test_what_has_room_is_what_it_was():
    budget = ByteBudget(MEGABYTE)
    bound_arrays(budget)
    id, contents = packed(MEGABYTE)
    assert inflate_object_from_contents(id, contents)["a"]["0"].data == bytes(MEGABYTE)


@pytest.mark.parametrize(("size", "count"), [(64 * MEGABYTE, 1), (MEGABYTE, 64)])
def test_parts_that_travel_once_are_counted_as_often_as_they_stand_there(size, count):
    budget = ByteBudget(MEGABYTE)
    bound_arrays(budget)
    id, contents = packed(size, count)
    assert sum(map(len, contents.values())) < 13 * MEGABYTE
    with pytest.raises(MessageError, match="1048576 are allowed") as error:
        inflate_object_from_contents(id, contents)
    assert error.value.kind == "oversized"


def test_a_terabyte_is_refused_before_it_is_made():
    budget = ByteBudget(MEGABYTE)
    bound_arrays(budget)
    id, contents = packed(64 * MEGABYTE)
    (name,) = (id for id, own in contents.items() if own.startswith(b"Array "))
    head, _, body = contents[name].partition(b"\x00")
    table = json.loads(body)
    table["arraychunk_ids"] = [0] * 200_000
    contents[name] = head + b"\x00" + json.dumps(table).encode()
    with pytest.raises(MessageError, match="1048576 are allowed"):
        inflate_object_from_contents(id, contents)


def test_what_is_pulled_is_counted_for_each_message_anew():
    class Client:
        def PullObject(self, request):
            return type(
                "",
                (),
                {"object_content": bytes(request), "object_found": True, "object_available": True},
            )

    client, budget = Client(), ByteBudget(MEGABYTE)
    bound_pulls(client, budget)
    for _ in range(3):
        budget.begin()
        client.PullObject(MEGABYTE)
        client.PullObject(HEADS)
        with pytest.raises(MessageError, match="are allowed"):
            client.PullObject(1)


def test_parts_that_do_not_come_are_waited_for_so_long_and_no_longer(monkeypatch):
    """Whoever announces an answer and sends none of it holds up the loop of rounds for seconds."""
    now = [100.0]
    monkeypatch.setattr(inflation, "time", type("", (), {"monotonic": lambda: now[0]}))

    class Client:
        def PullObject(self, request):
            return type(
                "", (), {"object_content": b"", "object_found": True, "object_available": False}
            )

    client, budget = Client(), ByteBudget(2_000_000)
    bound_pulls(client, budget)
    budget.begin()
    for now[0] in (100.0, 106.9):
        assert client.PullObject(None).object_content == b""
    now[0] = 107.1
    with pytest.raises(ConnectionFailed, match="did not come whole in time"):
        client.PullObject(None)
