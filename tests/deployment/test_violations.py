"""The log of violations in the server's folder: bounded, shared by processes, and what is shown of it."""

import json
import logging
import subprocess
import sys
import threading

import pytest

from fedloom.deployment.violations import (
    FILE,
    ViolationLog,
    ViolationSummaries,
    ViolationSummary,
    read_violations,
)
from fedloom.federation.violations import KINDS, Violation

RUN = "a" * 32


@pytest.fixture
def path(tmp_path):
    return tmp_path / FILE


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def violation(client=3, kind="forged", reason="its signature", round=7):
    return Violation(client, kind, reason, round, RUN)


def test_what_is_written_is_what_is_read(path):
    log = ViolationLog(path)
    log.began(RUN)
    log.record(violation())
    log.record(violation(kind="oversized", reason="x" * 300))
    log.record(violation(client=1, round=None))
    log.quarantined(RUN, 8, {3: 17})
    log.quarantined(RUN, 9, {3: 17})  # nothing new
    first, second = lines(path)[:2]
    assert first == {"time": first["time"], "event": "began", "run": RUN}
    assert {k: v for k, v in second.items() if k != "time"} == {
        "client": 3, "kind": "forged", "reason": "its signature", "run": RUN, "round": 7,
    }  # fmt: skip
    assert len(lines(path)) == 5 and path.stat().st_mode & 0o777 == 0o600
    found = read_violations(path)
    assert found.run == RUN and list(found.clients) == [3, 1]
    own = found.clients[3]
    assert own.kinds == {"forged": 1, "oversized": 1} and own.kind == "oversized"
    assert own.reason == "x" * 197 + "..." and (own.run, own.until) == (RUN, 17)
    log.quarantined(RUN, 18, {})
    assert read_violations(path).clients[3].until is None


def test_a_client_that_does_its_worst_writes_a_hundred_lines_and_they_are_counted(path):
    log = ViolationLog(path)
    for _ in range(5000):
        log.record(violation(reason="x" * 5000))
    log.record(violation(client=4))
    assert len(lines(path)) == 101 and path.stat().st_size < 101 * 400
    log._limited._sources[("forged", 3)].bucket.tokens = 1.0  # ten seconds later
    log.record(violation())
    assert lines(path)[-1]["more"] == 4900
    assert read_violations(path).clients[3].kinds == {"forged": 5001}


def test_every_kind_of_every_client_for_ever_keeps_the_file_bounded(path):
    log = ViolationLog(path, largest=100_000)
    log.began(RUN)
    log.quarantined(RUN, 8, {2: 17})
    for turn in range(40):
        for client in range(5):
            for kind in KINDS:
                log.record(violation(client, kind, f"turn {turn}"))
        assert path.stat().st_size <= 100_000
    before = path.with_name(f"{FILE}.1")
    assert before.stat().st_size <= 100_000 and lines(path)[0]["event"] == "earlier"
    found = read_violations(path)
    assert {c: own.kinds for c, own in found.clients.items()} == dict.fromkeys(
        range(5), dict.fromkeys(KINDS, 40)
    )
    assert found.run == RUN and (found.clients[2].run, found.clients[2].until) == (RUN, 17)
    assert sorted(p.name for p in path.parent.iterdir()) == [f".{FILE}.lock", FILE, f"{FILE}.1"]


WRITER = """
import sys
from pathlib import Path
from fedloom.deployment.violations import ViolationLog
from fedloom.federation.violations import Violation
log = ViolationLog(Path(sys.argv[1]), largest=20_000)
for number in range(100):
    log.record(Violation(int(sys.argv[2]), "forged", "x" * 150, number, "r" * 32))
assert "torch" not in sys.modules
"""


def test_lines_of_several_processes_and_threads_do_not_mix(path):
    """Some two hundred kB in all, so the file starts again again and again in the middle of it."""
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(n)]) for n in (1, 2)]
    log = ViolationLog(path, largest=20_000)

    def write(client):
        for number in range(100):
            log.record(violation(client, "malformed", "y" * 150, number))

    threads = [threading.Thread(target=write, args=(client,)) for client in (3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [writer.wait() for writer in writers] == [0, 0]
    assert all(line["event"] == "earlier" or line["client"] for line in map(plain, lines(path)))
    found = read_violations(path).clients
    assert {client: sum(own.kinds.values()) for client, own in sorted(found.items())} == {
        1: 100, 2: 100, 3: 100, 4: 100,
    }  # fmt: skip


def plain(line):
    return {"event": None, "client": None, **line}


def test_damaged_lines_are_left_out(path):
    log = ViolationLog(path)
    log.record(violation())
    whole = path.read_bytes()
    path.write_bytes(
        b"\xff\xfe\n[1]\n{}\n" + whole + b'{"client": 9, "kind": "dancing", "reason": "", "time": ""}\n'
        + b'{"event": "earlier", "clients": 7}\n{"client": "x", "kind": "forged"}\n' + whole[:40]
    )  # fmt: skip
    assert read_violations(path) == ViolationSummaries(
        None, {3: ViolationSummary({"forged": 1}, "forged", "its signature", lines_time(whole))}
    )
    assert read_violations(path.parent / "none") == ViolationSummaries()


def lines_time(whole):
    return json.loads(whole)["time"]


def test_a_full_disk_ends_nothing_and_is_said_once(path, caplog, monkeypatch):
    log = ViolationLog(path)
    monkeypatch.setattr(
        type(path), "open", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            log.record(violation())
    assert caplog.text.count("violations cannot be written") == 1


def test_a_client_is_noted_under_its_members_number(tmp_path):
    """In a run it has another one, which the records of the run have."""
    log = ViolationLog(tmp_path / "offences.jsonl", number_of={0: 7, 1: 4}.__getitem__)
    log.began(RUN)
    log.record(Violation(1, "forged", "its signature", 2, RUN))
    log.quarantined(RUN, 3, {1: 12})
    log.quarantined(RUN, 13, {})
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line.get("client") for line in lines] == [None, 4, 4, 4]
    assert list(read_violations(log.path).clients) == [4]
