"""A client as a node of Flower: it fetches messages, has the worker answer them, and sends the answers.

It speaks Flower's Fleet interface through the gateway, in this process, as the node that the gateway
assigns and signs for (``flower_nodes.py``). No code from Flower's server runs here: no bundle is
installed or loaded, no port is opened. The bundle of a run is still checked, and messages of a run with
any app but this package's are refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import httpcore
import httpx
from flwr.app import Error, Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient

from fedloom.deployment.gateway_client import GatewayClient
from fedloom.display.untrusted_text import short
from fedloom.engines.flower.inflation import ByteBudget, bound_arrays
from fedloom.engines.flower.records import from_records, to_records
from fedloom.errors import ConnectionFailed, FedloomError, IdentityError, MessageError
from fedloom.wire.envelope import LONGEST_HEADER, Envelope

LOG = logging.getLogger("fedloom.node")

APP = "53d1758fbc427e3df0fb09950f3f4d9924ec7663a84e042ddda478a3b4fe1f7f"
"""What a run's bundle must be: :func:`digest_of_bundle` of the app of this package (``app/``)."""

BUNDLE = 64 << 10
"""Bytes of the largest bundle that is checked, packed and unpacked; the app's has 3 kB."""

HEARTBEAT = 10.0
"""Seconds between heartbeats; after twice as many the node counts as offline. It is the smallest value
that Flower accepts."""

SOON, LATER, LIVELY = 0.5, 3.0, 60.0
"""Seconds between polls for messages in the first minute after a message, and later."""

AGAIN = 0.5, 5.0
"""Seconds until the next attempt to reach a lost server: at first, and at most."""

REFUSED = 30.0, 300.0
"""The same where the server does not admit this client any more: it may, later."""

SMALL = 1 << 20
"""Bytes of the longest response that carries no part of a message's content."""

UNREACHABLE = (httpx.HTTPError, httpcore.NetworkError, ConnectionFailed, OSError)
"""Exceptions where the server cannot be reached, or does not answer correctly."""


class RefusedApp(MessageError):
    """The bundle of a run is not the app of this package."""


class FlowerNode:
    """Answers Flower's messages to one client.

    Attributes:
        answer: Returns the reply to an envelope; takes as long as the work does.
        max_bytes: Bytes that the payload of a message may have.
        say: Called with texts when the server is lost and when it is reached again.
    """

    def __init__(
        self,
        gateway: GatewayClient,
        answer: Callable[[Envelope], Envelope],
        max_bytes: int,
        say: Callable[[str], object] = lambda text: None,
    ) -> None:
        """Take part as the client of ``gateway``; see :meth:`run`."""
        self.answer, self.max_bytes, self.say = answer, max_bytes, say
        self._notified = ""
        self._budget = ByteBudget(LONGEST_HEADER + max_bytes)
        bound_arrays(self._budget)
        self._gateway = gateway
        self._stopping = threading.Event()
        self._apps: dict[int, str | None] = {}
        self._node: Node | None = None

    def stop(self) -> None:
        """End :meth:`run` at its next pause."""
        self._stopping.set()

    def run(self) -> None:
        """Take part until stopped; wait for a server that is lost or refuses this client."""
        soon, refused = AGAIN[0], REFUSED[0]
        while not self._stopping.is_set():
            begun = time.monotonic()
            try:
                with fleet_client(self._gateway, self.max_bytes) as (client, node):
                    self._take_part(client, node)
                pause = AGAIN[0]
            except IdentityError as error:
                self._notify(f"{error}; trying again every few minutes")
                pause, refused = refused, min(2 * refused, REFUSED[1])
            except UNREACHABLE as error:
                LOG.info("the server cannot be reached: %s", _reason(error))
                if not isinstance(error, httpx.HTTPStatusError):
                    self._notify(f"the server cannot be reached: {_reason(error)}; trying again")
                pause, soon = soon, min(2 * soon, AGAIN[1])
            except Exception:  # an error in a server's answer must not stop this client
                LOG.exception("the server's answer cannot be used")
                pause, soon = soon, min(2 * soon, AGAIN[1])
            if time.monotonic() - begun > AGAIN[1]:
                soon, refused = AGAIN[0], REFUSED[0]
            self._stopping.wait(pause)
        self._leave()

    def _notify(self, text: str) -> None:
        """Report a text, unless it was the last one reported."""
        if text != self._notified:
            self._notified = text
            self.say(text)

    def _take_part(self, client: FleetHttpClient, node: Node) -> None:
        """Answer messages until Flower no longer knows this node, or cannot be reached."""
        self._node = node
        if not self._is_known(client, node):
            raise ConnectionFailed("Flower's server does not know this node; it may be starting")
        if self._notified:
            self._notify("taking part again")
            self._notified = ""
        over = threading.Event()
        beating = threading.Thread(target=self._beat, args=(node, over), daemon=True)
        beating.start()
        try:
            self._answer_all(client, node, over)
        finally:
            over.set()

    def _leave(self) -> None:
        """Deactivate this node in Flower, if it can be reached."""
        if self._node is not None:
            with (
                contextlib.suppress(Exception),
                fleet_client(self._gateway, SMALL) as (client, node),
            ):
                client.DeactivateNode(DeactivateNodeRequest(node_id=node.node_id))

    @staticmethod
    def _is_known(client: FleetHttpClient, node: Node) -> bool:
        """Send a heartbeat to Flower; return whether it knows this node."""
        request = SendNodeHeartbeatRequest(node=node, heartbeat_interval=HEARTBEAT)
        try:
            return client.SendNodeHeartbeat(request).success
        except httpx.HTTPStatusError:
            return False

    def _beat(self, node: Node, over: threading.Event) -> None:
        """Send heartbeats over a separate connection, however long an answer takes."""
        while not over.is_set():
            try:
                with fleet_client(self._gateway, SMALL) as (client, now):
                    if now.node_id != node.node_id:  # the server was restarted
                        over.set()
                    while not over.wait(0.5 * HEARTBEAT):
                        if not self._is_known(client, node):
                            over.set()
            except Exception as error:  # any error in a server's answer
                LOG.info("no heartbeat: %s", _reason(error))
                over.wait(AGAIN[0])

    def _answer_all(self, client: FleetHttpClient, node: Node, over: threading.Event) -> None:
        heard = time.monotonic()
        while not (self._stopping.is_set() or over.is_set()):
            found = client.PullMessages(PullMessagesRequest(node=node))
            if found.messages_list:
                message = message_from_proto(found.messages_list[0])
                try:
                    self._answer_one(client, node, message, found.message_object_trees[0])
                except httpx.HTTPStatusError as error:  # the run may be over
                    LOG.warning("a message was not answered: %s", _reason(error))
                heard = time.monotonic()
                continue
            lively = time.monotonic() - heard < LIVELY
            self._stopping.wait(SOON if lively else LATER)

    def _answer_one(
        self, client: FleetHttpClient, node: Node, message: Message, tree: ObjectTree
    ) -> None:
        """Answer a message; an error is reported in the reply."""
        run = message.metadata.run_id
        try:
            self._require_own_app(client, node, run)
            envelope = from_records(self._pulled(client, node, message, tree).content)
            confirmation = ConfirmMessageReceivedRequest(
                node=node, run_id=run, message_object_id=message.metadata.message_id
            )
            client.ConfirmMessageReceived(confirmation)
            content = to_records(self.answer(envelope))
            reply = Message(content, reply_to=message)
        except FedloomError as error:
            LOG.warning("a message was not answered: %s", error)
            said = str(error) if isinstance(error, RefusedApp) else "the message cannot be answered"
            error_of_flower = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=said)
            reply = Message(error_of_flower, reply_to=message)
        self._push(client, node, reply)

    def _require_own_app(self, client: FleetHttpClient, node: Node, run: int) -> None:
        """Check that the bundle of a run is the app of this package, once for each run.

        Raises:
            RefusedApp: It is another.
        """
        if run not in self._apps:
            about = client.GetRun(GetRunRequest(node=node, run_id=run)).run
            request = GetFabRequest(node=node, hash_str=about.fab_hash, run_id=run)
            content = client.GetFab(request).fab.content
            self._apps = {**dict(list(self._apps.items())[-9:]), run: refusal_of_bundle(content)}
        if (refusal := self._apps[run]) is not None:
            raise RefusedApp(refusal)

    def _pulled(
        self, client: FleetHttpClient, node: Node, message: Message, tree: ObjectTree
    ) -> Message:
        """Return a message with its content.

        Raises:
            MessageError: It is too large, incomplete, or does not match its hash.
        """
        contents: dict[str, bytes] = {}
        self._budget.begin()
        for own in iterate_object_tree(tree):
            request = PullObjectRequest(
                node=node, run_id=message.metadata.run_id, object_id=own.object_id
            )
            found = client.PullObject(request)
            content = found.object_content
            self._budget.pull(len(content))
            if not (found.object_found and found.object_available):
                raise MessageError("the message is incomplete")
            if hashlib.sha256(content).hexdigest() != own.object_id:
                raise MessageError("a part of the message does not match its hash")
            contents[own.object_id] = content
        try:
            whole = inflate_object_from_contents(tree.object_id, contents)
        except MessageError:
            raise
        except Exception as error:  # whatever Flower raises over what is not a message
            raise MessageError(f"the message cannot be read: {type(error).__name__}") from None
        if not isinstance(whole, Message) or not whole.has_content():
            raise MessageError("the message is empty")
        whole.metadata.__dict__["_message_id"] = tree.object_id
        return whole

    @staticmethod
    def _push(client: FleetHttpClient, node: Node, reply: Message) -> None:
        reply.metadata.__dict__["_message_id"] = reply.object_id
        head = message_to_proto(remove_content_from_message(reply))
        with no_object_id_recompute():
            tree, objects = get_object_tree(reply), get_all_nested_objects(reply)
            asked = client.PushMessages(
                PushMessagesRequest(
                    node=node,
                    messages_list=[head],
                    message_object_trees=[tree],
                    clientapp_runtime_list=[0.0],
                )
            )
            for id in asked.objects_to_push:
                client.PushObject(
                    PushObjectRequest(
                        node=node,
                        run_id=reply.metadata.run_id,
                        object_id=id,
                        object_content=objects[id].deflate(),
                        session_id=asked.session_id,
                    )
                )


def refusal_of_bundle(content: bytes) -> str | None:
    """Return why a client takes no part in runs of this bundle; ``None`` for the app of this package."""
    try:
        own = digest_of_bundle(content) == APP
    except MessageError as error:
        return str(error)
    return None if own else "this client takes part only in runs of fedloom's own app"


def digest_of_bundle(content: bytes) -> str:
    """Return the SHA-256 over the names and contents of a bundle's files, in the order of their names.

    Not over the bundle itself, which is compressed: other versions of zlib make other bytes of the same.

    Raises:
        MessageError: It is too large, or cannot be read.
    """
    found = hashlib.sha256()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as bundle:
            infos = sorted(bundle.infolist(), key=lambda info: info.filename)
            if len(content) + sum(info.file_size for info in infos) > BUNDLE:
                raise MessageError("the bundle of the run is larger than fedloom's own app")
            for info in infos:
                own = hashlib.sha256(bundle.read(info)).hexdigest()
                found.update(f"{info.filename}\n{own}\n".encode())
    except MessageError:
        raise
    except Exception:  # any error in a packed file
        raise MessageError("the bundle of the run cannot be read") from None
    return found.hexdigest()


@contextlib.contextmanager
def fleet_client(gateway: GatewayClient, max_bytes: int) -> Iterator[tuple[FleetHttpClient, Node]]:
    """Yield Flower's client of its Fleet interface, through the gateway, and which node this is.

    Args:
        gateway: Address and identity.
        max_bytes: Bytes of the longest response.

    Raises:
        ConnectionFailed: The server cannot be reached, is another server, or is not ready yet.
        IdentityError: It does not admit this client.
    """
    backend = _Backend(gateway)
    with _FleetClient(_Transport(backend, max_bytes)) as client:
        yield client, Node(node_id=backend.node)


class _FleetClient(FleetHttpClient):
    """Flower's client over a transport of ours.

    Its own constructor would make another first, with what the environment says of proxies, and fail over
    one of a kind that httpx does not support.
    """

    def __init__(self, transport: httpx.BaseTransport) -> None:
        self._base_url = "http://localhost"
        self._interceptors = (RuntimeVersionHttpInterceptor(component_name="SuperNode"),)
        self._retry_invoker = None
        self._client = httpx.Client(transport=transport, timeout=30.0)


class _Transport(httpx.BaseTransport):
    """HTTP over connections on which the gateway has admitted this client."""

    def __init__(self, backend: _Backend, max_bytes: int) -> None:
        self._backend = backend
        self._inner = httpx.HTTPTransport()
        self._inner.close()
        self._inner._pool = httpcore.ConnectionPool(max_connections=1, network_backend=backend)
        self._max_bytes = max_bytes + LONGEST_HEADER

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.headers["accept-encoding"] = "identity"
        response = self._inner.handle_request(request)
        if response.headers.get("content-encoding", "identity") != "identity":
            response.close()
            raise httpx.ReadError("the server's response is compressed, which is not allowed")
        stream = response.stream
        assert isinstance(stream, httpx.SyncByteStream), "a client that waits has such streams"
        response.stream = _Bounded(stream, self._max_bytes)
        return response

    def close(self) -> None:
        self._inner.close()
        self._backend.close()


class _Bounded(httpx.SyncByteStream):
    """A response that is read up to the allowed length."""

    def __init__(self, stream: httpx.SyncByteStream, room: int) -> None:
        self._stream, self._room = stream, room

    def __iter__(self) -> Iterator[bytes]:
        for part in self._stream:
            self._room -= len(part)
            if self._room < 0:
                raise httpx.ReadError("the server's response is longer than is allowed")
            yield part

    def close(self) -> None:
        self._stream.close()


class _Backend(httpcore.NetworkBackend):
    """Opens connections at the gateway, whatever the requested address; the first one immediately.

    Attributes:
        node: Flower's number of this client, as the gateway says with each connection.
    """

    def __init__(self, gateway: GatewayClient) -> None:
        self._gateway = gateway
        self._first, card = gateway.open("fleet")
        self.node = card.node
        self._taken = False

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        if not self._taken:
            self._taken = True
            return _Stream(self._first)
        connection, card = self._gateway.open("fleet")
        if card.node != self.node:
            connection.close()
            raise ConnectionFailed("the server was restarted; this client is another node now")
        return _Stream(connection)

    def close(self) -> None:
        """Close the first connection, if it is unused."""
        if not self._taken:
            self._first.close()


class _Stream(httpcore.NetworkStream):
    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        self._connection.settimeout(timeout)
        try:
            content: bytes = self._connection.recv(max_bytes)
        except TimeoutError as error:
            raise httpcore.ReadTimeout(str(error)) from error
        except OSError as error:
            raise httpcore.ReadError(str(error)) from error
        return content

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._connection.settimeout(timeout)
        try:
            self._connection.sendall(buffer)
        except TimeoutError as error:
            raise httpcore.WriteTimeout(str(error)) from error
        except OSError as error:
            raise httpcore.WriteError(str(error)) from error

    def close(self) -> None:
        self._connection.close()

    def get_extra_info(self, info: str) -> Any:
        return self._connection if info == "socket" else None


def _reason(error: BaseException) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"{error.response.status_code} {short(error.response.text, 200)}"
    if isinstance(error, FedloomError):
        return str(error)
    return f"{type(error).__name__}: {error}"
