"""The door: who may knock, and streams through it, over real sockets with TLS."""

import contextlib
import queue
import socket
import threading
import time

import pytest
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

from fedloom.deployment import door as doors
from fedloom.deployment.children import free_port
from fedloom.deployment.door import Caller, Door, Refusals, serve
from fedloom.engines.frames import read_frame
from fedloom.engines.streams import Arrival, Question, Streams, taken
from fedloom.errors import ConnectionFailed, IdentityError, OutputError
from fedloom.identity import Members, make_authority, make_key, public_line, read_key

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


@pytest.fixture
def signing(monkeypatch):
    """Have callers sign that it is another time, given as text or as seconds from now."""

    def sign(moment):
        def claims(self, run):
            key = public_line(self.key)
            now = moment if isinstance(moment, str) else f"{time.time() + moment:.3f}"
            signature = doors.sign(self.key, doors._claim(key, now, run)).hex()
            return (("key", key), ("time", now), ("run", run), ("signature", signature))

        monkeypatch.setattr(Caller, "_claims", claims)

    return sign


@pytest.mark.parametrize("ahead", [-299, 0, 3])
def test_clocks_may_be_minutes_behind_and_seconds_ahead(site, signing, ahead):
    signing(ahead)
    assert site.caller().knock().number == 0


@pytest.mark.parametrize(
    ("ahead", "reason"),
    [
        (-301, r"its clock is 301\.\d seconds behind the server's, 300 are allowed: set the clock"),
        (-86400, r"its clock is 86400\.\d seconds behind the server's"),
        (6, r"its clock is [56]\.\d seconds ahead of the server's, 4 are allowed: set the clock"),
        (299, r"its clock is 29\d\.\d seconds ahead of the server's"),
        ("nan", "its clock is nan seconds ahead"),
        ("inf", "its clock is inf seconds ahead"),
        ("-inf", "its clock is inf seconds behind"),
        ("noon", "not signed as a client of fedloom signs"),
    ],
)
def test_which_clock_is_ahead_is_told_with_the_seconds(site, signing, ahead, reason):
    signing(ahead)
    with pytest.raises(IdentityError, match=reason):
        site.caller().knock()
    assert [event for event, _ in site.notes] == ["refused_client"]


def test_whom_the_door_lets_in_flower_lets_in():
    assert doors.AHEAD < SYSTEM_TIME_TOLERANCE
    assert doors.BEHIND < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE


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


def test_nobody_is_looked_up_before_the_signature_is_right(site, signing):
    read = []
    own = Door(lambda: read.append(1) or site.members(), lambda *a, **k: None, site.folder, 1)
    signing(-400)
    late = dict(site.caller()._claims(""))
    signing(0)
    claims = dict(site.caller()._claims(""))
    for odd in (late, {}, claims | {"run": RUN}, claims | {"signature": "00"}):
        with pytest.raises(IdentityError):
            own._number(odd)
    assert not read and own._number(claims) == 0 and read == [1]


def test_refusals_are_noted_so_often_and_no_more():
    notes, now = [], [50.0]
    refuse = Refusals(lambda event, **facts: notes.append((event, facts)), lambda: now[0])
    for number in range(1000):
        refuse(peer=number)
    assert notes == [("refused_client", {"peer": number}) for number in range(100)]
    now[0] += 9.0
    refuse(peer="early")
    now[0] += 1.0
    refuse(peer="next")
    refuse(peer="after it")
    assert notes[100:] == [("refused_client", {"peer": "next", "more": 901})]
    now[0] += 1e6
    for number in range(101):
        refuse(peer=number)
    assert len(notes) == 201 and notes[101][1] == {"peer": 0, "more": 1}
    assert notes[102][1] == {"peer": 1}


def test_what_could_not_be_noted_is_counted_still():
    notes, now = [], [0.0]

    def note(event, **facts):
        if now[0] == 10.0:
            raise OutputError("cannot write audit.jsonl: No space left on device")
        notes.append(facts)

    refuse = Refusals(note, lambda: now[0])
    for _ in range(103):
        refuse()
    now[0] = 10.0
    with pytest.raises(OutputError):
        refuse()
    now[0] = 20.0
    refuse()
    assert notes[100:] == [{"more": 3}]


def test_strangers_cannot_fill_the_log_and_clients_are_still_noted(site, stranger):
    for _ in range(130):
        stranger.unary_unary(doors.DISTRUST)(b"", timeout=5)
    site.caller().knock()
    events = [event for event, _ in site.notes]
    assert events == ["refused_client"] * 100 + ["client"]


@pytest.fixture
def stranger(site):
    """A channel to the door without a key."""
    credentials = doors.grpc.ssl_channel_credentials((site.folder / "ca.pem").read_bytes())
    with doors.grpc.secure_channel(f"localhost:{site.port}", credentials) as channel:
        yield channel


@contextlib.contextmanager
def silent(method, **options):
    """Make a call of which nothing but the head is ever sent."""
    never = queue.Queue()
    call = method(iter(never.get, None), **options)
    yield call
    call.cancel()
    never.put(None)


@pytest.fixture
def few_threads(monkeypatch):
    monkeypatch.setattr(doors, "STREAMS", 2)


def test_calls_without_a_message_hold_no_thread(few_threads, site, stranger):
    with contextlib.ExitStack() as stack:
        for method in [doors.KNOCK, doors.DISTRUST] * 2:
            call = stack.enter_context(silent(stranger.stream_unary(method).future))
            with contextlib.suppress(doors.grpc.RpcError):  # a knock is refused
                call.result(timeout=5)
        assert site.caller().knock().number == 0


def opened(stack, site, channel, count):
    """Open streams of as many clients over one connection, and return how many come in."""
    for number in range(1, count + 1):
        site.allow(f"site-{number}")
        claims = site.caller(f"site-{number}")._claims(RUN)
        stack.enter_context(silent(channel.stream_stream(doors.STREAM), metadata=claims))
    end, came = time.monotonic() + 2.0, 0
    while came < count and time.monotonic() < end:
        came = sum(facts["what"] == "opens a stream" for _, facts in site.notes)
        time.sleep(0.01)
    return came


def test_who_comes_when_all_threads_are_held_is_told(few_threads, site, stranger):
    with contextlib.closing(Streams(site.folder / "s" / RUN)), contextlib.ExitStack() as stack:
        assert opened(stack, site, stranger, 2) == 2
        with pytest.raises(ConnectionFailed, match="Concurrent RPC limit exceeded"):
            site.caller().knock()


@pytest.fixture
def small_share(monkeypatch):
    monkeypatch.setattr(doors, "SHARE", 2, raising=False)


def test_one_connection_has_its_share(small_share, site, stranger):
    with contextlib.closing(Streams(site.folder / "s" / RUN)), contextlib.ExitStack() as stack:
        assert opened(stack, site, stranger, 3) == 2
        assert site.caller().knock().number == 0


@pytest.mark.parametrize("pair", [None, (b"no key", b"no certificate")])
def test_a_door_that_cannot_be_opened_says_why(pair):
    own = Door(lambda: None, lambda *a, **k: None, None, 1)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConnectionFailed, match=f"cannot listen at {address}: something") as why:
            serve(own, address, pair)
    assert ("certificate" in str(why.value)) == (pair is not None)


def test_another_authority_is_told(site, tmp_path):
    make_authority(tmp_path / "other", ["localhost"])
    with pytest.raises(ConnectionFailed, match="not the one that your authority vouches for"):
        site.caller(authority=tmp_path / "other" / "ca.pem").knock()
    ((event, told),) = site.notes
    assert event == "refused_client" and told["what"] == "joins" and "peer" in told
    assert "it does not trust this server: " in told["reason"]
    assert "key" not in told["reason"] and told["peer"].startswith("ipv")


def test_what_is_noted_of_distrust_is_short(site, stranger):
    why = ((doors.WHY, b"\xff" * 5000),)
    stranger.unary_unary(doors.DISTRUST)(b"", timeout=5, metadata=why)
    ((_, told),) = site.notes
    assert 200 < len(told["reason"]) < 300


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
