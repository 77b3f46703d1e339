"""What becomes of members in the life of a federation, with real processes; each ends with a run of all."""

import itertools
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from fedloom.deployment.flower_nodes import read_nodes
from fedloom.deployment.processes import free_port
from fedloom.security.keys import make_key
from machines import ENVIRONMENT, machines

pytestmark = pytest.mark.slow


class Life:
    """A federation of two, and what its operators do."""

    numbers = itertools.count(1)

    def __init__(self, own, experiment):
        self.own, self.experiment = own, experiment

    def members(self, *words):
        return self.own.call("members", *words, "--home", self.own.server).stdout

    def status(self):
        return {member["name"]: member for member in self.own.status()["members"]}

    def connected(self, *names, seconds=45):
        """Wait until these members are there, and no others."""
        end = time.monotonic() + seconds
        while (there := {n for n, own in self.status().items() if own["connected"]}) != set(names):
            assert time.monotonic() < end, (there, names)
            time.sleep(0.3)

    def play(self, *names):
        """Play a round with these members."""
        name = f"life-{next(self.numbers)}"
        settings = self.experiment(
            federation={"clients": len(names), "members": list(names), "rounds": 1, "patience": 60},
            training={"local_steps": 1},
            evaluation={"every": 1, "per_client": False, "samples": 0},
        )
        folder = self.own.run(settings, name)
        *_, last = (folder / "rounds.jsonl").read_text().splitlines()
        record = json.loads(last)
        assert record["round"] == 1 and not record["rejected"] and not record["absent"]
        assert record["clients"] == list(range(len(names)))
        known = json.loads((folder / "run.json").read_text())["members"]
        assert [member["name"] for member in known] == list(names)

    def restart(self):
        self.own.call("server", "stop", "--home", self.own.server)
        assert self.own.processes.pop("server").wait(30) == 0
        self.own.start_server()


@pytest.fixture
def life(federation_of_two, experiment):
    return Life(federation_of_two, experiment)


def test_who_was_revoked_and_is_let_in_again_takes_part_again(life):
    """Found: it never worked again, and the server asked for ever. No process is touched here."""
    life.connected("client-0", "client-1")
    for _ in range(2):
        life.members("revoke", "client-1")
        life.connected("client-0")
        life.members("allow", "client-1", "1.pub")
        life.connected("client-0", "client-1", seconds=90)
    life.play("client-0", "client-1")
    log = (life.own.folder / "c1.log").read_text()
    assert log.count("has been revoked") >= 1 and log.count("taking part again") >= 1


def test_another_key_takes_the_place_of_the_one_before(life):
    own = life.own
    own.call("keys", "new", "1b.key")
    life.members("rotate", "client-1", "1b.pub")
    life.connected("client-0")
    own.kill("c1", signal.SIGTERM)
    log = own.start("c1", *own.joining(1, key="1b.key"))
    own.wait(log, "joined")
    life.connected("client-0", "client-1")
    old = own.call(*own.joining(1, home=own.folder / "old"), check=False)
    assert old.returncode == 5 and "is not known here" in old.stderr
    life.play("client-0", "client-1")
    life.members("rotate", "client-1", "1.pub")
    own.kill("c1", signal.SIGTERM)
    own.start_client(1)
    life.connected("client-0", "client-1")


def test_another_name_interrupts_nothing_and_a_restart_keeps_it(life):
    before = life.status()["client-0"]["since"]
    life.members("rename", "client-0", "north")
    life.connected("north", "client-1")
    assert life.status()["north"]["since"] == before
    life.restart()
    life.connected("north", "client-1")
    life.play("client-1", "north")  # and in another order
    life.members("rename", "north", "client-0")


def test_a_lost_database_is_no_loss(life):
    own = life.own
    own.call("server", "stop", "--home", own.server)
    assert own.processes.pop("server").wait(30) == 0
    for path in own.server.glob("flower.db*"):
        path.unlink()
    (own.server / "nodes.toml").unlink()
    own.start_server()
    life.connected("client-0", "client-1")
    life.play("client-0", "client-1")


def test_a_restored_backup_is_the_truth(life):
    """From a backup of before a third member came, made while the server ran."""
    own = life.own
    own.call("server", "backup", own.folder / "fed.backup", "--home", own.server)
    own.call("keys", "new", "third.key")
    life.members("allow", "third", "third.pub")
    assert list(life.status()) == ["client-0", "client-1", "third"]
    own.kill("server")
    shutil.rmtree(own.server)
    said = own.call("server", "restore", own.folder / "fed.backup", "--home", own.server).stdout
    assert "2 members are allowed" in said
    own.start_server()
    life.connected("client-0", "client-1")
    assert list(life.status()) == ["client-0", "client-1"]
    done = own.call(*own.joining(0, key="third.key", home=own.folder / "third"), check=False)
    assert done.returncode == 5 and "is not known here" in done.stderr
    life.play("client-0", "client-1")


def test_a_new_certificate_of_the_same_authority_changes_nothing_for_clients(life):
    life.own.call("certs", "--home", life.own.server, "--host", life.own.network.address)
    life.restart()
    life.connected("client-0", "client-1")
    life.play("client-0", "client-1")


def test_a_client_whose_folder_is_lost_begins_anew_with_its_key(life):
    own = life.own
    own.kill("c0")
    shutil.rmtree(own.folder / "c0")
    own.start_client(0)
    life.connected("client-0", "client-1")
    life.play("client-0", "client-1")


def test_a_client_that_moved_takes_part_from_there(life):
    """Its old machine was switched off."""
    own = life.own
    own.kill("c0")
    log = own.start("c0", *own.joining(0, home=own.folder / "c0-moved"))
    own.wait(log, "joined")
    life.connected("client-0", "client-1")
    life.play("client-0", "client-1")
    own.kill("c0", signal.SIGTERM)
    own.start_client(0)
    life.connected("client-0", "client-1")


def test_a_clock_that_is_an_hour_off_is_told_with_the_seconds(life):
    own = life.own
    code = (
        "import time; real = time.time; time.time = lambda: real() - 3600\n"
        "from fedloom.commands.main import main; main()"
    )
    words = own.joining(0, home=own.folder / "late")
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], cwd=own.folder, check=False, timeout=60,
        env={**ENVIRONMENT, "HOME": str(own.folder)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    said = " ".join(done.stderr.split())
    assert "seconds behind the server's, 300 are allowed: set the clock that is wrong" in said


def test_a_server_that_moved_is_found_at_its_new_port(life):
    own = life.own
    own.call("server", "stop", "--home", own.server)
    assert own.processes.pop("server").wait(30) == 0
    moved = own.server.rename(own.folder / "moved")
    own.server, own.port = moved, free_port()
    own.start_server()
    for client in range(2):
        own.kill(f"c{client}", signal.SIGTERM)
        own.start_client(client, wait=False)
    life.connected("client-0", "client-1")
    life.play("client-0", "client-1")


def test_a_new_authority_is_given_to_each_client(life):
    own = life.own
    for name in ("ca.pem", "ca.key"):
        (own.server / name).rename(own.server / f"old-{name}")
    own.call("certs", "--home", own.server, "--host", own.network.address)
    life.restart()
    time.sleep(1.0)
    for client in range(2):
        own.kill(f"c{client}", signal.SIGTERM)
    kept = own.server / "old-ca.pem"
    done = own.call(*own.joining(0, ca=kept), check=False)
    assert done.returncode == 5 and "does not have a certificate of your authority" in done.stderr
    for client in range(2):
        own.start_client(client)
    life.connected("client-0", "client-1")
    life.play("client-0", "client-1")


def test_a_member_that_is_withdrawn_in_mid_run_is_in_nothing_that_is_played_again(life):
    own = life.own
    shutil.rmtree(
        own.folder / "runs", ignore_errors=True
    )  # the earlier ones would be run again too
    settings = life.experiment(
        federation={"clients": 2, "rounds": 30, "patience": 60},
        training={"local_steps": 4},
        evaluation={"every": 30, "per_client": False, "samples": 0},
    )
    own.offer(models=[settings.model.path])
    (own.folder / "long.toml").write_text(settings.to_toml())
    folder = own.folder / "runs" / "long"
    words = ("run", own.folder / "long.toml", "--engine", "flower", "--home", own.server)
    log = own.start("long", *words, "--set", f"output.folder={folder}")
    own.wait(log, "round 2/30")
    said = life.members("withdraw", "client-1", "--again")
    assert f"{folder}: in " in said and "in the queue as" in said
    anew = folder.with_name("long-without-client-1")
    assert own.processes.pop("long").wait(30) == 1  # it was stopped
    again = own.start("again", "follow", anew.name, "--home", own.server)
    assert own.processes.pop("again").wait(90) == 0, again.read_text()
    lines = (anew / "rounds.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["round"] for record in records] == list(range(31))
    assert all(record["clients"] == [0] for record in records[1:])
    members = json.loads((anew / "run.json").read_text())["members"]
    assert [own["name"] for own in members] == ["client-0"]
    life.members("allow", "client-1", "1.pub")
    life.connected("client-0", "client-1", seconds=90)
    life.play("client-0", "client-1")


def test_one_member_of_two_federations_is_a_member_of_each(life, experiment):
    own = life.own
    with machines(0) as other:
        other.call("members", "allow", "guest", own.folder / "0.pub", "--home", other.server)
        other.start_server()
        log = own.start(
            "guest",
            *own.joining(
                0, server=f"localhost:{other.port}", ca=other.server / "ca.pem", home="guest"
            ),
        )
        own.wait(log, "joined")
        own.offer(models=[experiment().model.path])  # the guest's file is the first client's
        there = Life(other, experiment)
        there.connected("guest")
        there.play("guest")
        life.play("client-0", "client-1")
        own.kill("guest", signal.SIGTERM)


@pytest.mark.serial
def test_two_hundred_new_keys_are_in_force_within_ten_seconds():
    with machines(0) as own:
        keys = own.folder / "keys"
        for number in range(200):
            make_key(keys / f"site-{number}.key")
        own.start_server()
        began = time.monotonic()
        own.call("members", "allow", "--folder", keys, "--home", own.server)
        while len(read_nodes(own.server / "nodes.toml")) < 200:
            assert time.monotonic() - began < 10
            time.sleep(0.05)
        print(f"200 keys in force after {time.monotonic() - began:.1f} s")


def test_clients_that_booted_before_the_server_join_once_it_is_there(experiment):
    with machines(2) as own:
        logs = [own.folder / f"c{client}.log" for client in range(2)]
        for client in range(2):
            own.start_client(client, wait=False)
        for log in logs:
            own.wait(log, "nobody answers at localhost:")
        own.start_server()
        for log in logs:
            own.wait(log, "joined", 70)
        life = Life(own, experiment)
        life.connected("client-0", "client-1")
        life.play("client-0", "client-1")
