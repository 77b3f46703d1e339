"""What a server says of itself: to people, and to programs."""

import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from fedloom.deployment import status as module
from fedloom.deployment.folders import ServerFolder, ServerStatus
from fedloom.deployment.status import server_status, shown
from fedloom.deployment.violations import FILE, ViolationLog
from fedloom.federation.violations import Violation
from fedloom.security.keys import make_key

RUN = "a" * 32
NOW = 1_800_000_000.0


@pytest.fixture(autouse=True)
def _clock(monkeypatch):
    """The time of every status: a loaded machine must not change what is read."""
    monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: NOW))


@pytest.fixture
def home(tmp_path):
    own = ServerFolder(tmp_path / "server")
    own.path.mkdir()
    for name in ("north", "south", "west"):
        own.members().allow(name, make_key(tmp_path / f"{name}.key").read_text())
    return own


@pytest.fixture
def look(home):
    """The status as a table, and as lines of a terminal."""

    def status(presence, runs=(), problems=(), warnings=()):
        serving = ServerStatus(host="h", port=9, flower=1, insecure=False, pid=7, since=NOW - 3700)
        gateway = SimpleNamespace(presence=lambda: presence, open_connections=lambda: (3, 1))
        health = SimpleNamespace(problems=lambda: list(problems), warnings=lambda: list(warnings))
        queue = SimpleNamespace(listed=lambda: list(runs))
        found = server_status(home, serving, gateway, queue, health)
        assert json.loads(json.dumps(found)) == found
        console = Console(width=220, color_system=None)
        with console.capture() as captured:
            console.print(shown(found), highlight=False)
        return found, [line.rstrip() for line in captured.get().splitlines()]

    return status


def playing(**facts):
    return {
        "id": RUN, "name": "exp", "state": "playing", "since": NOW - 60, "folder": "/r/exp",
        "round": 3, "rounds": 9, "attendance": [], "left_out": [], "warning": "",
        **facts,
    }  # fmt: skip


def test_each_member_is_there_or_it_is_said_since_when_and_why_not(home, look):
    home.members().revoke("west")
    found, lines = look({0: (True, NOW - 5), 1: (False, NOW - 200)})
    assert [own["connected"] for own in found["members"]] == [True, False, False]
    assert lines[0].endswith("process 7, port 9, TLS, for 1 h 01 min")
    assert lines[1].split() == ["member", "name", "state", "since", "why"]
    assert lines[2].split()[:4] == ["0", "north", "connected", "5.00"]
    assert "1  south  away       3 min 20 s  not connected: its machine, its network or" in lines[3]
    assert lines[4].split()[:3] == ["2", "west", "revoked"] and "revoked since 20" in lines[4]
    assert lines[5] == "no run is under way"


def test_who_was_never_seen_is_told_apart(look):
    _, lines = look({})
    assert all("not seen since the server was started" in line for line in lines[2:5])


def test_a_run_names_who_is_missing_and_why(look):
    attendance = [
        {"client": 0, "number": 0, "name": "north", "since": None, "reason": ""},
        {
            "client": 1,
            "number": 1,
            "name": "south",
            "since": NOW - 65,
            "reason": "[b]no rows",
        },
    ]
    waiting = {
        **playing(state="waiting"),
        "name": "next",
        "folder": "",
        "rounds": None,
        "round": None,
    }
    left_out = [{"client": 0, "name": "north", "round": 3, "reason": "its disk is full"}]
    now = playing(attendance=attendance, left_out=left_out, warning="round 4 waits for north")
    _, lines = look({0: (True, 0.0)}, [now, waiting])
    assert lines[5] == "run exp (aaaaaaaa): playing for 1 min 00 s, round 3 of 9 done in /r/exp"
    assert lines[6] == "  south (client 1) is missing for 1 min 05 s: [b]no rows"
    assert lines[7] == "  north (client 0) was left out of round 3: its disk is full"
    assert lines[8] == "  round 4 waits for north"
    assert lines[9] == "run next (aaaaaaaa): waiting for 1 min 00 s"


def test_what_members_got_wrong_and_until_when_they_are_in_quarantine(home, look):
    log = ViolationLog(home.path / FILE)
    log.began(RUN)
    for kind in ("oversized", "oversized", "forged"):
        log.record(Violation(1, kind, "[red]its\nsignature", 2, RUN))
    log.quarantined(RUN, 3, {1: 17})
    found, lines = look({}, [playing()])
    assert lines[1].split()[5:] == ["offences", "quarantine", "last"]
    assert "forged 1, oversized 2" in lines[3] and "until round 17 of run aaaaaaaa" in lines[3]
    assert "forged: [red]its signature" in lines[3]
    assert found["members"][0]["offences"] is None
    assert "until round" not in look({})[1][3]  # quarantine is of a run that goes on
    log.began("b" * 32)
    assert "until round" not in look({}, [playing()])[1][3]


def test_what_keeps_the_server_from_its_work_stands_first(look):
    found, lines = look({}, problems=["Flower's server [red]is gone"], warnings=["a full disk"])
    assert found["server"]["problems"] == ["Flower's server [red]is gone"]
    assert lines[1:3] == ["problem: Flower's server [red]is gone", "warning: a full disk"]
    assert found["server"]["connections"] == {"clients": 3, "unproven": 1}
