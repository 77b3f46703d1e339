"""Workers on Ray give the bits of one process, on one node or two, whatever ends meanwhile."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import psutil
import pytest

import fedloom
from fedloom.engines import ray_pool
from fedloom.engines.ray_pool import Needs, RayCluster, read_address
from fedloom.errors import ConnectionFailed, SettingsError
from fedloom.runs.observers import Silent
from fedloom.runs.ray_workers import _facts, built_on_node
from fedloom.runs.run import run_experiment
from ray_nodes import Nodes


@pytest.mark.parametrize(
    "wrong", ["head", "head:", ":6379", "head:port", "head:70000", "ray://head:10001", "head:-1"]
)
def test_an_address_that_is_none_is_refused(wrong):
    with pytest.raises(SettingsError, match=r"--ray-address .*: give HOST:PORT"):
        read_address(wrong)


def test_addresses_are_read():
    assert read_address("head.example.org:6379") == ("head.example.org", 6379)
    assert read_address("[::1]:6379") == ("::1", 6379)


def test_an_address_that_does_not_answer_is_one_line(monkeypatch):
    monkeypatch.setattr(ray_pool, "ANSWERS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConnectionFailed, match=rf"{address}: no answer within .* ray start"):
            RayCluster(address, 1)
    with pytest.raises(ConnectionFailed, match=rf"{address}: Connection refused; .* ray start"):
        RayCluster(address, 1)


def test_what_answers_and_is_not_ray_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"

        def answer():
            connection, _ = other.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ConnectionFailed, match="what answers is not Ray"):
            RayCluster(address, 1)
        thread.join()


def test_without_ray_the_command_to_install_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingsError, match=r'Ray is not installed .*pip install "fedloom\[ray\]"'):
        RayCluster(None, 1)
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_options_that_do_not_go_together_are_refused(call, experiment, tmp_path):
    file = tmp_path / "e.toml"
    file.write_text(experiment().to_toml())
    code, told = call("run", str(file), "--ray-address", "head:6379")
    assert code == 2 and "--ray-address goes with --engine ray" in told
    code, told = call("run", str(file), "--engine", "rays")
    assert code == 2 and "did you mean 'ray'? there are simulation, ray, flower" in told
    with pytest.raises(SettingsError, match=r"on_step follows steps .*: leave out Ray"):
        fedloom.run(experiment(), ray="local", on_step=lambda step: None)


def test_a_node_has_room_for_what_its_cpus_memory_and_gpus_hold():
    node = {"CPU": 8.0, "memory": 10e9, "GPU": 2.0}
    assert Needs(1e9).fit(node) == 8
    assert Needs(3e9).fit(node) == 3  # 10 / 3
    assert Needs(1e9, gpus=1.0).fit(node) == 2
    assert Needs(1e9, gpus=0.3333).fit(node) == 6
    assert Needs(1e9, gpus=1.0).fit({"CPU": 8.0, "memory": 10e9}) == 0


def test_a_node_with_other_packages_is_named_before_anything_is_unpickled():
    import pickle

    import torch

    facts = {**_facts(torch.device("cpu")), "fedloom": "0.0.1"}
    content = pickle.dumps((facts, b"never read"))
    with pytest.raises(fedloom.FedloomError, match=r"this node has fedloom .*, not 0\.0\.1: nodes"):
        built_on_node(content)


def short_folder():
    """A folder whose path leaves room for the names of sockets, which have 107 characters."""
    return tempfile.TemporaryDirectory(prefix="ray-")


def same_results(one, two):
    files = sorted(one.rglob("*.safetensors"))
    assert files
    for file in files:
        assert (two / file.relative_to(one)).read_bytes() == file.read_bytes(), file


@pytest.fixture
def started():
    """Start a run on Ray as a process, which is ended with the test."""
    runs = []

    def start(file, *options, environment=None):
        run = subprocess.Popen(
            [sys.executable, "-m", "fedloom", "run", str(file), "--engine", "ray", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
            # what a shell starts in the background, as these tests may be, ignores Ctrl-C
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        runs.append(run)
        return run

    yield start
    for run in runs:
        run.terminate()
        run.wait(60)
        run.stdout.close()


def wait_for_rounds(run, folder, count):
    rounds, deadline = folder / "rounds.jsonl", time.monotonic() + 300
    while not rounds.exists() or len(rounds.read_text().splitlines()) < count:
        if run.poll() is not None:
            pytest.fail(f"ended with {run.returncode}: {run.stdout.read()}")
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def long(experiment, tmp_path):
    """An experiment of SCAFFOLD, whose clients keep something; its file; and what it gives alone."""

    def settings(name):
        return experiment(
            method={"name": "scaffold"},
            federation={"rounds": 12},
            training={"local_steps": 4},
            output={"folder": str(tmp_path / name)},
        )

    run_experiment(settings("one"), observer=Silent())
    file = tmp_path / "e.toml"
    file.write_text(settings("ray").to_toml())
    return file


@pytest.mark.slow
def test_a_killed_actor_changes_no_bit_and_ctrl_c_leaves_nothing(long, started, tmp_path):
    pytest.importorskip("ray", reason="the extra fedloom[ray] is not installed")
    run = started(long, "--workers", "2")
    wait_for_rounds(run, tmp_path / "ray", 3)
    own = psutil.Process(run.pid)
    processes = own.children(recursive=True)
    listening = [
        c.laddr.ip for p in [own, *processes] for c in p.net_connections() if c.status == "LISTEN"
    ]
    assert listening and all(ip.removeprefix("::ffff:").startswith("127.") for ip in listening)
    actors = [
        p for p in processes if "RayWorker" in p.name() or "RayWorker" in " ".join(p.cmdline())
    ]
    assert len(actors) == 2
    actors[0].kill()
    wait_for_rounds(run, tmp_path / "ray", 5)
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(60) == 130
    _, alive = psutil.wait_procs(processes, 20)
    assert not alive
    fedloom.resume(tmp_path / "ray")
    same_results(tmp_path / "one", tmp_path / "ray")


@pytest.mark.slow
def test_a_killed_node_changes_no_bit(long, started, tmp_path):
    pytest.importorskip("ray", reason="the extra fedloom[ray] is not installed")
    with short_folder() as folder:
        nodes = Nodes(1, folder)
        try:
            run = started(long, "--ray-address", nodes.address, environment=nodes.environment)
            wait_for_rounds(run, tmp_path / "ray", 3)
            nodes.kill(0)
            told, _ = run.communicate(timeout=240)
            assert run.returncode == 0, told
            assert "starting 2 workers on Ray (2 nodes)" in told
        finally:
            nodes.close()
    same_results(tmp_path / "one", tmp_path / "ray")
