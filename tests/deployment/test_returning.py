"""A stream that breaks in the middle of an exchange: its client comes back and goes on where it was."""

import contextlib
import json
import math
import threading
import time
from dataclasses import replace

import pytest

import fedloom
from fedloom.deployment import connections, gateway, worker
from fedloom.deployment.gateway import Gateway
from fedloom.deployment.gateway_client import GatewayClient
from fedloom.deployment.processes import free_port
from fedloom.engines.flower import streams as module
from fedloom.engines.flower.streams import StreamRequest, StreamResponse, Streams, taken
from fedloom.errors import ConnectionFailed
from fedloom.runs.observers import Silent
from fedloom.runs.run import run_experiment
from fedloom.security.audit_log import events
from fedloom.security.keys import read_key
from fedloom.wire.framing import read_frame
from links import Link
from loopback import builtin

RUN = "0" * 32
ANSWER = bytes(range(256)) * 80_000
"""Twenty megabytes, all of which must be there once."""


class Site:
    """The gateway of a federation, and a link to it that breaks."""

    def __init__(self, loopback, cuts=()):
        self.loopback, self.server = loopback, loopback.folder / "server"
        self.streams = self.server / "streams"
        port, pair = free_port(), (self.server / "server.pem", self.server / "server.key")
        self.gateway = Gateway(loopback.members, lambda event, **facts: None, self.streams, None)
        self.gateway.listen("127.0.0.1", port, pair)
        self.link = Link(port, cuts)

    def client(self, asked):
        """Connect as client 0 again and again, and send of ANSWER what is asked for."""
        key = read_key(self.loopback.folder / "0.key")
        authority = (self.server / "ca.pem").read_bytes()
        own = GatewayClient(f"localhost:{self.link.port}", key, authority, "a" * 32)

        def stay():
            while True:
                with (
                    contextlib.suppress(ConnectionFailed, OSError),
                    own.stream(RUN) as (read, send),
                ):
                    while (message := read_frame(read, lambda: 1 << 30)) is not None:
                        asked.append(int(message))
                        send(ANSWER[int(message) :])
                time.sleep(0.05)

        threading.Thread(target=stay, daemon=True).start()


@pytest.fixture
def site(loopback):
    made = []

    def make(*cuts):
        made.append(Site(loopback(3), cuts))
        return made[0]

    yield make
    for own in made:
        own.gateway.stop()


def answer(site, patience):
    """Return what comes of a question, and from which bytes on the client was asked."""
    returned, asked = [], []
    streams = Streams(site.streams / RUN, patience)
    streams.returned = lambda client, held: returned.append((client, held))
    site.client(asked)
    with contextlib.closing(streams):
        while 0 not in streams:
            time.sleep(0.01)
        number = streams.send(
            0, StreamRequest((b"0",), lambda held: (str(held).encode(),), len(ANSWER))
        )
        end = time.monotonic() + 30
        while not (found := list(streams.take(0.1))):
            assert time.monotonic() < end
        left = [path.name for path in site.streams.iterdir()]
    assert len(found) == 1 and (found[0].client, found[0].question) == (0, number)
    return found[0], asked, returned, left


def test_of_a_large_answer_only_the_rest_is_sent(site):
    own = site(9_000_000, 9_000_000)
    found, asked, returned, _ = answer(own, patience=10)
    assert taken(found.message) == ANSWER
    assert 0 == asked[0] < asked[1] < asked[2] < len(ANSWER)
    assert returned == [(0, held) for held in asked[1:]]
    assert own.link.carried < 1.7 * len(ANSWER)  # what was on its way when a link broke goes twice


def test_who_does_not_come_back_in_time_is_lost_and_nothing_is_left_of_it(site):
    found, asked, _, left = answer(site(7_000_000), patience=0)
    assert found.message is None and asked[0] == 0 and left in ([RUN], [])


def test_a_run_that_ends_meanwhile_leaves_nothing(site):
    own, asked = site(9_000_000), []
    streams = Streams(own.streams / RUN, patience=60)
    own.client(asked)
    while 0 not in streams:
        time.sleep(0.01)
    own.link.cut_until = math.inf  # there will be no other connection
    streams.send(0, StreamRequest((b"0",), lambda held: (str(held).encode(),), len(ANSWER)))
    while 0 in streams:
        time.sleep(0.01)
    assert {path.name for path in own.streams.iterdir()} == {RUN, f"{RUN}-000000-000000001"}
    streams.close()
    assert list(own.streams.iterdir()) == []


def test_who_only_ever_breaks_its_stream_is_lost(site, monkeypatch):
    monkeypatch.setattr(module, "RETURNS", 3)
    found, asked, returned, _ = answer(site(*[100_000] * 9), patience=10)
    assert found == StreamResponse(0, found.question) and len(returned) == 3 and set(asked) == {0}


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(module, "LARGE", 1 << 12)
    monkeypatch.setattr(module, "PART", 1 << 10)
    for own in (connections, gateway):
        monkeypatch.setattr(own, "CHUNK", 1 << 12)
    monkeypatch.setattr(worker, "PAUSE", 0.05)


def over_links(own, settings):
    """Run over streams through the link, each round begun when all clients have one."""
    mail, opened = own.loopback.mail(source=builtin(settings)), []
    for one in mail.workers.values():
        update = {"gateway": f"localhost:{own.link.port}"}
        one.registration = one.registration.model_copy(update=update)
    engine = own.loopback.engine(settings, mail)
    sizes = engine.sizes

    def open_streams(run, patience):
        opened.append(Streams(own.streams / run, patience))
        return opened[0]

    def once_all_are_there():
        end = time.monotonic() + 20
        while not all(client in opened[0] for client in range(3)):
            assert time.monotonic() < end
            time.sleep(0.01)
        return sizes()

    engine.transport = replace(engine.transport, open_streams=open_streams)
    engine.sizes = once_all_are_there
    with contextlib.closing(engine):
        run_experiment(settings, observer=Silent(), remote=engine)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    ["fedavg", *(pytest.param(name, marks=pytest.mark.slow) for name in ("split", "scaffold"))],
)
def test_a_run_over_links_that_break_is_one_over_links_that_hold(
    method, experiment, site, small_parts, tmp_path
):
    """Links break while clients are asked, while they work and while they answer; nobody is left out."""
    sections = {"federation": {"rounds": 4}, "method": {"name": method}, "adapter": {"rank": 64}}
    if method == "split":
        sections |= {
            "objective": {"name": "classification"},
            "data": {"source": "builtin:labelled", "builtin_rows": 60},
            "evaluation": {"per_client": False},
        }
    here, there = (
        experiment(**sections, output={"folder": str(tmp_path / name)})
        for name in ("here", "there")
    )
    own = site(*[20_000, 80_000, 140_000] * 3)
    over_links(own, there)
    fedloom.run(here)
    assert not own.link.cuts
    one, two = (
        [event["state"] for event in events(tmp_path / name, "round")] for name in ("here", "there")
    )
    assert one == two and len(one) == 5
    lines = (tmp_path / "there" / "rounds.jsonl").read_text().splitlines()
    assert not any(json.loads(line)["rejected"] for line in lines)
    held = [event["held"] for event in events(tmp_path / "there", "returned")]
    assert len(held) >= 6 and any(held)
