"""The door: who may knock, and streams through it, over real sockets with TLS."""

import contextlib
import socket
import threading
import time

import pytest

from fedloom.deployment import door as doors
from fedloom.deployment.children import free_port
from fedloom.deployment.door import Caller, Door, serve
from fedloom.engines.frames import read_frame
from fedloom.engines.streams import Arrival, Question, Streams, taken
from fedloom.errors import ConnectionFailed, IdentityError
from fedloom.identity import Members, make_authority, make_key, read_key

RUN = "0" * 32


class Site:
    def __init__(self, folder):
        self.folder, self.notes = folder, []
        make_authority(folder, ["localhost"])
        self.allow("site-0")
        self.port = free_port()
        own = Door(
            self.members, lambda event, **facts: self.notes.append((event, facts)),
            folder / "s", 9092,
        )  # fmt: skip
        certificate = (folder / "server.key").read_bytes(), (folder / "server.pem").read_bytes()
        self.server = serve(own, f"localhost:{self.port}", certificate)

    def members(self):
        return Members(self.folder / "clients.toml")

    def allow(self, name):
        public = make_key(self.folder / f"{name}.key")
        return self.members().allow(name, public.read_text())

    def caller(self, name="site-0", authority=None):
        authority = authority or self.folder / "ca.pem"
        return Caller(
            f"localhost:{self.port}", read_key(self.folder / f"{name}.key"), authority.read_bytes()
        )


@pytest.fixture
def site(tmp_path):
    own = Site(tmp_path)
    yield own
    own.server.stop(None).wait(5)


def test_a_client_is_told_its_number(site):
    site.allow("site-1")
    assert site.caller("site-1").knock() == doors.Welcome(1, 9092)
    assert site.notes == [("client", {"what": "joins", "client": 1})]


def test_unknown_and_revoked_keys_are_turned_away(site):
    make_key(site.folder / "stranger.key")
    with pytest.raises(IdentityError, match="is not known here; the coordinator lets it in with"):
        site.caller("stranger").knock()
    site.members().revoke("site-0")
    with pytest.raises(IdentityError, match="has been revoked"):
        site.caller().knock()
    assert [event for event, _ in site.notes] == ["refused_client"] * 2
    with pytest.raises(IdentityError, match="revoked"), site.caller().stream(RUN) as (read, _):
        read(1)


def test_clocks_may_differ_by_minutes(site, monkeypatch):
    real = time.time
    monkeypatch.setattr(doors, "SKEW", -1)
    with pytest.raises(IdentityError, match="its clock and the server's are 0 seconds apart, -1"):
        site.caller().knock()
    monkeypatch.setattr(doors, "SKEW", 300)
    monkeypatch.setattr(doors.time, "time", lambda: real() + 100)
    assert site.caller().knock().number == 0


def test_a_signature_of_another_key_or_call_is_turned_away(site, monkeypatch):
    site.allow("site-1")
    other = read_key(site.folder / "site-1.key")
    real = doors.sign
    monkeypatch.setattr(doors, "sign", lambda key, content: real(other, content))
    with pytest.raises(IdentityError, match="not one of the key that it names"):
        site.caller().knock()
    monkeypatch.setattr(doors, "sign", lambda key, content: real(key, content + b"x"))
    with pytest.raises(IdentityError, match="not one of the key that it names"):
        site.caller().knock()


def test_another_authority_is_told(site, tmp_path):
    make_authority(tmp_path / "other", ["localhost"])
    with pytest.raises(ConnectionFailed, match="not the one that your authority vouches for"):
        site.caller(authority=tmp_path / "other" / "ca.pem").knock()
    ((event, told),) = site.notes
    assert event == "refused_client" and told["what"] == "joins" and "peer" in told
    assert "it does not trust this server: " in told["reason"]
    assert "key" not in told["reason"] and told["peer"].startswith("ipv")


def test_what_is_noted_of_distrust_is_short(site):
    credentials = doors.grpc.ssl_channel_credentials((site.folder / "server.pem").read_bytes())
    with doors.grpc.secure_channel(f"localhost:{site.port}", credentials) as channel:
        channel.unary_unary(doors.DISTRUST)(b"\xff" * 100_000, timeout=5)
    ((_, told),) = site.notes
    assert len(told["reason"]) < 300


@pytest.mark.parametrize("speaks", ["nothing", "nonsense"])
def test_who_cannot_be_told_holds_nobody_up(monkeypatch, speaks):
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
        doors._complain(f"127.0.0.1:{other.getsockname()[1]}", "why")
        assert time.monotonic() - start < 3


def test_an_expired_certificate_is_told(tmp_path):
    make_authority(tmp_path, ["localhost"], days=0)
    port = free_port()
    make_key(tmp_path / "a.key")
    certificate = (tmp_path / "server.key").read_bytes(), (tmp_path / "server.pem").read_bytes()
    own = Door(lambda: Members(tmp_path / "c"), lambda *a, **k: None, tmp_path / "s", 1)
    server = serve(own, f"localhost:{port}", certificate)
    caller = Caller(
        f"localhost:{port}", read_key(tmp_path / "a.key"), (tmp_path / "ca.pem").read_bytes()
    )
    with pytest.raises(ConnectionFailed, match="certificate has expired"):
        caller.knock()
    server.stop(None).wait(5)


def question(*message, limit=None, rest=None):
    whole = sum(map(len, message))
    return Question(message, rest or (lambda held: message), whole if limit is None else limit)


def answers(streams, seconds=10):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := list(streams.take(0.1)):
            return found
    return []


def echo(caller, stop):
    """A client that sends back what it gets."""
    with contextlib.suppress(ConnectionFailed), caller.stream(RUN) as (read, send):
        while (message := read_frame(read, lambda: 1 << 30)) is not None and not stop.is_set():
            send(message)


@pytest.fixture
def streamed(site):
    streams, stop = Streams(site.folder / "s" / RUN), threading.Event()
    threading.Thread(target=echo, args=(site.caller(), stop), daemon=True).start()
    end = time.monotonic() + 10
    while 0 not in streams and time.monotonic() < end:
        time.sleep(0.01)
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


def test_two_hundred_round_trips_a_second(streamed):
    message, count = bytes(65536), 100
    start = time.perf_counter()
    for _ in range(count):
        streamed.send(0, question(message))
        assert streamed.arrived.get(timeout=10).message == message
    assert count / (time.perf_counter() - start) > 200


def test_who_sends_more_than_it_may_is_cut_off(streamed):
    number = streamed.send(0, question(bytes(1000), limit=999))
    assert streamed.arrived.get(timeout=10) == Arrival(0, number)
    assert 0 not in streamed


def test_a_client_that_goes_breaks_its_stream_alone(site, streamed):
    site.allow("site-1")
    stop = threading.Event()
    threading.Thread(target=echo, args=(site.caller("site-1"), stop), daemon=True).start()
    while 1 not in streamed:
        time.sleep(0.01)
    stop.set()
    lost = streamed.send(1, question(b"last"))
    assert answers(streamed) == [Arrival(1, lost)]
    number = streamed.send(0, question(b"still", b" there"))
    assert answers(streamed) == [Arrival(0, number, b"still there")]


def test_no_stream_to_a_run_that_there_is_not(site):
    for run in ("f" * 32, "../../etc/passwd", ""):
        with (
            pytest.raises(ConnectionFailed, match=r"is not under way|is no run"),
            site.caller().stream(run) as (read, _),
        ):
            read(1)
