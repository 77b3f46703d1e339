"""Each kind of process is killed: nothing is left of what it started, what is said is true, and all goes on."""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from sampling import drawn, tries

pytestmark = pytest.mark.serial

IMAGES = {
    "superlink": b"fedloom.deployment.flower_server",
    "starter": b"fedloom.deployment.flower_starter",
    "fork server": b"fedloom.deployment.fork_server",
    "worker": b"fedloom.deployment.worker_process",
}


class Site:
    def __init__(self, own, experiment):
        self.own, self.experiment = own, experiment

    def pid(self, machine, kind):
        """The process of a kind, or ``None``; of a fork server and what it forked, the one that was there first."""
        if kind in ("server", "client"):
            return self.own.processes[machine].pid
        if kind == "player":
            return self.own.player()
        for pid in sorted(self.own.pids(machine), key=start_time):
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            if (
                pid != self.own.player()
                and IMAGES[kind] in words
                and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
            ):
                return pid
        return None

    def kill(self, machine, kind):
        """Kill a process, and wait until all that it started is gone, within five seconds."""
        started = self.own.pids(machine)
        pid = self.pid(machine, kind)
        below = {p for p in started if pid in ancestors(p)}
        os.kill(pid, signal.SIGKILL)
        if kind in ("server", "client"):
            self.own.processes.pop(machine).wait(5)
        end = time.monotonic() + 5
        while alive := {p for p in below if is_alive(p)}:
            assert time.monotonic() < end, [Path(f"/proc/{p}/cmdline").read_bytes() for p in alive]
            time.sleep(0.05)
        return below

    def status(self):
        return self.own.status()

    def until(self, condition, seconds=30):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.status()
            time.sleep(0.2)

    def connected(self):
        return [member["connected"] for member in self.status()["members"]]

    def settings(self, rounds, steps=1):
        return self.experiment(
            federation={"clients": 2, "rounds": rounds, "patience": 60},
            training={"local_steps": steps},
            evaluation={"every": rounds, "per_client": False, "samples": 0},
        )

    def long_run(self, name):
        """Begin a run and wait until it has played a round."""
        own, settings = self.own, self.settings(400, 8)
        own.offer(models=[settings.model.path])
        path = own.folder / f"{name}.toml"
        path.write_text(settings.to_toml())
        words = ("run", path, "--engine", "flower", "--home", own.server)
        log = own.start(name, *words, "--set", f"output.folder={own.folder / name}")
        own.wait(log, "round 1/400")
        return log

    def goes_on(self, name):
        self.until(lambda: self.connected() == [True, True])
        folder = self.own.run(self.settings(1), name)
        record = json.loads((folder / "rounds.jsonl").read_text().splitlines()[-1])
        assert record["clients"] == [0, 1] and not record["rejected"] and not record["absent"]


def start_time(pid):
    """When a process was started, in ticks since the machine was."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:  # it has ended
        return 0


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ancestors(pid):
    found = set()
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
        found.add(pid)
    return found


@pytest.fixture
def site(federation_of_two, experiment):
    return Site(federation_of_two, experiment)


@pytest.mark.slow
def test_a_server_that_is_killed_leaves_nothing_and_the_next_goes_on(site):
    own, log = site.own, site.long_run("killed-server")
    kinds = ("superlink", "starter", "fork server", "player")
    assert None not in {site.pid("server", kind) for kind in kinds}
    below = site.kill("server", "server")
    assert len(below) >= 4
    own.wait(log, "the server is gone, and the run with it", 10)
    assert own.processes.pop("killed-server").wait(10) == 1
    done = own.call("status", "--home", own.server, check=False)
    assert done.returncode == 4 and "no server runs in" in done.stderr
    own.start_server()
    assert site.status()["runs"] == []
    site.goes_on("after-server")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["player", "starter", "fork server"])
def test_a_run_whose_process_is_killed_has_a_last_word_and_the_next_goes_on(site, kind):
    own, log = site.own, site.long_run(f"killed-{kind}")
    killed = time.monotonic()
    site.kill("server", kind)
    own.wait(log, "the process that ran the rounds is gone; everything up to the last round is", 5)
    assert time.monotonic() - killed < 5
    assert own.processes.pop(f"killed-{kind}").wait(10) == 1
    site.until(lambda: site.status()["runs"] == [], 5)
    site.goes_on(f"after-{kind}")


@pytest.mark.slow
def test_flowers_server_that_is_killed_is_started_again_and_the_run_goes_on(site):
    own, log = site.own, site.long_run("killed-superlink")
    before = site.pid("server", "superlink")
    site.kill("server", "superlink")
    site.until(lambda: site.pid("server", "superlink") not in (None, before), 10)
    reached = len(log.read_text().splitlines())
    site.until(lambda: len(log.read_text().splitlines()) > reached + 3)
    assert "stopped 1 run" in own.call("stop", "--home", own.server).stdout
    assert own.processes.pop("killed-superlink").wait(30) == 1
    site.goes_on("after-superlink")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["client", "worker"])
def test_a_client_that_is_killed_is_away_at_once_and_comes_back(site, kind):
    own, log = site.own, site.long_run(f"killed-{kind}")
    below = site.kill("c1", kind)
    if kind == "client":
        assert len(below) == 1  # its worker
        site.until(lambda: site.connected() == [True, False], 5)
        (away,) = [own for own in site.status()["members"] if not own["connected"]]
        assert "not connected" in away["reason"]
        own.wait(log, "client-1 (client 1)", 45)  # that it is missing or waited for is said
        own.start_client(1)
    own.wait(log, "is back in round" if kind == "client" else "round", 60)
    own.call("stop", "--home", own.server)
    assert own.processes.pop(f"killed-{kind}").wait(30) == 1
    site.goes_on(f"after-{kind}")


@pytest.mark.parametrize("kills", tries(1, 20))
def test_all_goes_on_whichever_process_is_killed_at_whatever_moment(site, kills):
    own, rng = site.own, drawn("deaths")
    kinds = ["server", "superlink", "starter", "fork server", "player", "client", "worker"]
    for turn in range(kills):
        kind, name = str(rng.choice(kinds)), f"random-{turn}"
        own.offer(models=[site.settings(1).model.path])
        path = own.folder / f"{name}.toml"
        path.write_text(site.settings(400, 8).to_toml())
        words = ("run", path, "--engine", "flower", "--home", own.server)
        own.start(name, *words, "--set", f"output.folder={own.folder / name}")
        moment = float(
            rng.uniform(1.5, 8)
        )  # before the run begins, while it meets clients, in rounds
        time.sleep(moment)
        where = "c1" if kind in ("client", "worker") else "server"
        if site.pid(where, kind) is not None:
            site.kill(where, kind)
        if kind == "server":
            own.start_server()
        if kind == "client":
            own.start_client(1)
        if kind not in ("server", "player", "worker"):
            there = partial(site.pid, where, kind)
            site.until(lambda there=there: there() is not None)
        own.call("stop", "--home", own.server, check=False)
        assert own.processes.pop(name).wait(30) in (1, 4)
        site.goes_on(f"after-{name}")
        print(f"{kind} killed after {moment:.1f} s")


@pytest.mark.full
def test_a_worker_that_is_frozen_is_named_within_thirty_seconds(site):
    """Found: a round stood for 66 s without a word."""
    own, log = site.own, site.long_run("frozen")
    worker = site.pid("c1", "worker")
    os.kill(worker, signal.SIGSTOP)
    try:
        own.wait(log, "waits for client-1 (client 1), asked", 35)
        shown = own.call("status", "--home", own.server).stdout
        assert "waits for client-1 (client 1), asked" in " ".join(shown.split())
    finally:
        os.kill(worker, signal.SIGCONT)
    reached = log.read_text().count("loss")
    site.until(lambda: log.read_text().count("loss") > reached + 2)
    own.call("stop", "--home", own.server)
    assert own.processes.pop("frozen").wait(30) == 1
    site.goes_on("after-frozen")


@pytest.mark.slow
def test_a_server_that_is_told_to_stop_ends_all_and_says_so(site):
    own, log = site.own, site.long_run("stopped")
    all_of_it = own.pids("server")
    own.call("server", "stop", "--home", own.server)
    assert own.processes.pop("server").wait(30) == 0
    own.wait(log, "the server was stopped; everything up to the last round is saved", 10)
    assert own.processes.pop("stopped").wait(10) == 1
    assert not any(map(is_alive, all_of_it))
    own.start_server()
    site.goes_on("after-stop")


@pytest.mark.slow
def test_who_watches_may_go_and_come_back(site):
    own = site.own
    log = site.long_run("watched")
    own.processes["watched"].send_signal(signal.SIGINT)
    assert own.processes.pop("watched").wait(10) == 130
    said = " ".join(log.read_text().split())
    assert "the run goes on: `fedloom follow --home" in said and "fedloom stop --home" in said
    again = own.start("again", "follow", "watched", "--home", own.server)
    own.wait(again, "round 1/400", 10)  # from its beginning
    memory = Path(f"/proc/{own.processes['again'].pid}/status").read_text()
    assert int(memory.split("VmHWM:")[1].split()[0]) < 150_000  # kB
    second = own.start(
        "second", "run", own.folder / "watched.toml", "--engine", "flower", "--home", own.server,
        "--set", f"output.folder={own.folder / 'second'}",
    )  # fmt: skip
    own.wait(second, "waiting for its turn: watched is under way", 5)
    mistaken = own.call(
        "run", own.folder / "watched.toml", "--engine", "flower", "--home", own.server,
        "--set", "training.learning_rat=1", check=False,
    )  # fmt: skip
    assert mistaken.returncode == 2, mistaken
    assert "training.learning_rat: unknown key; did you mean" in mistaken.stderr
    assert [run["state"] for run in site.status()["runs"]] == ["playing", "waiting"]
    assert "stopped 2 runs" in own.call("stop", "--home", own.server).stdout
    for name, words in (("again", "the run was stopped"), ("second", "stopped before it began")):
        own.wait(own.folder / f"{name}.log", words, 10)
        assert own.processes.pop(name).wait(10) == 1
    site.goes_on("after-watching")
