"""Strangers flood the gateway while two members play rounds: the members notice no more than a busy machine."""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from machines import machines
from sampling import tries

MOST_MEMORY = 100e6
MOST_SLOWER = 1.25
MOST_CPU = 3e-3
MOST_DISK = 10e6
SHARE = 0.5
SLICE = 0.02


class Held:
    """A process that has a share of one processor, and no more."""

    def __init__(self, words):
        self.process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.over = threading.Event()
        if "attackers" in words[1]:
            assert self.process.stdout.readline() == "attacking\n"
        threading.Thread(target=self.hold, daemon=True).start()

    def used(self):
        """Seconds of processor time so far."""
        return cpu_seconds([self.process.pid])

    def hold(self):
        start, before = time.monotonic(), self.used()
        while not self.over.wait(SLICE):
            excess = self.used() - before - SHARE * (time.monotonic() - start)
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGSTOP if excess > 0 else signal.SIGCONT)

    def end(self):
        self.over.set()
        time.sleep(2 * SLICE)
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            said, _ = self.process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            said, _ = self.process.communicate()
        return said


def cpu_seconds(pids):
    found = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            found += (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
    return found


def memory(pids):
    found = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            found += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    return found


def on_disk(folder):
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


@pytest.mark.serial
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("rounds", "order"),
    tries((15, "busy flood flood busy"), (20, "busy flood flood busy flood busy")),
)
def test_members_play_on_while_strangers_flood_the_gateway(experiment, rounds, order):
    def of(rounds):
        return experiment(
            federation={"clients": 2, "rounds": rounds, "patience": 60},
            training={"local_steps": 6},
            evaluation={"every": rounds, "per_client": False, "samples": 0},
        )

    busy = [sys.executable, "-c", "while True: pass"]
    seconds, cpu, lasted, shares, counts = {}, {}, {}, {}, []
    with machines(2) as own, contextlib.ExitStack() as begun:
        own.start_all()
        own.call("keys", "new", "stranger.key")
        flood = [
            sys.executable,
            str(Path(__file__).with_name("attackers.py")),
            str(own.port),
            str(own.folder / "stranger.key"),
        ]
        gateway = own.processes["server"].pid
        serving = own.pids("server") - {own.player()}
        own.run(of(2), "warm")
        before, disk, most = memory(serving), on_disk(own.server), 0
        for turn, name in enumerate(order.split()):
            held = Held({"busy": busy, "flood": flood}[name])
            begun.callback(held.process.kill)  # where the test fails before it is ended
            began, start = cpu_seconds([gateway]), time.monotonic()
            watch = threading.Event()

            def look(watch=watch):
                nonlocal most
                while not watch.wait(0.1):
                    most = max(most, memory(serving))

            threading.Thread(target=look, daemon=True).start()
            folder = own.run(of(rounds), f"turn-{turn}")
            cpu[name] = cpu.get(name, 0) + cpu_seconds([gateway]) - began
            lasted[name] = lasted.get(name, 0) + time.monotonic() - start
            share = held.used() / (time.monotonic() - start)
            assert share < 1.15 * SHARE + 0.05, share
            shares.setdefault(name, []).append(round(share, 3))
            watch.set()
            said = held.end()
            if name == "flood":
                counts.append(json.loads(said))
            records = [
                json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()
            ]
            assert all(not r["rejected"] for r in records)
            seconds.setdefault(name, []).append(
                statistics.median(r["seconds"] for r in records[2:-1])
            )
        grown, written = most - before, on_disk(own.server) - disk
        attempts = sum(count["connections"] for count in counts)
        each = (cpu["flood"] - cpu["busy"] * lasted["flood"] / lasted["busy"]) / attempts
        slower = statistics.mean(seconds["flood"]) / statistics.mean(seconds["busy"])
        rate = {
            key: round(sum(c.get(key, 0) for c in counts) / lasted["flood"], 1) for key in counts[0]
        }
        shown = {name: [round(own, 3) for own in each] for name, each in seconds.items()}
        print(
            f"seconds of rounds beside a busy loop {shown['busy']}, beside the flood {shown['flood']}: "
            f"{slower:.2f} times; "
            f"memory {before / 1e6:.0f} MB, {grown / 1e6:+.0f} MB; {1e3 * each:.2f} ms of CPU an attempt; "
            f"disk {written / 1e6:+.1f} MB; shares {shares}; a second: {rate}"
        )
        log = (own.server / "audit.jsonl").read_text()
        assert "was closed for newer" in log or "too many connections" in log
    assert rate["connections"] > 50 and rate["handshakes"] > 20  # it was a flood
    assert rate["claims"] > 1 and rate["body bytes"] > 1e5
    assert grown <= MOST_MEMORY and slower <= MOST_SLOWER
    assert each <= MOST_CPU and written <= MOST_DISK
