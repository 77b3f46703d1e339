"""Clients behind a proxy: real tunnels to a real gateway, under a name that the proxy alone can look up."""

import base64
import contextlib
import os
import socket
import threading
import time

import pytest

from fedloom.deployment import gateway_client
from fedloom.deployment.client import join
from fedloom.deployment.folders import ClientFolder
from fedloom.deployment.gateway import Gateway
from fedloom.deployment.gateway_client import GatewayClient
from fedloom.deployment.processes import free_port
from fedloom.deployment.proxy import LONGEST, bypass_for_loopback, find_proxy
from fedloom.errors import ConnectionFailed, IdentityError, SettingsError
from fedloom.security.certificates import make_authority
from fedloom.security.client_registry import Members
from fedloom.security.keys import make_key, read_key
from fedloom.wire.framing import serve_each
from machines import machines

SERVER = "fed.test"
OPENED = b"HTTP/1.1 200 Connection established\r\nVia: 1.1 test\r\n\r\n"
USER, PASSWORD = "dr@site", "s3sam7/cr:t %x"
ENCODED = "dr%40site:s3sam7%2Fcr%3At%20%25x"
BASIC = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
SECRETS = (PASSWORD, ENCODED.partition(":")[2], "s3sam7", BASIC)


class ForwardProxy:
    """A proxy that opens every tunnel to one port of this machine, whatever host is asked for.

    `answer` stands for what it does with a connection instead, once it has read the request.
    """

    def __init__(self, target, credentials="", answer=None, eager=False):
        self.target, self.credentials, self.answer, self.eager = target, credentials, answer, eager
        self.requests = []
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        serve_each(self.listening, self.serve)

    def serve(self, client):
        with client, contextlib.suppress(OSError):
            request = b""
            while not request.endswith(b"\r\n\r\n"):
                request += client.recv(1)
            self.requests.append(request)
            if self.answer is not None:
                self.answer(client)
            elif self.credentials and f"Basic {self.credentials}\r\n".encode() not in request:
                client.sendall(
                    b"HTTP/1.1 407 Proxy Authentication Required\r\n"
                    b'Proxy-Authenticate: Negotiate\r\nProxy-Authenticate: Basic realm="x"\r\n\r\n'
                )
            else:
                self.tunnel(client)

    def tunnel(self, client):
        with socket.create_connection(("127.0.0.1", self.target)) as server:
            client.sendall(OPENED + (server.recv(1 << 16) if self.eager else b""))
            back = threading.Thread(target=pass_on, args=(server, client), daemon=True)
            back.start()
            pass_on(client, server)
            back.join()

    def close(self):
        self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()


def pass_on(source, target):
    with contextlib.suppress(OSError):
        while content := source.recv(1 << 16):
            target.sendall(content)
    for own in (source, target):
        with contextlib.suppress(OSError):
            own.shutdown(socket.SHUT_RDWR)


def says(content):
    """What a proxy does that says this and ends the connection."""

    def answer(client):
        client.sendall(content)
        client.shutdown(socket.SHUT_WR)
        client.recv(1)  # until the client ends it as well: no reset takes the answer away

    return answer


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No proxy, whatever these tests are run with; returns how to name one."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    return monkeypatch.setenv


class Federation:
    def __init__(self, folder, tls):
        self.folder, self.notes = folder, []
        self.authority = folder / "ca.pem" if tls else None
        make_authority(folder, [SERVER])
        public = make_key(folder / "own.key").read_text()
        Members(folder / "members.toml").allow("site-0", public)
        self.port = free_port()
        self.gateway = Gateway(
            lambda: Members(folder / "members.toml"),
            lambda event, **facts: self.notes.append(facts),
            folder / "s",
            None,
        )
        certificate = (folder / "server.pem", folder / "server.key") if tls else None
        self.gateway.listen("127.0.0.1", self.port, certificate)

    def register(self, authority=None, server=f"{SERVER}:443"):
        authority = authority or self.authority
        content = authority.read_bytes() if authority else None
        client = GatewayClient(server, read_key(self.folder / "own.key"), content, "a" * 32)
        return client.register().number


@pytest.fixture
def stack():
    with contextlib.ExitStack() as own:
        yield own


@pytest.fixture
def started(tmp_path, stack):
    """Start a federation."""

    def start(tls=True):
        own = Federation(tmp_path, tls)
        stack.callback(own.gateway.stop)
        return own

    return start


@pytest.fixture
def federation(started):
    return started()


@pytest.fixture
def proxy(stack, environment):
    """Start a proxy and name it in the environment."""

    def start(target=9, user="", name="HTTPS_PROXY", **behaviour):
        own = stack.enter_context(contextlib.closing(ForwardProxy(target, **behaviour)))
        environment(name, f"http://{user}{own.address}/")
        return own

    return start


def refusal(federation, kind=ConnectionFailed):
    """Return what a client is told, which never has a secret."""
    with pytest.raises(kind) as error:
        federation.register()
    told = str(error.value)
    assert not any(secret in told for secret in SECRETS) and told.isprintable()
    return told


class TestTunnels:
    @pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])
    def test_a_client_comes_in(self, federation, proxy, name):
        own = proxy(federation.port, name=name)
        assert federation.register() == 0
        assert own.requests == [b"CONNECT fed.test:443 HTTP/1.1\r\nHost: fed.test:443\r\n\r\n"]

    def test_without_the_proxy_there_is_no_way(self, federation):
        told = refusal(federation)
        assert told.startswith("nobody answers at fed.test:443: ") and "proxy" not in told

    def test_a_user_and_password_are_decoded(self, federation, proxy):
        own = proxy(federation.port, credentials=BASIC, user=f"{ENCODED}@")
        assert federation.register() == 0
        assert own.requests[0].endswith(f"\r\nProxy-Authorization: Basic {BASIC}\r\n\r\n".encode())

    def test_what_follows_the_header_is_the_servers(self, started, proxy):
        """Without TLS the server speaks first: its greeting may come together with the header."""
        federation = started(tls=False)
        proxy(federation.port, eager=True)
        assert federation.register() == 0

    def test_an_address_of_ipv6_stands_in_brackets(self, federation, proxy):
        own = proxy(federation.port)
        with pytest.raises(IdentityError, match="IP address mismatch"):
            federation.register(server="[2001:db8::1]:443")
        assert own.requests[0].startswith(
            b"CONNECT [2001:db8::1]:443 HTTP/1.1\r\nHost: [2001:db8::1]:443\r\n"
        )

    def test_the_server_is_verified_and_told_why_not(self, federation, proxy, tmp_path):
        own = proxy(federation.port, credentials=BASIC, user=f"{ENCODED}@")
        make_authority(tmp_path / "other", [SERVER])
        with pytest.raises(IdentityError) as error:
            federation.register(tmp_path / "other" / "ca.pem")
        told = str(error.value)
        assert (
            f"fed.test:443 (through the proxy at {own.address}) does not have a certificate of your authority"
            in told
        )
        assert "TLS inspection" in told and not any(secret in told for secret in SECRETS)
        end = time.monotonic() + 10
        while not any("it does not trust this server" in n["reason"] for n in federation.notes):
            assert time.monotonic() < end
            time.sleep(0.01)
        assert len(own.requests) == 2

    def test_another_name_is_not_the_servers(self, federation, proxy):
        proxy(federation.port)
        with pytest.raises(IdentityError, match="Hostname mismatch"):
            federation.register(server="other.test:443")

    def test_who_is_not_let_in_is_told_by_which_way(self, federation, proxy):
        own = proxy(federation.port)
        Members(federation.folder / "members.toml").revoke("site-0")
        told = refusal(federation, IdentityError)
        assert f"(through the proxy at {own.address}) does not admit this client" in told


class TestRefusals:
    def test_a_proxy_that_asks_for_credentials(self, federation, proxy):
        own = proxy(federation.port, credentials=BASIC)
        told = refusal(federation)
        assert f"the proxy at {own.address} asks for a user and password: 407 Proxy" in told
        assert f"HTTPS_PROXY=http://USER:PASSWORD@{own.address}" in told

    def test_wrong_credentials(self, federation, proxy):
        own = proxy(federation.port, credentials="other", user=f"{ENCODED}@")
        told = refusal(federation)
        assert f"the proxy at {own.address} refuses the user and password: 407 Proxy" in told

    def test_credentials_of_a_kind_that_is_not_supported(self, federation, proxy):
        header = b"Proxy-Authenticate: Negotiate\r\nproxy-authenticate: NTLM\r\n\r\n"
        own = proxy(answer=says(b"HTTP/1.1 407 No\r\n" + header), user=f"{ENCODED}@")
        told = refusal(federation)
        assert f"the proxy at {own.address} asks for credentials of a kind that is not" in told
        assert "407 No (Negotiate, NTLM)" in told

    @pytest.mark.parametrize(
        "status", ["403 Forbidden", "503 Service Unavailable", "301 Moved", "100"]
    )
    def test_a_proxy_that_opens_none(self, federation, proxy, status):
        own = proxy(answer=says(f"HTTP/1.1 {status}\r\nContent-Length: 1\r\n\r\nx".encode()))
        told = refusal(federation)
        assert f"the proxy at {own.address} opens no connection to fed.test:443: {status};" in told
        assert "port 443 alone" in told

    def test_words_of_a_proxy_are_printable_and_few(self, federation, proxy):
        proxy(answer=says(b"HTTP/1.1 403 \x1b[2J" + b"no " * 2000 + b"\r\n\r\n"))
        told = refusal(federation)
        assert "403 ?[2Jno no" in told and len(told) < 500

    @pytest.mark.parametrize("content", [b"SSH-2.0-x\r\n\r\n", b"HTTP/2 200\r\n\r\n", b"\n\n\n"])
    def test_what_is_no_proxy(self, federation, proxy, content):
        own = proxy(answer=says(content))
        assert f"what listens at {own.address} is not an HTTP proxy" in refusal(federation)

    @pytest.mark.parametrize("host", ["127.0.0.1", "proxy.test", "proxy..test"])
    def test_a_proxy_that_is_not_there(self, federation, environment, host):
        port = free_port()
        environment("HTTPS_PROXY", f"http://{ENCODED}@{host}:{port}")
        assert f"nobody answers at the proxy at {host}:{port}: " in refusal(federation)

    def test_a_proxy_that_ends_the_tunnel_at_once(self, federation, proxy):
        own = proxy(answer=says(OPENED))
        told = refusal(federation)
        assert f"fed.test:443 (through the proxy at {own.address}) closed the connection" in told

    @pytest.mark.parametrize("content", [b"", b"HTTP/1.1 200 OK\r\n"])
    def test_a_proxy_that_closes_without_an_answer(self, federation, proxy, content):
        own = proxy(answer=says(content))
        told = refusal(federation)
        assert (
            f"the proxy at {own.address} gave no answer when it was asked for fed.test:443" in told
        )
        assert "it closed the connection" in told


class TestBounds:
    """A proxy that does not come to an end costs neither time nor memory."""

    @pytest.mark.parametrize("content", [b"", b"x"])
    def test_in_time(self, federation, proxy, monkeypatch, content):
        """Nothing is said, or a byte now and then, each of them in time."""
        monkeypatch.setattr(gateway_client, "TIMEOUT", 0.5)
        over = threading.Event()

        def drip(client):
            for _ in range(40):
                if not over.wait(0.1):
                    client.sendall(content)

        own = proxy(answer=drip)
        start = time.monotonic()
        told = refusal(federation)
        over.set()
        assert 0.4 < time.monotonic() - start < 3
        assert f"the proxy at {own.address} gave no answer" in told and "timed out" in told

    def test_in_bytes(self, federation, proxy):
        def flood(client):
            client.sendall(b"HTTP/1.1 200 OK\r\n")
            while True:
                client.sendall(b"X-Header: more\r\n" * 4096)

        proxy(answer=flood)
        assert f"its header has more than {LONGEST} bytes" in refusal(federation)


class TestWhichProxy:
    @pytest.mark.parametrize(
        ("variables", "found"),
        [
            ({}, None),
            ({"HTTP_PROXY": "http://a:1"}, None),
            ({"HTTPS_PROXY": "http://a:1", "ALL_PROXY": "http://b:2"}, "a:1"),
            ({"HTTPS_PROXY": "http://a:1", "https_proxy": "http://b:2"}, "b:2"),
            ({"HTTPS_PROXY": "http://a:1", "https_proxy": ""}, None),
            ({"HTTPS_PROXY": "HTTP://a:1"}, "a:1"),
            ({"HTTPS_PROXY": "a:1"}, "a:1"),
            ({"HTTPS_PROXY": "http://a"}, "a:80"),
            ({"HTTPS_PROXY": "http://[2001:db8::1]:3128/"}, "[2001:db8::1]:3128"),
            ({"HTTPS_PROXY": f"http://{ENCODED}@a:1"}, "a:1"),
        ],
    )
    def test_variables(self, environment, variables, found):
        for name, value in variables.items():
            environment(name, value)
        own = find_proxy(SERVER, 443)
        assert found == (None if own is None else str(own))
        assert own is None or not any(secret in repr(own) for secret in SECRETS)

    @pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
    @pytest.mark.parametrize(
        ("value", "direct"),
        [
            ("*", True),
            ("other.test, fed.test", True),
            ("FED.test", True),
            (".test", True),
            ("fed.test:443", True),
            ("fed.test:9092", False),
            ("ed.test", False),
            ("", False),
        ],
    )
    def test_hosts_that_are_reached_without(self, environment, name, value, direct):
        environment("HTTPS_PROXY", "socks5://unused")
        environment(name, value)
        if direct:
            assert find_proxy(SERVER, 443) is None
        else:
            with pytest.raises(SettingsError):
                find_proxy(SERVER, 443)

    @pytest.mark.parametrize("value", ["2001:db8::1", "[2001:db8::1]", "[2001:db8::1]:443"])
    def test_addresses_of_ipv6_that_are_reached_without(self, environment, value):
        environment("HTTPS_PROXY", "http://a:1")
        environment("NO_PROXY", value)
        assert find_proxy("2001:db8::1", 443) is None
        assert find_proxy("2001:db8::2", 443) is not None

    def test_no_proxy_is_heeded_by_connections(self, federation, proxy, environment):
        own = proxy(federation.port)
        environment("NO_PROXY", "test")
        assert "proxy" not in refusal(federation) and own.requests == []

    @pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "127.0.0.1", "127.1.2.3", "::1"])
    def test_this_machine_is_reached_without(self, environment, host):
        environment("HTTPS_PROXY", "http://a:1")
        assert find_proxy(host, 443) is None
        assert find_proxy("10.0.0.1", 443) is not None

    @pytest.mark.parametrize(
        ("before", "after"),
        [("", "localhost,127.0.0.1"), ("a.test", "a.test,localhost,127.0.0.1"), ("*", "*")],
    )
    def test_http_clients_reach_this_machine_without(self, environment, before, after):
        environment("no_proxy", before)
        bypass_for_loopback()
        assert os.environ["no_proxy"] == after

    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            (f"https://{ENCODED}@proxy.test:3128", "'https://***@proxy.test:3128': proxies are"),
            (f"socks5://{ENCODED}@proxy.test:1080", "'socks5://***@proxy.test:1080': proxies are"),
            (
                "http://dr:s3sam7/cr@proxy.test:3128",
                "'http://***@proxy.test:3128': it is not a URL",
            ),
            ("http://dr:s3#cr@proxy.test:3128", "'http://***@proxy.test:3128': it is not a URL"),
            ("http://dr:1#s3@proxy.test:3128", "'http://***@proxy.test:3128': it is not a URL"),
            ("http:/dr:s3@proxy.test:3128", "'***@proxy.test:3128': it is not a URL"),
            ("http://dr:s3@cr\n@proxy.test:1", "'http://***@proxy.test:1': it is not a URL"),
            ("http://dr:s3\udcff@proxy.test:1", "'http://***@proxy.test:1': it is not a URL"),
            ("http://proxy.test:99999", "'http://proxy.test:99999': it is not a URL"),
            ("http://proxy.test:port", "'http://proxy.test:port': it is not a URL"),
            ("http://proxy test:1", "'http://proxy test:1': it is not a URL"),
            ("http://", "'http://': it is not a URL"),
        ],
    )
    @pytest.mark.parametrize("name", ["HTTPS_PROXY", "ALL_PROXY"])
    def test_what_cannot_be_used_is_told_before_anything_else(
        self, environment, tmp_path, name, url, shown
    ):
        environment(name, url)
        with pytest.raises(SettingsError) as error:
            join(ClientFolder(tmp_path), f"{SERVER}:443", key=tmp_path / "none", authority=None)
        told = str(error.value)
        assert f"the environment has 1 mistake:\n  - {name} is {shown}" in told
        assert not any(secret in told for secret in SECRETS)


@pytest.mark.slow
def test_a_client_takes_part_through_the_proxy_alone(experiment, environment):
    """A server behind a proxy of its own does not ask that one for its own machine.

    Another program's ``ALL_PROXY``, of a kind that is not supported here, does no harm either.
    """
    settings = experiment(federation={"clients": 1, "rounds": 1, "patience": 60})
    with machines(1) as own, contextlib.closing(ForwardProxy(own.port, BASIC)) as proxy:
        own.call("certs", "--home", own.server, "--host", "localhost", "--host", SERVER)
        environment("HTTPS_PROXY", f"http://127.0.0.1:{free_port()}")
        own.start_server()
        environment("HTTPS_PROXY", f"http://{ENCODED}@{proxy.address}")
        environment("ALL_PROXY", "socks5://127.0.0.1:9")
        log = own.start("c0", *own.joining(0, server=f"{SERVER}:443"))
        own.wait(log, f"joined {SERVER}:443")
        folder = own.run(settings, "there")
        assert (folder / "adapter" / "adapter_model.safetensors").is_file()
        assert (
            len(proxy.requests) >= 4
        )  # it registers, asks for messages, says that it is there, a stream
        assert {own.split(b"\r\n")[0] for own in proxy.requests} == {
            b"CONNECT fed.test:443 HTTP/1.1"
        }
        worker = (own.folder / "c0" / "worker.log").read_text()
        assert f"stream to {SERVER}:443" in worker and "stream broke" not in worker
        told = log.read_text()
        assert told.count(f"connecting to {SERVER}:443 through the proxy at {proxy.address}") == 1
        assert not any(secret in told + worker for secret in SECRETS)
