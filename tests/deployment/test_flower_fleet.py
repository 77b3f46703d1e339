"""What is passed on of Flower's Fleet interface, over a pair of sockets and a server that stands for Flower's."""

import base64
import contextlib
import http.server
import socket
import threading
import time

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

from fedloom.deployment import flower_fleet
from fedloom.deployment.flower_fleet import Forbidden, Refused
from fedloom.deployment.flower_nodes import NodeKey
from fedloom.errors import ConnectionFailed
from fedloom.security.client_registry import Member

NODE = NodeKey(5, Member(number=0, name="a", key=""), ec.generate_private_key(ec.SECP384R1()))


class Flower:
    """Answers with what it was asked; ``breaks`` closes the connection instead."""

    def __init__(self, folder):
        self.asked, self.breaks, outer = [], False, self

        class Answers(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.asked.append((self.path, dict(self.headers), body))
                if outer.breaks:
                    self.close_connection = True
                    return
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *words):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        self.database, self.most = folder / "db", 100
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def connect(self):
        return socket.create_connection(self.server.server_address)

    has_room = flower_fleet.Upstream.has_room


@pytest.fixture
def flower(tmp_path):
    own = Flower(tmp_path)
    yield own
    own.server.shutdown()
    own.server.server_close()


@pytest.fixture
def passing(flower):
    """Pass what is sent on; return what comes back and what the gateway learns of it."""

    def send(*parts, allowed=True, close=True, wait=0.0):
        ours, theirs = socket.socketpair()
        found = []

        def serve():
            try:
                with theirs:
                    flower_fleet.pass_on(
                        theirs,
                        flower,
                        lambda: NODE if allowed else None,
                        lambda: None,
                        threading.Lock(),
                    )
            except Exception as error:
                found.append(error)

        thread = threading.Thread(target=serve)
        thread.start()
        with ours:
            for part in parts:
                with contextlib.suppress(OSError):
                    ours.sendall(part)
                time.sleep(wait)
            if close:
                with contextlib.suppress(OSError):
                    ours.shutdown(socket.SHUT_WR)
            answer = b""
            with contextlib.suppress(OSError):
                while part := ours.recv(1 << 16):
                    answer += part
        thread.join(10)
        return answer, found[0]

    return send


def message(**changed):
    said = {
        "src_node_id": 5, "dst_node_id": 1, "reply_to_message_id": "q", "message_id": "a", **changed
    }  # fmt: skip
    return Message(metadata=Metadata(**said))


def pushed(*messages):
    """What node 5 sends as messages."""
    trees = [ObjectTree(object_id="a") for _ in messages]
    whole = PushMessagesRequest(
        node=Node(node_id=5), messages_list=messages, message_object_trees=trees
    )
    return whole.SerializeToString()


def request(name="pull-messages", body=b"body", length=None, **headers):
    said = {"host": "x", "x-more": "1", **headers}
    lines = "".join(f"{k}: {v}\r\n" for k, v in said.items())
    length = len(body) if length is None else length
    return (
        f"POST /v1/fleet/{name} HTTP/1.1\r\n{lines}content-length: {length}\r\n\r\n".encode() + body
    )


def test_calls_go_through_one_after_the_other_and_a_client_that_leaves_has_done_nothing(
    passing, flower
):
    answer, error = passing(request() + request("push-object", b"x" * 100_000))
    assert answer.count(b"HTTP/1.1 200") == 2 and answer.endswith(b"x" * 100_000)
    assert [path for path, _, _ in flower.asked] == [
        "/v1/fleet/pull-messages",
        "/v1/fleet/push-object",
    ]
    assert "x-more" not in flower.asked[0][1]  # of headers, those that are known
    assert isinstance(error, OSError)


def test_a_reply_of_the_clients_own_is_passed_on_as_it_came(passing, flower):
    answer, _ = passing(request("push-messages", pushed(message())))
    assert answer.startswith(b"HTTP/1.1 200") and flower.asked[0][2] == pushed(message())
    assert (
        flower.asked[0][1]["flwr-public-key"] == dict(NODE.headers())[b"flwr-public-key"].decode()
    )


def test_a_body_that_comes_too_slowly_is_not_waited_for(passing, monkeypatch):
    monkeypatch.setattr(flower_fleet, "IDLE", 0.3)
    monkeypatch.setattr(flower_fleet, "SLOWEST", 1e12)
    whole = request("push-object", b"x" * 300)
    _, error = passing(*[whole[start : start + 50] for start in range(0, len(whole), 50)], wait=0.1)
    assert isinstance(error, OSError)


@pytest.mark.parametrize("part", [30, -1])
def test_a_link_that_ends_in_the_middle_is_no_offence(passing, part):
    _, error = passing(request("push-object", b"x" * 1000)[:part])
    assert isinstance(error, OSError)


def test_a_server_of_flowers_that_goes_away_is_none_of_the_clients_doing(passing, flower):
    flower.breaks = True
    _, error = passing(request(), close=False)
    assert isinstance(error, ConnectionFailed | OSError)


def test_a_client_that_is_let_in_no_longer_is_told_and_has_committed_nothing(passing):
    answer, error = passing(request(), allowed=False)
    assert answer.startswith(b"HTTP/1.1 401")
    assert isinstance(error, Refused) and not isinstance(error, Forbidden)


def test_no_more_is_taken_once_the_database_is_full_and_that_is_nobodys_offence(passing, flower):
    flower.database.write_bytes(bytes(100))
    answer, error = passing(request("push-object"))
    assert answer.startswith(b"HTTP/1.1 507") and flower.asked == []
    assert isinstance(error, Refused) and not isinstance(error, Forbidden)
    assert passing(request())[0].startswith(b"HTTP/1.1 200")


def test_what_a_client_says_of_who_it_is_to_flower_is_not_passed_on(passing, flower):
    """The gateway signs for the node of the member that has proven its key."""
    passing(
        request(**{"flwr-public-key": "b3RoZXI=", "flwr-signature": "x", "flwr-timestamp": "y"})
    )
    said = flower.asked[0][1]
    public, moment, signature = (
        said[name] for name in ("flwr-public-key", "flwr-timestamp", "flwr-signature")
    )
    key = bytes_to_public_key(base64.b64decode(public))
    assert key == NODE.private.public_key()
    assert verify_signature(key, moment.encode(), base64.b64decode(signature))


@pytest.mark.parametrize(
    ("content", "status", "kind"),
    [
        (request("../control/list-runs"), 403, "forbidden"),
        (request("register-node"), 403, "forbidden"),
        (request(length=1 << 30), 413, "oversized"),
        (request(length="x"), 400, "malformed"),
        (b"\x16\x03\x01 no HTTP at all\r\n\r\n", 400, "malformed"),
        (request(**{"Content-length": "0"}, length=4), 400, "malformed"),
        (request(**{"transfer-encoding": "chunked"}, length=0, body=b""), 411, "malformed"),
        (request("push-messages", b"\xff no protobuf"), 400, "malformed"),
        (request("push-messages", pushed()), 403, "forbidden"),
        (request("push-messages", pushed(message(), message())), 403, "forbidden"),
        (request("push-messages", pushed(message(src_node_id=1))), 403, "forged"),
        (request("push-messages", pushed(message(src_node_id=6))), 403, "forged"),
        (request("push-messages", pushed(message(dst_node_id=6))), 403, "forged"),
        (request("push-messages", pushed(message(reply_to_message_id=""))), 403, "replayed"),
        (request("push-messages", pushed(message(message_id="b"))), 403, "replayed"),
        (request(x="y" * 40_000), 400, "malformed"),
    ],
)
def test_what_no_honest_client_sends_is_an_offence_of_its_kind(
    passing, flower, content, status, kind
):
    answer, error = passing(content)
    assert answer.startswith(b"HTTP/1.1 %d" % status) and flower.asked == []
    assert isinstance(error, Forbidden) and error.kind == kind
