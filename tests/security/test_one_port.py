"""Nothing of Flower answers from the network: its own command line, and every call that it has, against a
federation of real processes that was set up as docs/federation.md says.

What a stranger may reach is listed by hand: a call that a later Flower adds is none of these, and fails.
"""

import contextlib
import http.server
import importlib
import os
import pkgutil
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from fastapi.routing import iter_route_contexts
from flwr import proto
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.superlink.main import create_app
from typer.main import get_command

from fedloom.deployment import flower_fleet, handshake, network_exposure
from fedloom.deployment.gateway_client import GatewayClient
from fedloom.deployment.violations import read_violations
from fedloom.errors import ConnectionFailed
from fedloom.security.keys import read_key
from machines import machines

# Every service and method in the protobuf files of flwr 1.42.0.
SERVICES = {
    "flwr.proto.Control": """
        StartRun StopRun StartAutomation ListAutomations StopAutomation StreamLogs ListRuns ListRunSeries
        GetRunSeries UpdateRunSeriesDescription ListRunSeriesEvents GetLoginDetails GetAuthTokens
        ListConnectors DisconnectConnector BeginConnectorOAuth CompleteConnectorOAuth PullArtifacts
        RegisterNode UnregisterNode ListNodes ListFederations ListApps ListAppAssociations AddApp RemoveApp
        ShowFederation SetFederationIcon CreateFederation ArchiveFederation AddNodeToFederation
        RemoveNodeFromFederation RemoveAccountFromFederation CreateInvitation ListInvitations
        AcceptInvitation RejectInvitation RevokeInvitation ConfigureSimulationFederation StreamRunEvents
    """,
    "flwr.proto.Fleet": """
        RegisterNode ActivateNode DeactivateNode UnregisterNode SendNodeHeartbeat PullMessages PushMessages
        GetRun GetFab PushObject PullObject ConfirmMessageReceived
    """,
    "flwr.proto.GrpcAdapter": "SendReceive",
    "flwr.proto.FlowerService": "Join",
}
SERVICES = {service: methods.split() for service, methods in SERVICES.items()}

# Every path of its server, by interface.
PATHS = {
    "/v1/control/": """
        start-run list-runs list-run-series get-run-series update-run-series-description
        list-run-series-events stop-run stream-logs stream-run-events pull-artifacts start-automation
        list-automations stop-automation get-login-details get-auth-tokens refresh-auth-tokens
        list-connectors disconnect-connector begin-connector-oauth complete-connector-oauth register-node
        unregister-node list-nodes list-federations list-apps list-app-associations add-app remove-app
        show-federation set-federation-icon create-federation archive-federation add-node-to-federation
        remove-node-from-federation remove-account-from-federation create-invitation list-invitations
        accept-invitation reject-invitation revoke-invitation configure-simulation-federation
    """,
    "/v1/runtime/": """
        acquire-task send-task-heartbeat pull-task-input push-task-output push-object pull-object
        confirm-message-received create-task start-automation push-task-message push-task-events
        get-run-series-events get-compacted-contexts put-compacted-context pull-task-message
        record-task-usage get-connector push-logs push-messages pull-messages get-nodes responses
    """,
    "/v1/fleet/": """
        register-node activate-node deactivate-node unregister-node send-node-heartbeat pull-messages
        push-messages get-run get-fab push-object pull-object confirm-message-received
    """,
    "/": "openapi.json docs docs/oauth2-redirect health",
}
PATHS = [prefix + name for prefix, names in PATHS.items() for name in names.split()]

# What an admitted client's own connection may ask for.
FLEET = """
    deactivate-node send-node-heartbeat pull-messages push-messages get-run get-fab push-object
    pull-object confirm-message-received
"""

FLWR = Path(sys.executable).with_name("flwr")
COMMANDS = [
    words.split()
    for words in (
        "ls",
        "list",
        "run {app}",
        "log 1",
        "stop 1",
        "pull 1",
        "login",
        "supernode ls",
        "supernode list",
        "supernode register {key}",
        "supernode unregister 1",
        "federation ls",
        "federation list",
        "federation create x",
        "federation archive x",
        "federation add-supernode 1 x",
        "federation remove-supernode 1 x",
        "federation remove-account x y",
        "federation simulation-config x --num-supernodes 2",
        "federation invite ls",
        "federation invite list",
        "federation invite create x y",
        "federation invite accept x",
        "federation invite reject x",
        "federation invite revoke x y",
    )
]
ELSEWHERE = {"new", "build", "install", "config", "app", "chat"}
"""Commands that work on files of their own, or speak to Flower's hub."""


def test_every_call_that_flower_has_is_known_here():
    found = {}
    for module in pkgutil.iter_modules(proto.__path__):
        if module.name.endswith("_pb2"):
            described = importlib.import_module(f"flwr.proto.{module.name}").DESCRIPTOR
            for service in described.services_by_name.values():
                found[service.full_name] = [method.name for method in service.methods]
    assert {s: sorted(m) for s, m in found.items()} == {s: sorted(m) for s, m in SERVICES.items()}
    paths = {route.path for route in iter_route_contexts(create_app().routes)}
    assert paths == set(PATHS)


def test_what_is_passed_on_is_the_least_that_a_client_needs():
    assert set(flower_fleet.CALLS) == {f"/v1/fleet/{name}" for name in FLEET.split()}
    assert set(network_exposure.PATHS) <= set(PATHS)
    interfaces = {path.rpartition("/")[0] for path in PATHS}
    assert {path.rpartition("/")[0] for path in network_exposure.PATHS} >= interfaces - {"/docs"}


@pytest.fixture(scope="module")
def site():
    """A server as it is set up for a federation, a client's key, and a stranger's."""
    with machines(1) as own:
        (own.server / "settings.toml").write_text(  # so that each question here is heard
            "[gateway]\nhandshakes_per_second = 1e4\nhandshake_burst = 100000\n"
            "unknown_per_second = 1e4\nunknown_burst = 100000\n"
        )
        own.start_server()
        own.call("keys", "new", "stranger.key")
        yield own


@pytest.fixture(scope="module")
def flwr(site):
    """Call Flower's command line, pointed at the public port; it knows the federation's authority."""
    home = site.folder / "stranger"
    home.mkdir()
    marker = site.folder / "was-run"
    app = site.folder / "evil"
    app.mkdir()
    (app / "pyproject.toml").write_text(
        '[project]\nname = "evil"\nversion = "1.0.0"\nlicense = "Apache-2.0"\n'
        'dependencies = ["flwr"]\n[tool.flwr.app]\npublisher = "evil"\n'
        '[tool.flwr.app.components]\nserverapp = "evil:app"\nclientapp = "evil:app"\n'
    )
    (app / "evil.py").write_text(f"open({str(marker)!r}, 'w')\napp = None\n")

    def call(*words, tls=True):
        proof = f'root-certificates = "{site.server / "ca.pem"}"' if tls else "insecure = true"
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "there"\n[superlink.there]\naddress = "localhost:{site.port}"\n{proof}\n'
        )
        own = {"link": "there", "app": str(app), "key": str(site.folder / "stranger.pub")}
        return subprocess.run(
            [str(FLWR), *(word.format(**own) for word in words)],
            env={**os.environ, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    yield call
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_flowers_command_line_gets_no_answer(flwr, site, words):
    done = flwr(*words, "{link}")
    said = " ".join((done.stdout + done.stderr).replace("│", " ").split())
    assert done.returncode != 0
    assert "Connection to the SuperLink is unavailable" in said
    assert not list((site.server / "flower").glob("apps/*evil*"))
    assert client_of(site).register().number == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_these_are_all_commands_that_speak_to_a_server():
    from flwr.cli.app import app  # it warns

    def leaves(command, path=()):
        if not hasattr(command, "commands"):
            return [path]
        return [
            leaf for name, own in command.commands.items() for leaf in leaves(own, (*path, name))
        ]

    speaking = {leaf for leaf in leaves(get_command(app)) if leaf[0] not in ELSEWHERE}
    asked = {tuple(words[: len(leaf)]) for words in COMMANDS for leaf in speaking}
    assert speaking <= asked


def client_of(site):
    """The client that is let in."""
    return GatewayClient(
        f"localhost:{site.port}",
        read_key(site.folder / "0.key"),
        (site.server / "ca.pem").read_bytes(),
        "a" * 32,
    )


def counted(site):
    """How many violations of that client have been counted."""
    standings = read_violations(site.server / "offences.jsonl").clients
    return sum(standings[0].kinds.values()) if 0 in standings else 0


def until_counted(site, count):
    end = time.monotonic() + 10
    while counted(site) < count and time.monotonic() < end:
        time.sleep(0.05)
    return counted(site) == count


def answered(port, request, authority=None):
    """Return what comes back for bytes of a stranger."""
    answer = b""
    with contextlib.suppress(OSError):
        connection = socket.create_connection(("localhost", port), 5)
        if authority is not None:
            context = ssl.create_default_context(cafile=authority)
            connection = context.wrap_socket(connection, server_hostname="localhost")
        with connection:
            connection.settimeout(5)
            connection.sendall(request)
            while part := connection.recv(1 << 16):
                answer += part
    return answer


@pytest.mark.slow
def test_no_path_answers_over_http(site):
    table = []
    for tls in (site.server / "ca.pem", None):
        for path in PATHS:
            for method in ("POST", "GET"):
                request = (
                    f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n"
                )
                answer = answered(site.port, request.encode(), tls)
                table.append((method, path, tls is not None, answer))
                assert b"HTTP" not in answer and len(answer) < 200, table[-1]
                assert tls is None or answer.startswith(
                    handshake.MAGIC
                )  # it is there, and says no more
    assert len(table) == 4 * len(PATHS) and client_of(site).register().number == 0


@pytest.mark.slow
def test_no_method_answers_over_grpc(site):
    credentials = grpc.ssl_channel_credentials((site.server / "ca.pem").read_bytes())
    address = f"localhost:{site.port}"
    for channel in (grpc.secure_channel(address, credentials), grpc.insecure_channel(address)):
        with channel:
            for service, methods in SERVICES.items():
                for method in methods:
                    call = channel.unary_unary(f"/{service}/{method}")
                    with pytest.raises(grpc.RpcError) as error:
                        call(b"", timeout=2)
                    assert error.value.code() in (
                        grpc.StatusCode.UNAVAILABLE,
                        grpc.StatusCode.DEADLINE_EXCEEDED,
                    ), (service, method)
    assert client_of(site).register().number == 0


@pytest.mark.slow
def test_a_client_that_is_let_in_reaches_its_calls_and_nothing_else(site):
    for path in PATHS:
        connection, _ = client_of(site).open("fleet")
        with connection:
            request = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
            connection.sendall(request.encode())
            connection.settimeout(10)
            status = int(re.match(rb"HTTP/1.1 (\d+)", connection.recv(1 << 16))[1])
        # its own calls come to Flower, which misses what they are of; of messages there is none
        passed = path in flower_fleet.CALLS and path != "/v1/fleet/push-messages"
        assert status in (400, 401, 415, 422) if passed else status == 403, path


@pytest.mark.slow
def test_a_client_is_no_other_node_than_its_own(site):
    """The gateway signs for the node of whoever has proven its key, whatever the body says."""
    for stranger, status in ((0, 200), (1, 401)):
        connection, card = client_of(site).open("fleet")
        node = Node(node_id=card.node + stranger)
        body = SendNodeHeartbeatRequest(node=node, heartbeat_interval=30).SerializeToString()
        head = f"content-type: application/protobuf\r\ncontent-length: {len(body)}\r\n"
        with connection:
            request = f"POST /v1/fleet/send-node-heartbeat HTTP/1.1\r\nhost: x\r\n{head}\r\n"
            connection.sendall(request.encode() + body)
            connection.settimeout(10)
            answer = connection.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 %d" % status), answer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "headers", "status"),
    [
        ("POST /v1/fleet/../control/list-runs", {}, 403),
        ("POST /v1/fleet/%2e%2e/control/list-runs", {}, 403),
        ("POST //v1/control/list-runs", {}, 403),
        ("POST /v1/fleet/pull-messages?x=1", {}, 403),
        ("POST /v1/fleet/pull-messages/", {}, 403),
        ("POST http://localhost/v1/control/list-runs", {}, 403),
        ("GET /v1/fleet/pull-messages", {}, 403),
        ("CONNECT 127.0.0.1:22", {}, 403),
        ("POST /v1/fleet/pull-messages", {"content-length": None, "transfer-encoding": "chunked"}, 411),
        ("POST /v1/fleet/pull-messages", {"content-length": "1000000000"}, 413),
        ("POST /v1/fleet/push-object", {"content-length": str(1 << 30)}, 413),
        ("POST /v1/fleet/pull-messages", {"content-length": "-1"}, 400),
        ("POST /v1/fleet/pull-messages", {"content-length": "1, 2"}, 400),
        ("POST /v1/fleet/pull-messages", {"x": "y" * 40000}, 400),
    ],
)  # fmt: skip
def test_what_a_client_that_is_let_in_may_not_say(site, line, headers, status):
    said = {"host": "x", "content-length": "0", **headers}
    text = f"{line} HTTP/1.1\r\n" + "".join(
        f"{k}: {v}\r\n" for k, v in said.items() if v is not None
    )
    before = counted(site)
    connection, _ = client_of(site).open("fleet")
    with connection:
        connection.sendall(text.encode() + b"\r\n")
        connection.settimeout(10)
        answer = connection.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 %d" % status), answer
        with contextlib.suppress(OSError):
            assert connection.recv(1 << 16) == b""  # and the connection is over
    assert until_counted(site, before + 1)


@pytest.mark.slow
def test_flowers_server_cannot_be_reached_from_outside(site):
    """Nor by another user of its own machine."""
    listening = []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == "0A":
            listening.append(words[1])
    private = re.search(r"flower = (\d+)", (site.server / "server.toml").read_text())[1]
    own = [where for where in listening if int(where.split(":")[1], 16) == int(private)]
    assert own == [f"0100007F:{int(private):04X}"]


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_another_user_of_the_servers_machine_gets_no_answer(site):
    private = int(re.search(r"flower = (\d+)", (site.server / "server.toml").read_text())[1])
    code = (
        "import ssl,socket,sys\n"
        "c=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT);c.check_hostname=False;c.verify_mode=0\n"
        f"s=c.wrap_socket(socket.create_connection(('127.0.0.1',{private}),5))\n"
        "s.settimeout(5)\n"
        "try:\n s.sendall(b'GET /health HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n');print(s.recv(999)[:12])\n"
        "except OSError as e: print('closed',type(e).__name__)\n"
    )
    for user, expected in ((None, "HTTP/1.1"), (65534, None)):
        done = subprocess.run(
            [
                "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable,
                "-c",
                code,
            ],
            user=user,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        if expected:
            assert expected in done.stdout, done
        else:
            assert (
                "HTTP" not in done.stdout and done.stdout.strip() in ("b''",)
            ) or "closed" in done.stdout


def test_a_server_that_would_show_flower_to_the_network_does_not_serve():
    """The check at its start, against something that answers as Flower does."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(404)
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *words):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(
            ConnectionFailed, match="answers 'POST /v1/control/list-runs' without a proof"
        ):
            network_exposure.require_unexposed("127.0.0.1", other.server_port, tls=False, private=1)
        other.shutdown()
    own = grpc.server(ThreadPoolExecutor(1))
    port = own.add_insecure_port("127.0.0.1:0")
    own.start()
    with pytest.raises(
        ConnectionFailed, match="without a proof of a key; this server does not serve"
    ):
        network_exposure.require_unexposed("127.0.0.1", port, tls=False, private=1)
    own.stop(None)
