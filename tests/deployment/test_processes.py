"""The federation as its users start it: processes, sockets, TLS, authentication."""

import json
import re
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import fedloom
from fedloom.security.audit_log import events
from fedloom.security.certificates import make_authority
from machines import machines

pytestmark = pytest.mark.slow


def states(folder):
    return [event["state"] for event in events(folder, "round")]


def small(experiment, **sections):
    return experiment(
        federation={"clients": 2, "rounds": 2, "patience": 60},
        training={"local_steps": 2},
        **sections,
    )


def test_machines_give_the_bits_of_a_simulation(federation_of_two, experiment, tmp_path):
    settings = small(experiment, output={"folder": str(tmp_path / "here")})
    folder = federation_of_two.run(settings, "there")
    fedloom.run(settings)
    assert states(folder) == states(tmp_path / "here")
    adapter = "adapter/adapter_model.safetensors"
    assert (folder / adapter).read_bytes() == (tmp_path / "here" / adapter).read_bytes()
    for client in range(2):
        log = (federation_of_two.folder / f"c{client}" / "worker.log").read_text()
        assert log.count("backbone loaded") == 1 and log.count("stream to") == 1
        own = federation_of_two.folder / f"c{client}"
        assert (
            "are the same in both logs"
            in federation_of_two.call("audit", "match", folder, own).stdout
        )
    assert federation_of_two.call("audit", "verify", folder).returncode == 0
    assert federation_of_two.call("audit", "verify", federation_of_two.server).returncode == 0


def test_status_shows_the_clients(federation_of_two):
    shown = federation_of_two.call("status", "--home", federation_of_two.server).stdout
    assert re.search(r"0\s+client-0\s+connected", shown) and "no run is under way" in shown
    found = json.loads(
        federation_of_two.call("status", "--json", "--home", federation_of_two.server).stdout
    )
    assert [own["connected"] for own in found["members"][:2]] == [True, True]


def test_figures_are_given_to_prometheus(federation_of_two, experiment):
    own = federation_of_two

    def get(path):
        return httpx.get(f"http://127.0.0.1:{own.metrics}/{path}", timeout=5)

    def figures():
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(get("metrics").text)
            for sample in family.samples
        }

    before = figures()
    folder = own.run(small(experiment), "measured")
    finished, end = ("fedloom_runs_total", "finished"), time.monotonic() + 5
    while (after := figures()).get(finished, 0) == before.get(finished, 0):
        assert time.monotonic() < end  # the server looks five times a second
    rounds = ("fedloom_round_seconds_count",)
    assert after[rounds] == before[rounds] + 2
    costs = [json.loads(line) for line in (folder / "costs.jsonl").read_text().splitlines()]
    for direction, side in (("received", "bytes_up"), ("sent", "bytes_down")):
        payloads = sum(cost[side] for cost in costs)
        name = ("fedloom_bytes_total", direction, "stream")
        assert 1 <= (after[name] - before.get(name, 0)) / payloads < 2  # small ones: headers count
    assert after["fedloom_member_connected", "client-0"] == 1
    assert (get("healthz").text, get("readyz").text) == ("ok\n", "ok\n")


@pytest.mark.serial
def test_a_run_begins_within_ten_seconds_and_status_answers_within_two(
    federation_of_two, experiment
):
    own, settings = federation_of_two, small(experiment)
    own.run(settings, "warm")
    began = time.monotonic()
    words = ("run", own.folder / "warm.toml", "--engine", "flower", "--home", own.server)
    log = own.start("timed", *words, "--set", f"output.folder={own.folder / 'timed'}")
    own.wait(log, "round 0/2", 10)
    first = time.monotonic() - began
    began = time.monotonic()
    own.call("status", "--home", own.server)
    second = time.monotonic() - began
    print(f"round 0 after {first:.1f} s, status in {second:.1f} s")
    assert first < 10 and second < 2
    assert own.processes.pop("timed").wait(60) == 0


def test_a_run_can_be_stopped_and_resumed(federation_of_two, experiment, tmp_path):
    settings = experiment(
        federation={"clients": 2, "rounds": 12, "patience": 60},
        training={"local_steps": 15},  # a run that outlasts the start of what stops it
        output={"folder": str(tmp_path / "here")},
    )
    own = federation_of_two
    own.offer(models=[settings.model.path])
    path = own.folder / "long.toml"
    path.write_text(settings.to_toml())
    folder = own.folder / "runs" / "long"
    words = ("run", path, "--engine", "flower", "--home", own.server)
    log = own.start("long", *words, "--set", f"output.folder={folder}")
    own.wait(log, "round 2/12")
    assert "stopped 1 run" in own.call("stop", "--home", own.server).stdout
    assert own.processes.pop("long").wait(30) == 1
    assert "--resume" in log.read_text()
    own.call("run", "--resume", folder, "--engine", "flower", "--home", own.server)
    fedloom.run(settings)
    assert states(folder)[-1] == states(tmp_path / "here")[-1]


def test_a_mistake_in_the_run_is_told_where_it_was_asked_for(federation_of_two, experiment):
    settings = small(experiment, model={"path": "/nowhere/at/all"})
    path = federation_of_two.folder / "wrong.toml"
    path.write_text(settings.to_toml())
    home = federation_of_two.server
    done = federation_of_two.call("run", path, "--engine", "flower", "--home", home, check=False)
    assert done.returncode == 3 and "/nowhere/at/all" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.serial
class TestWhoIsNotLetIn:
    """One clear message in under five seconds, and a line in the server's audit log."""

    def refused(self, own, words, reason):
        before = len(own.audit())  # what Flower was told of who was let in may be noted beside it
        start = time.monotonic()
        done = own.call(*words, check=False, timeout=30)
        seconds = time.monotonic() - start
        assert done.returncode == 5 and re.search(reason, " ".join(done.stderr.split()))
        assert "Traceback" not in done.stderr and seconds < 5
        return [e["reason"] for e in own.audit()[before:] if e["event"] == "refused_client"]

    def test_an_unknown_key(self, federation_of_two):
        own = federation_of_two
        own.call("keys", "new", "stranger.key")
        (reason,) = self.refused(
            own,
            own.joining(7, key="stranger.key"),
            "does not admit this client: the key .* is not known",
        )
        assert "not known here" in reason

    def test_a_revoked_key(self, federation_of_two):
        own = federation_of_two
        own.allow(5)
        own.call("members", "revoke", "client-5", "--home", own.server)
        (reason,) = self.refused(own, own.joining(5), "has been revoked")
        assert "has been revoked" in reason

    def test_an_authority_of_another_federation(self, federation_of_two):
        own = federation_of_two
        make_authority(own.folder / "other", ["localhost"])
        *_, reason = self.refused(
            own,
            own.joining(0, ca=own.folder / "other" / "ca.pem", home="x"),
            "does not have a certificate of your authority",
        )
        assert reason.startswith("it does not trust this server: unable to get local issuer")

    @pytest.mark.parametrize(
        ("options", "words", "reason"),
        [
            ({}, ["--insecure"], "broke the connection: .*; trying again"),
            ({"server": "localhost:9"}, [], "nobody answers at localhost:9: .*; trying again"),
        ],
    )
    def test_a_server_that_may_come_is_waited_for(
        self, federation_of_two, tmp_path, options, words, reason
    ):
        """Nobody there, or no TLS there: this machine may have booted first."""
        own = federation_of_two
        log = own.start("x", *own.joining(0, home=tmp_path / "x", **options), *words)
        own.wait(log, "trying again", 10)
        process = own.processes.pop("x")
        assert process.poll() is None and re.search(reason, " ".join(log.read_text().split()))
        process.terminate()
        assert process.wait(10) == 0 and "Traceback" not in log.read_text()

    def test_what_is_no_address_is_told(self, federation_of_two):
        own = federation_of_two
        done = own.call(*own.joining(0, server="local host", home="x"), check=False)
        assert done.returncode == 2 and "is not a HOST:PORT" in done.stderr

    def test_one_key_in_two_folders_takes_part_once(self, federation_of_two, tmp_path):
        own = federation_of_two
        log = own.start("x", *own.joining(0, home=tmp_path / "x"))
        own.wait(log, "takes part already; stop that one first", 10)
        process = own.processes.pop("x")
        process.terminate()
        assert process.wait(10) == 0 and "joined" not in log.read_text()


def test_a_server_needs_certificates_in_force(federation_of_two, tmp_path):
    words = ("server", "start", "--home", tmp_path)
    done = federation_of_two.call(*words, check=False)
    assert done.returncode == 5 and "`fedloom certs` makes them" in " ".join(done.stderr.split())
    make_authority(tmp_path, ["localhost"], days=0)
    done = federation_of_two.call(*words, check=False)
    assert done.returncode == 5 and "has expired on" in done.stderr


def test_a_second_server_is_refused(federation_of_two):
    words = ("server", "start", "--home", federation_of_two.server)
    done = federation_of_two.call(*words, check=False)
    assert done.returncode == 4 and "there is a server in" in done.stderr


def test_a_second_client_is_refused(federation_of_two):
    worker = federation_of_two.folder / "c0" / "worker.pid"
    before = worker.read_text()
    done = federation_of_two.call(*federation_of_two.joining(0), check=False)
    assert done.returncode == 4 and "there is a client in" in done.stderr
    time.sleep(0.5)  # one that was killed is noticed, and started again
    assert worker.read_text() == before and int(before) in federation_of_two.pids("c0")


def test_a_server_can_listen_at_one_address_alone():
    with machines(1) as own:
        own.network.listen_at = own.network.address = "127.0.0.2"
        words = ("--home", own.server, "--port", own.port)
        done = own.call("server", "start", "--host", "127.0.0.2", *words, check=False)
        assert done.returncode == 5 and "certs --host 127.0.0.2" in " ".join(done.stderr.split())
        own.call("certs", "--home", own.server, "--host", "127.0.0.2")
        own.start_all()
        end = time.monotonic() + 30
        while not re.search(
            r"client-0\s+connected", own.call("status", "--home", own.server).stdout
        ):
            assert time.monotonic() < end
        own.kill("server")
        own.start_server()  # though server.toml and server.pid are still there
        own.call("server", "stop", "--home", own.server)
        assert own.processes.pop("server").wait(20) == 0


@pytest.mark.parametrize("words", [("status",), ("stop",), ("server", "stop"), ("client", "leave")])
def test_commands_say_that_nothing_runs(federation_of_two, words, tmp_path):
    done = federation_of_two.call(*words, "--home", tmp_path, check=False)
    assert done.returncode in (2, 4) and "Traceback" not in done.stderr
