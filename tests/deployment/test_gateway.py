"""The gateway: who is let in, and streams through it, over real sockets with TLS."""

import contextlib
import json
import socket
import ssl
import threading
import time
from dataclasses import replace

import pytest

from fedloom.deployment import gateway, gateway_client, handshake
from fedloom.deployment.flower_fleet import Upstream
from fedloom.deployment.gateway import Gateway, GatewaySettings, source
from fedloom.deployment.gateway_client import GatewayClient, ProtocolMismatch, RunIsOver
from fedloom.deployment.processes import free_port
from fedloom.engines.flower.streams import StreamRequest, StreamResponse, Streams, taken
from fedloom.errors import ConnectionFailed, IdentityError, OutputError, SettingsError
from fedloom.security.certificates import make_authority
from fedloom.security.client_registry import Members
from fedloom.security.keys import make_key, read_key
from fedloom.wire.envelope import PROTOCOL
from fedloom.wire.framing import StreamOver, read_frame

RUN = "0" * 32


class Site:
    def __init__(self, folder, tls=True, **settings):
        self.folder, self.notes, self.offences, self.tls = folder, [], [], tls
        make_authority(folder, ["localhost"])
        self.allow("site-0")
        self.port, self.flower = free_port(), free_port()
        self.gateway = Gateway(
            self.members,
            lambda event, **facts: self.notes.append((event, facts)),
            folder / "s",
            Upstream(
                "127.0.0.1", self.flower, ssl.create_default_context(), folder / "db", 1 << 30
            ),
            GatewaySettings(**settings),
            lambda *violation: self.offences.append(violation),
        )
        certificate = (folder / "server.pem", folder / "server.key") if tls else None
        self.gateway.listen("127.0.0.1", self.port, certificate)

    def members(self):
        return Members(self.folder / "members.toml")

    def allow(self, name):
        public = make_key(self.folder / f"{name}.key")
        return self.members().allow(name, public.read_text())

    def client(self, name="site-0", authority=None, home="a" * 32):
        authority = authority or self.folder / "ca.pem"
        return GatewayClient(
            f"localhost:{self.port}",
            read_key(self.folder / f"{name}.key"),
            authority.read_bytes() if self.tls else None,
            home,
        )

    def stranger(self):
        """A connection with TLS and without a key."""
        return gateway_client.connect(
            f"localhost:{self.port}", (self.folder / "ca.pem").read_bytes() if self.tls else None
        )


@pytest.fixture
def site(tmp_path):
    own = Site(tmp_path)
    yield own
    own.gateway.stop()


@pytest.fixture
def bounded(tmp_path):
    """Make a gateway with other bounds."""
    made = []

    def make(**settings):
        made.append(Site(tmp_path, **settings))
        return made[-1]

    yield make
    for own in made:
        own.gateway.stop()


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_a_client_is_told_its_number(site):
    site.allow("site-1")
    assert site.client("site-1").register().number == 1
    assert until(lambda: site.notes == [("client", {"what": "joins", "client": 1})])


def test_without_tls_keys_are_asked_for_all_the_same(bounded):
    site = bounded(tls=False)
    assert site.client().register().number == 0
    make_key(site.folder / "stranger.key")
    with pytest.raises(IdentityError, match="is not known here"):
        site.client("stranger").register()


def test_unknown_and_revoked_keys_are_turned_away(site):
    make_key(site.folder / "stranger.key")
    with pytest.raises(IdentityError, match="is not known here; the coordinator allows it with"):
        site.client("stranger").register()
    site.members().revoke("site-0")
    with pytest.raises(IdentityError, match="has been revoked"):
        site.client().register()
    assert until(lambda: [event for event, _ in site.notes] == ["refused_client"] * 2)
    assert site.gateway.counts.of("refusals") == {"identity": 2}
    with pytest.raises(IdentityError, match="revoked"), site.client().stream(RUN) as (read, _):
        read(1)


class TestClaims:
    """A proof of a key is good for one connection to one server and one purpose."""

    @pytest.fixture
    def clock(self, monkeypatch):
        """Have clients think that it is another time, in seconds from now."""

        def ahead(seconds):
            real = time.time
            wrong = type("", (), {"time": staticmethod(lambda: real() + seconds)})
            claims = handshake.make_claim

            def make(*words, **named):
                with monkeypatch.context() as own:
                    own.setattr(handshake, "time", wrong)
                    return claims(*words, **named)

            monkeypatch.setattr(handshake, "make_claim", make)

        return ahead

    @pytest.mark.parametrize("ahead", [-299, 0, 3])
    def test_clocks_may_be_minutes_behind_and_seconds_ahead(self, site, clock, ahead):
        clock(ahead)
        assert site.client().register().number == 0

    @pytest.mark.parametrize(
        ("ahead", "reason"),
        [
            (
                -301,
                r"its clock is 30\d\.\d seconds behind the server's, 300 are allowed: set the cl",
            ),
            (-86400, r"its clock is 8640\d\.\d seconds behind the server's"),
            (
                19,
                r"its clock is 1\d\.\d seconds ahead of the server's, 4 are allowed: set the clock",
            ),
            (299, r"its clock is 29\d\.\d seconds ahead of the server's"),
        ],
    )
    def test_which_clock_is_ahead_is_told_with_the_seconds(self, site, clock, ahead, reason):
        clock(ahead)
        with pytest.raises(IdentityError, match=reason):
            site.client().register()
        assert until(lambda: [event for event, _ in site.notes] == ["refused_client"])

    @pytest.mark.parametrize("moment", ["NaN", "Infinity", "-Infinity", '"noon"', "null", "1e999"])
    def test_no_time_at_all(self, claim, moment):
        table = claim.model_dump_json().replace(json.dumps(claim.time), moment)
        assert moment in table
        with pytest.raises(IdentityError, match="does not begin as a fedloom client does"):
            handshake.read_claim(table.encode())

    @pytest.fixture
    def claim(self, tmp_path):
        """What the client of a key says to a server with the certificate b"A" over the nonce b"N"."""
        make_key(tmp_path / "k.key")
        content = handshake.make_claim(
            read_key(tmp_path / "k.key"), b"N", b"A", "stream", "a" * 32, RUN
        )
        return handshake.read_claim(content[handshake.LENGTH.size :])

    def test_it_is_good_for_what_it_was_made_for(self, claim):
        claim.require_proof(b"N", b"A")

    @pytest.mark.parametrize(
        ("nonce", "certificate", "changed"),
        [
            (b"M", b"A", {}),
            (b"N", b"B", {}),
            (b"N", b"", {}),
            (b"N", b"A", {"purpose": "fleet"}),
            (b"N", b"A", {"run": "1" * 32}),
            (b"N", b"A", {"run": ""}),
            (b"N", b"A", {"home": "b" * 32}),
            (b"N", b"A", {"signature": "00"}),
            (b"N", b"A", {"signature": ""}),
        ],
    )
    def test_it_is_worthless_anywhere_else(self, claim, nonce, certificate, changed):
        with pytest.raises(IdentityError, match="does not verify with the key that it names"):
            claim.model_copy(update=changed).require_proof(nonce, certificate)

    def test_another_key_cannot_be_claimed(self, claim, tmp_path):
        public = make_key(tmp_path / "other.key").read_text()
        other = claim.model_copy(update={"key": " ".join(public.split()[:2])})
        with pytest.raises(IdentityError, match="does not verify with the key that it names"):
            other.require_proof(b"N", b"A")

    def test_another_time_cannot_be_claimed(self, claim):
        with pytest.raises(IdentityError, match="does not verify with the key that it names"):
            claim.model_copy(update={"time": claim.time - 1}).require_proof(b"N", b"A")

    def test_a_hostile_server_can_make_nothing_of_it(self, tmp_path):
        """It passes on the nonce of another server at which the same key is registered."""
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        honest, hostile = Site(tmp_path / "a"), tmp_path / "b"
        make_authority(hostile, ["localhost"])
        with honest.stranger() as target:
            greeting = target.recv(handshake.SERVER_NONCE_FRAME)
            listening = socket.create_server(("127.0.0.1", 0))
            took = []

            def relay():
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(hostile / "server.pem", hostile / "server.key")
                with context.wrap_socket(listening.accept()[0], server_side=True) as victim:
                    victim.sendall(greeting)
                    target.sendall(victim.recv(2000))
                    took.append(target.recv(2000))

            thread = threading.Thread(target=relay)
            thread.start()
            victim = GatewayClient(
                f"localhost:{listening.getsockname()[1]}",
                read_key(honest.folder / "site-0.key"),
                (hostile / "ca.pem").read_bytes(),
                "a" * 32,
            )
            with pytest.raises(ConnectionFailed):
                victim.register()
            thread.join()
            listening.close()
        answer = json.loads(took[0][2:])
        assert "for this server" in answer["refused"] and "number" not in answer
        honest.gateway.stop()

    def test_whether_a_key_is_known_is_told_to_who_has_it_alone(self, site, tmp_path):
        public = " ".join((site.folder / "site-0.pub").read_text().split()[:2])
        make_key(tmp_path / "x.key")
        unknown = " ".join((tmp_path / "x.pub").read_text().split()[:2])
        answers = []
        for key in (public, unknown):
            with site.stranger() as connection:
                connection.recv(handshake.SERVER_NONCE_FRAME)
                claim = {"key": key, "purpose": "register", "home": "a" * 32, "time": time.time()}
                connection.sendall(handshake.frame({**claim, "signature": "30"}))
                answers.append(connection.recv(2000))
        assert answers[0] == answers[1] and b"does not verify with the key" in answers[0]


@pytest.fixture
def strangers():
    """What is closed after the test."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def connected(strangers):
    """Connect to a port, from an address of this machine."""

    def connect(port, host="127.0.0.1"):
        own = socket.create_connection(("127.0.0.1", port), source_address=(host, 0))
        return strangers.enter_context(own)

    return connect


class TestBounds:
    """What costs something is bounded before it does."""

    @pytest.mark.parametrize(
        "sent",
        [
            b"POST /v1/control/list-runs HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\xff\xff" + bytes(70000),
            handshake.frame({"purpose": "register"}),
            handshake.frame({"distrust": 3}),
            b"\x02\x00[]",
            b"\x00\x00",
            b"\x00\x04" + b"[" * 1024,
        ],
    )
    def test_who_does_not_begin_as_a_client_is_closed(self, site, sent):
        with site.stranger() as connection:
            assert connection.recv(handshake.SERVER_NONCE_FRAME).startswith(handshake.MAGIC)
            with contextlib.suppress(OSError):
                connection.sendall(sent)
            answer = b""
            with contextlib.suppress(OSError):
                while part := connection.recv(1 << 16):
                    answer += part
        assert b"HTTP" not in answer and b"number" not in answer and len(answer) < 200
        assert until(lambda: site.notes and "does not begin as" in site.notes[0][1]["reason"])
        assert site.client().register().number == 0

    def test_who_says_nothing_is_closed_in_time(self, bounded, connected, strangers):
        site = bounded(handshake_seconds=0.5)
        start = time.monotonic()
        plain = connected(site.port)
        silent = strangers.enter_context(site.stranger())
        half = strangers.enter_context(site.stranger())
        half.sendall(b"\x00\x04[")
        assert plain.recv(1) == b""
        for connection in (silent, half):
            connection.recv(handshake.SERVER_NONCE_FRAME)
            assert connection.recv(1) == b""
        assert 0.4 < time.monotonic() - start < 3
        assert until(lambda: len(site.notes) == 3)
        assert site.gateway.counts.of("refusals") == {"time": 3}
        assert {facts["reason"] for _, facts in site.notes} == {
            "no proof of a key within 0.5 seconds"
        }

    def test_the_oldest_gives_way_and_a_member_gets_through(self, bounded, connected):
        site = bounded(unproven_per_address=5, handshake_seconds=60)
        idle = [connected(site.port) for _ in range(20)]
        assert until(lambda: len(site.notes) == 15)
        assert site.client().register().number == 0
        for connection in idle[:15]:
            assert connection.recv(1) == b""
        assert {facts["reason"] for event, facts in site.notes if event == "refused_client"} == {
            "it was closed for newer connections before it proved a key"
        }

    def test_the_busiest_address_gives_way_where_there_is_no_room(self, bounded, connected):
        site = bounded(unproven=6, handshake_seconds=60)
        quiet = connected(site.port, "127.0.0.3")
        for _ in range(12):
            connected(site.port, "127.0.0.2")
        assert until(lambda: len(site.notes) == 7)
        assert {facts["peer"] for _, facts in site.notes} == {"127.0.0.2"}
        quiet.setblocking(False)
        with pytest.raises(BlockingIOError):
            quiet.recv(1)

    def test_so_many_handshakes_a_second_and_no_more(self, bounded):
        site = bounded(handshakes_per_second=1, handshake_burst=3)
        for _ in range(3):
            assert site.client().register().number == 0
        with pytest.raises(ConnectionFailed):
            site.client().register()
        reasons = lambda: [facts.get("reason") for _, facts in site.notes]  # noqa: E731
        assert until(lambda: "too many connections a second" in reasons())
        time.sleep(1.1)
        assert site.client().register().number == 0

    def test_strangers_of_many_addresses_share_a_rate_and_known_addresses_have_their_own(
        self, bounded, connected
    ):
        site = bounded(unknown_per_second=1, unknown_burst=3, handshake_seconds=60)
        assert site.client().register().number == 0  # from 127.0.0.1, which is known from now on
        strangers = [connected(site.port, f"127.0.0.{last}") for last in range(2, 7)]
        assert until(lambda: site.gateway.counts.of("refusals") == {"rate": 3})
        assert [facts["peer"] for event, facts in site.notes if event == "refused_client"] == [
            f"127.0.0.{last}" for last in (4, 5, 6)
        ]
        assert site.gateway.open_connections()[1] == 2
        for connection in strangers[2:]:
            assert connection.recv(1) == b""
        for _ in range(5):
            assert site.client().register().number == 0
        time.sleep(1.1)
        connected(site.port, "127.0.0.7")
        assert until(lambda: site.gateway.open_connections()[1] == 3)

    def test_one_address_does_not_use_up_the_rate_that_unknown_ones_share(self, bounded, connected):
        site = bounded(
            handshakes_per_second=0.01, handshake_burst=2, unknown_per_second=0.01, unknown_burst=3
        )
        for _ in range(6):
            connected(site.port, "127.0.0.2")
        assert until(lambda: site.gateway.counts.of("refusals") == {"rate": 4})
        connected(site.port, "127.0.0.3")
        assert until(lambda: site.gateway.open_connections()[1] == 3)

    def test_the_address_unused_for_longest_is_forgotten_first(self, site, monkeypatch):
        monkeypatch.setattr(gateway, "KNOWN", 2)
        for address in ("192.0.2.1", "192.0.2.2", "192.0.2.1", "192.0.2.3"):
            site.gateway._remember(address)
        assert list(site.gateway._known) == ["192.0.2.1", "192.0.2.3"]

    def test_one_client_has_its_share_of_connections(self, bounded):
        site = bounded(connections_per_client=6)
        site.allow("site-1")
        with contextlib.ExitStack() as stack:
            for run in (f"{n:032x}" for n in range(6)):
                stack.enter_context(contextlib.closing(Streams(site.folder / "s" / run)))
                stack.enter_context(site.client().stream(run))
            with pytest.raises(ConnectionFailed, match="client 0 has 6 connections open already"):
                site.client().register()
            assert site.client("site-1").register().number == 1

    def test_a_network_of_ipv6_counts_as_one_address(self):
        assert source("2001:db8:1:2:3::1") == source("2001:db8:1:2::9") == "2001:db8:1:2::/64"
        assert source("::ffff:192.0.2.7") == "192.0.2.7" == source("192.0.2.7")
        assert source("fe80::1%eth0") == "fe80::/64"

    def test_settings_are_read_and_mistakes_told(self, tmp_path):
        path = tmp_path / "settings.toml"
        assert GatewaySettings.read(path) == GatewaySettings()
        path.write_text("[gateway]\nunproven = 7\n")
        assert GatewaySettings.read(path).unproven == 7
        path.write_text("[gateway]\nunprove = 7\nconnections = 0\n[door]\n")
        with pytest.raises(SettingsError) as error:
            GatewaySettings.read(path)
        for word in ("gateway.unprove", "gateway.connections", "[door]"):
            assert word in str(error.value)


def test_strangers_cannot_fill_the_log_and_clients_are_still_noted(bounded):
    site, start = bounded(handshake_burst=1000), time.monotonic()
    for _ in range(130):
        with site.stranger() as connection:
            connection.recv(handshake.SERVER_NONCE_FRAME)
            connection.sendall(handshake.make_distrust("why"))
            connection.recv(1)
    site.client().register()
    assert until(lambda: "client" in [event for event, _ in site.notes])
    refused = [event for event, _ in site.notes].count("refused_client")
    assert 100 <= refused <= 101 + (time.monotonic() - start) / 10


def test_a_full_disk_does_not_end_the_gateway(bounded):
    site = bounded()

    def full(event, **facts):
        raise OutputError("cannot write audit.jsonl: No space left on device")

    site.gateway.note = full
    with contextlib.closing(socket.create_connection(("127.0.0.1", site.port))) as stranger:
        stranger.sendall(b"nonsense" * 100)
        assert until(lambda: not site.gateway._unproven)
    for _ in range(2):
        assert site.client().register().number == 0


def test_a_gateway_that_cannot_listen_says_why(tmp_path):
    site = Site(tmp_path)
    with pytest.raises(ConnectionFailed, match=f"cannot listen at 127.0.0.1:{site.port}: "):
        Gateway(site.members, print, tmp_path, None).listen("127.0.0.1", site.port, None)
    (tmp_path / "no.pem").write_text("no certificate")
    with pytest.raises(ConnectionFailed, match=r"no\.pem and its key cannot be used"):
        Gateway(site.members, print, tmp_path, None).listen(
            "127.0.0.1", free_port(), (tmp_path / "no.pem", tmp_path / "server.key")
        )
    site.gateway.stop()


def test_another_authority_is_told(site, tmp_path):
    make_authority(tmp_path / "other", ["localhost"])
    with pytest.raises(IdentityError, match="does not have a certificate of your authority"):
        site.client(authority=tmp_path / "other" / "ca.pem").register()
    assert until(lambda: len(site.notes) == 2)  # the alert of TLS, and why
    ((event, _), (_, told)) = site.notes
    assert event == "refused_client" and told["what"] == "joins"
    assert "it does not trust this server: " in told["reason"]
    assert "key" not in told["reason"] and told["peer"] == "127.0.0.1"


def test_what_is_noted_of_distrust_is_short(site):
    with site.stranger() as connection:
        connection.recv(handshake.SERVER_NONCE_FRAME)
        connection.sendall(handshake.frame({"distrust": "\u001b" * 160}))
        connection.recv(1)
    assert until(lambda: site.notes)
    ((_, told),) = site.notes
    assert len(told["reason"]) < 300 and "\u001b" not in told["reason"]


@pytest.mark.parametrize("speaks", ["nothing", "nonsense"])
def test_who_cannot_be_told_holds_nobody_up(speaks):
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = other.accept()
                    if speaks == "nonsense":
                        connection.sendall(b"HTTP/1.1 400 no\r\n\r\n")
                        connection.close()

        threading.Thread(target=answer, daemon=True).start()
        start = time.monotonic()
        gateway_client._complain(f"127.0.0.1:{other.getsockname()[1]}", "why")
        assert time.monotonic() - start < 3


def test_what_is_no_gateway_is_told(tmp_path):
    make_key(tmp_path / "a.key")
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer():
            with contextlib.suppress(OSError), other.accept()[0] as connection:
                connection.sendall(b"HTTP/1.1 400 no\r\n\r\n" + bytes(100))
                connection.recv(1)

        threading.Thread(target=answer, daemon=True).start()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ProtocolMismatch, match="is not a gateway of fedloom"):
            GatewayClient(address, read_key(tmp_path / "a.key"), None, "a" * 32).register()


@pytest.mark.parametrize(
    ("protocol", "word"), [(PROTOCOL - 1, "an older"), (PROTOCOL + 1, "a newer")]
)
def test_a_server_of_another_protocol_is_told_with_what_to_do(tmp_path, protocol, word):
    make_key(tmp_path / "a.key")
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer():
            with contextlib.suppress(OSError), other.accept()[0] as connection:
                connection.sendall(b"fedloom gateway %d\n" % protocol + bytes(handshake.NONCE))
                connection.recv(1)

        threading.Thread(target=answer, daemon=True).start()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(
            ProtocolMismatch, match=f"has {word} fedloom than this client .*install"
        ):
            GatewayClient(address, read_key(tmp_path / "a.key"), None, "a" * 32).register()


def test_an_expired_certificate_is_told(tmp_path):
    make_authority(tmp_path, ["localhost"], days=0)
    site = Site(tmp_path)
    make_authority(tmp_path, ["localhost"], days=0)
    port = free_port()
    gateway = Gateway(site.members, lambda *a, **k: None, tmp_path / "s", None)
    gateway.listen("127.0.0.1", port, (tmp_path / "server.pem", tmp_path / "server.key"))
    client = replace(site.client(), address=f"localhost:{port}")
    with pytest.raises(ConnectionFailed, match="certificate has expired"):
        client.register()
    gateway.stop()
    site.gateway.stop()


def question(*message, limit=None, rest=None):
    whole = sum(map(len, message))
    return StreamRequest(message, rest or (lambda held: message), whole if limit is None else limit)


def answers(streams, seconds=10):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := list(streams.take(0.1)):
            return found
    return []


def echo(client, stop):
    """A client that sends back what it gets."""
    with contextlib.suppress(ConnectionFailed, OSError), client.stream(RUN) as (read, send):
        while (message := read_frame(read, lambda: 1 << 30)) is not None and not stop.is_set():
            send(message)


@pytest.fixture
def streamed(site):
    streams, stop = Streams(site.folder / "s" / RUN), threading.Event()
    threading.Thread(target=echo, args=(site.client(), stop), daemon=True).start()
    assert until(lambda: 0 in streams)
    yield streams
    stop.set()
    streams.close()


def test_messages_of_any_size_go_there_and_back(streamed):
    for size in (0, 1, 100_000, 9_000_000):
        message = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
        streamed.send(0, question(message))
        arrival = streamed.arrived.get(timeout=20)
        assert arrival.client == 0 and taken(arrival.message) == message
        assert isinstance(arrival.message, bytes) or not arrival.message.exists()


def test_large_messages_go_both_ways_at_once(site):
    """A thread reads while another writes, as a worker does that answers while it is asked again."""
    streams = Streams(site.folder / "s" / RUN)
    with site.client().stream(RUN) as (read, send):
        assert until(lambda: 0 in streams)
        down, up = bytes(range(256)) * 80_000, bytes(range(255, -1, -1)) * 80_000
        for _ in range(3):
            streams.send(0, question(down, limit=len(up)))
            sending = threading.Thread(target=send, args=(up,))
            sending.start()
            assert read_frame(read, lambda: 1 << 30) == down
            sending.join()
            assert taken(streams.arrived.get(timeout=20).message) == up
    streams.close()


def test_two_hundred_round_trips_a_second(streamed):
    message, count = bytes(65536), 100
    start = time.perf_counter()
    for _ in range(count):
        streamed.send(0, question(message))
        assert streamed.arrived.get(timeout=10).message == message
    assert count / (time.perf_counter() - start) > 200


def test_who_sends_more_than_it_may_is_cut_off(streamed):
    number = streamed.send(0, question(bytes(1000), limit=999))
    arrival = streamed.arrived.get(timeout=10)
    assert (arrival.client, arrival.question, arrival.message) == (0, number, None)
    assert arrival.fault.kind == "oversized" and 0 not in streamed


def test_a_client_that_is_let_go_of_on_purpose_is_told(site):
    streams = Streams(site.folder / "s" / RUN)
    with site.client().stream(RUN) as (read, _):
        assert until(lambda: 0 in streams)
        streams.drop(0)
        with pytest.raises(StreamOver):
            read_frame(read, lambda: 10)
    streams.close()


def test_a_client_that_is_revoked_is_let_in_no_longer(site, streamed):
    site.members().revoke("site-0")
    assert 0 in streamed
    site.gateway.follow()
    assert until(lambda: 0 not in streamed)


def test_a_client_that_goes_breaks_its_stream_alone(site, streamed):
    site.allow("site-1")
    stop = threading.Event()
    threading.Thread(target=echo, args=(site.client("site-1"), stop), daemon=True).start()
    assert until(lambda: 1 in streamed)
    stop.set()
    lost = streamed.send(1, question(b"last"))
    assert answers(streamed) == [StreamResponse(1, lost)]
    number = streamed.send(0, question(b"still", b" there"))
    assert answers(streamed) == [StreamResponse(0, number, b"still there")]


def test_no_stream_to_a_run_that_there_is_not(site):
    with (
        pytest.raises(RunIsOver, match="is not under way"),
        site.client().stream("f" * 32) as (read, _),
    ):
        read(1)
    for run in ("../../etc/passwd", "", "f" * 33):
        with pytest.raises((IdentityError, ConnectionFailed, ValueError)):
            site.client().open("stream", run)
