"""A client as a node of Flower: what it answers, what it refuses, and that nothing of the server's is run."""

import gzip
import io
import os
import warnings
import zipfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity
from google.protobuf.message import DecodeError

import fedloom.deployment
from fedloom.deployment import flower_node
from fedloom.deployment.flower_node import APP, FlowerNode, digest_of_bundle
from fedloom.engines.flower.records import from_records, to_records
from fedloom.errors import ConnectionFailed, IdentityError, MessageError
from fedloom.security.keys import make_key, read_key
from fedloom.wire.envelope import LONGEST_HEADER, Envelope

OWN = Path(fedloom.deployment.__file__).with_name("app")
RUN = 7


@cache
def own_bundle():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what Flower uses to build it
        return build_fab_from_disk(OWN)


def bundle(**files):
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return written.getvalue()


class Flower:
    """Stands for the server's side of Flower's Fleet interface: messages that wait, and replies."""

    def __init__(self, fab=None):
        self.fab = fab if fab is not None else own_bundle()
        self.waiting, self.objects, self.replies, self.pushed = [], {}, [], {}
        self.confirmed, self.known, self.opened, self.left = [], {5}, 0, 0
        self.closed = []
        self.failing, self.fetched, self.going, self.said = [], 0, None, []

    def ask(self, content):
        message = Message(content, dst_node_id=5, message_type="query")
        message.metadata.__dict__["_message_id"] = message.object_id
        objects = {id: own.deflate() for id, own in get_all_nested_objects(message).items()}
        self.objects |= objects
        tree = get_object_tree(message)
        message.__dict__["_content"] = RecordDict()
        self.waiting.append((message_to_proto(message), tree))
        return tree.object_id

    def answer(self, number=0):
        """Return the envelope in a reply."""
        head = self.replies[number]
        whole = inflate_object_from_contents(head.metadata.message_id, dict(self.pushed))
        return from_records(whole.content)

    def fail(self):
        if self.failing:
            raise self.failing.pop(0)

    def DeactivateNode(self, request):
        self.left += 1
        if self.going is not None:
            raise self.going

    def SendNodeHeartbeat(self, request):
        return SimpleNamespace(success=request.node.node_id in self.known)

    def PullMessages(self, request):
        self.fail()
        if not self.waiting:
            self.stop()
            return SimpleNamespace(messages_list=[], message_object_trees=[])
        head, tree = self.waiting.pop(0)
        return SimpleNamespace(messages_list=[head], message_object_trees=[tree])

    def GetRun(self, request):
        return SimpleNamespace(run=SimpleNamespace(fab_hash="any"))

    def GetFab(self, request):
        self.fetched += 1
        return SimpleNamespace(fab=SimpleNamespace(content=self.fab))

    def PullObject(self, request):
        content = self.objects.get(request.object_id)
        return SimpleNamespace(
            object_found=content is not None, object_available=True, object_content=content or b""
        )

    def ConfirmMessageReceived(self, request):
        self.confirmed.append(request.message_object_id)

    def PushMessages(self, request):
        self.fail()
        self.replies.append(message_from_proto(request.messages_list[0]))
        self.replies[-1].metadata.__dict__["_message_id"] = request.message_object_trees[
            0
        ].object_id
        ids = {request.message_object_trees[0].object_id}

        def add(tree):
            ids.update(child.object_id for child in tree.children)
            for child in tree.children:
                add(child)

        add(request.message_object_trees[0])
        return SimpleNamespace(objects_to_push=ids, session_id="s")

    def PushObject(self, request):
        self.pushed[request.object_id] = request.object_content
        return SimpleNamespace(stored=True)


@pytest.fixture
def take_part(tmp_path, monkeypatch):
    """Have a node answer what a server has, until that has nothing more."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, RUN)
    monkeypatch.setattr(flower_node, "SOON", 0.0)
    monkeypatch.setattr(flower_node, "AGAIN", (0.0, 0.01))
    monkeypatch.setattr(flower_node, "REFUSED", (0.0, 0.01))
    make_key(tmp_path / "c.key")

    def run(flower, answer, max_bytes=1 << 20):
        asked = []

        def counted(envelope):
            asked.append(envelope)
            return answer(envelope)

        gateway = SimpleNamespace(key=read_key(tmp_path / "c.key"))
        node = FlowerNode(gateway, counted, max_bytes, flower.said.append)

        @contextmanager
        def client(gateway, max_bytes):
            flower.opened += 1
            if flower.closed:
                raise flower.closed.pop(0)
            yield flower, Node(node_id=5)

        monkeypatch.setattr(flower_node, "fleet_client", client)
        flower.stop = node.stop
        node.run()
        return asked

    return run


def reply(envelope):
    return Envelope(b"reply to " + envelope.header, envelope.payload[::-1])


def test_the_app_of_this_package_is_the_one_that_is_pinned():
    assert digest_of_bundle(own_bundle()) == APP


def test_a_message_is_answered(take_part):
    flower = Flower()
    id = flower.ask(to_records(Envelope(b"header", b"payload", b"signature")))
    (asked,) = take_part(flower, reply)
    assert asked == Envelope(b"header", b"payload", b"signature")
    assert flower.answer() == Envelope(b"reply to header", b"daolyap")
    assert flower.replies[0].metadata.reply_to_message_id == id
    assert flower.confirmed == [id] and flower.left == 1


@pytest.mark.parametrize(
    "content",
    [
        b"no zip",
        bundle(),
        bundle(**{"evil.py": "import os"}),
        bundle(**{"pyproject.toml": "x" * 70_000}),
        own_bundle()[:-30],
    ],
)
def test_a_run_with_another_bundle_is_refused(take_part, content):
    """Each of its messages, and the bundle is asked for once."""
    flower = Flower(content)
    for payload in (b"one", b"two"):
        flower.ask(to_records(Envelope(b"header", payload)))
    assert take_part(flower, reply) == [] and flower.fetched == 1
    one, two = (own.error.reason for own in flower.replies)
    assert one == two and ("fedloom's own app" in one or "cannot be read" in one)


@pytest.mark.parametrize(
    "error", [httpx.ReadError("away"), DecodeError("no protobuf"), KeyError(1)]
)
def test_a_node_goes_whatever_the_server_says_to_that(take_part, error):
    flower = Flower()
    flower.going = error
    take_part(flower, reply)
    assert flower.left == 1


def test_one_changed_byte_of_the_app_is_another_bundle():
    with zipfile.ZipFile(io.BytesIO(own_bundle())) as own:
        files = {name: own.read(name) for name in own.namelist()}
    assert digest_of_bundle(bundle(**files)) == APP  # compressed otherwise, it is the same
    for name in files:
        changed = {**files, name: files[name] + b"#"}
        assert digest_of_bundle(bundle(**changed)) != APP
    assert digest_of_bundle(bundle(**files, **{"more.py": b""})) != APP


def test_a_bundle_that_unpacks_to_much_is_not_unpacked():
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("zeros", bytes(200 << 20))
    with pytest.raises(MessageError, match="larger"):
        digest_of_bundle(written.getvalue())


def nothing(flower, id):
    del flower.objects[id]


def forged(flower, id):
    flower.objects = dict.fromkeys(flower.objects, b"something else")


@pytest.mark.parametrize("spoil", [nothing, forged])
def test_a_message_that_is_not_whole_is_refused(take_part, spoil):
    flower = Flower()
    spoil(flower, flower.ask(to_records(Envelope(b"header", b"payload"))))
    assert take_part(flower, reply) == [] and flower.replies[0].has_error()
    assert flower.confirmed == []


@pytest.mark.parametrize("content", [bytes, os.urandom])
def test_a_message_larger_than_is_allowed_is_refused_before_it_is_put_together(take_part, content):
    """Parts that are equal travel once: of zeros, little is pulled and much would be made."""
    flower = Flower()
    flower.ask(to_records(Envelope(b"header", content(LONGEST_HEADER + 200_000))))
    assert take_part(flower, reply, max_bytes=1 << 16) == []
    assert flower.replies[0].has_error()


def test_a_message_that_holds_no_envelope_is_refused(take_part):
    flower = Flower()
    flower.ask(RecordDict({"x": ConfigRecord({"y": 1})}))
    assert take_part(flower, reply) == [] and flower.replies[0].has_error()


def test_what_the_worker_cannot_do_is_told_without_its_words(take_part):
    flower = Flower()
    flower.ask(to_records(Envelope(b"header", b"payload")))

    def fail(envelope):
        raise ConnectionFailed("the worker gave no answer; see /home/secret/worker.log")

    take_part(flower, fail)
    assert flower.replies[0].error.reason == "the message cannot be answered"


def status(code):
    request = httpx.Request("POST", "http://x")
    return httpx.HTTPStatusError(
        "no", request=request, response=httpx.Response(code, request=request)
    )


def test_an_answer_that_is_not_taken_is_not_sent_in_place_of_the_next(take_part):
    """Flower's own node did that, for ever, after a server that was killed at the wrong moment."""
    flower = Flower()
    flower.ask(to_records(Envelope(b"first", b"1")))
    second = flower.ask(to_records(Envelope(b"second", b"2")))
    push, calls = flower.PushMessages, []

    def refuse_first(request):
        calls.append(request)
        if len(calls) == 1:
            raise status(409)
        return push(request)

    flower.PushMessages = refuse_first
    assert len(take_part(flower, reply)) == 2
    (head,) = flower.replies
    assert head.metadata.reply_to_message_id == second
    assert flower.answer().header == b"reply to second"


def test_a_server_that_goes_away_is_waited_for_and_knows_the_node_still(take_part):
    flower = Flower()
    flower.failing = [httpx.ConnectError("gone"), ConnectionFailed("gone"), status(503)]
    flower.ask(to_records(Envelope(b"header", b"payload")))
    assert len(take_part(flower, reply)) == 1 and flower.opened >= 4


def test_a_server_that_cannot_be_reached_is_told_of_once_and_that_it_is_back(take_part):
    flower = Flower()
    flower.closed = [ConnectionFailed("nobody answers"), ConnectionFailed("nobody answers")]
    flower.ask(to_records(Envelope(b"header", b"payload")))
    assert len(take_part(flower, reply)) == 1
    lost = "the server cannot be reached: nobody answers; trying again"
    assert flower.said == [lost, "taking part again"]


def test_a_server_that_does_not_know_the_node_yet_is_asked_again(take_part):
    """It was restarted, and is being told of its members; the gateway says which node this is now."""
    flower, known = Flower(), iter([False, False])
    flower.SendNodeHeartbeat = lambda request: SimpleNamespace(success=next(known, True))
    flower.ask(to_records(Envelope(b"header", b"payload")))
    assert len(take_part(flower, reply)) == 1 and flower.opened >= 3


def test_a_client_that_is_let_in_no_longer_says_so_once_and_comes_back_when_it_is(take_part):
    flower = Flower()
    flower.closed = [IdentityError("the key has been revoked") for _ in range(3)]
    flower.ask(to_records(Envelope(b"header", b"payload")))
    assert len(take_part(flower, reply)) == 1
    refused = "the key has been revoked; trying again every few minutes"
    assert flower.said == [refused, "taking part again"]


def test_whatever_a_server_sends_the_client_goes_on(take_part):
    flower = Flower()
    flower.failing = [ValueError("no message"), IndexError("no tree"), DecodeError("no protobuf")]
    flower.ask(to_records(Envelope(b"header", b"payload")))
    assert len(take_part(flower, reply)) == 1


def test_a_response_that_is_packed_is_not_unpacked():
    """Bounds are of what comes; a packed response would be a thousand times as much."""
    packed = gzip.compress(bytes(50 << 20))

    class Inner(httpx.BaseTransport):
        def handle_request(self, request):
            assert request.headers["accept-encoding"] == "identity"
            headers = {"content-encoding": "gzip"}
            return httpx.Response(200, headers=headers, stream=httpx.ByteStream(packed))

    transport = flower_node._Transport(SimpleNamespace(close=lambda: None), 1 << 20)
    transport._inner = Inner()
    with (
        httpx.Client(transport=transport) as client,
        pytest.raises(httpx.ReadError, match="compressed"),
    ):
        client.get("http://localhost/")


def test_a_response_that_is_too_long_is_not_read_to_its_end():
    read = []

    class Stream(httpx.SyncByteStream):
        def __iter__(self):
            for _ in range(1000):
                read.append(1)
                yield bytes(1 << 20)

    class Inner(httpx.BaseTransport):
        def handle_request(self, request):
            return httpx.Response(200, stream=Stream())

    transport = flower_node._Transport(SimpleNamespace(close=lambda: None), 1 << 20)
    transport._inner = Inner()
    client = httpx.Client(transport=transport)
    with client, pytest.raises(httpx.ReadError, match="longer than is allowed"):
        client.get("http://localhost/")
    assert len(read) < 25
