"""One server and one client in a home: told by a lock that ends with its process, not by a number."""

import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from fedloom.deployment import client, server, worker_socket
from fedloom.deployment.folders import ClientFolder, ServerFolder, ServerStatus
from fedloom.deployment.processes import only
from fedloom.errors import ConnectionFailed, OutputError
from fedloom.security.keys import make_key
from fedloom.storage.files import lock, lock_owner

HOLD = "import sys, time; from pathlib import Path; from fedloom.storage.files import lock\n"
HOLD += "held = lock(Path(sys.argv[1])); print(flush=True); time.sleep(60)"


@pytest.fixture
def started():
    """Start a Python of some code; each is gone after the test."""
    processes = []

    def start(code, *words):
        words = [sys.executable, "-c", code, *map(str, words)]
        processes.append(subprocess.Popen(words, stdout=subprocess.PIPE))
        processes[-1].stdout.readline()
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def bystander(started):
    """A process that has nothing to do with us, and is to live."""
    process = started("import time; print(flush=True); time.sleep(60)")
    yield process
    assert process.poll() is None


def test_a_lock_is_one_processs_and_ends_with_it(tmp_path, started):
    path = tmp_path / "home" / "a.pid"
    assert lock_owner(path) is None
    other = started(HOLD, path)
    assert lock(path) is None and lock_owner(path) == other.pid
    other.kill()
    other.wait()
    assert path.read_text() == str(other.pid) and lock_owner(path) is None
    with lock(path):
        assert lock(path) is None and lock_owner(path) == os.getpid()
    assert lock_owner(path) is None


def test_a_lock_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot lock"):
        lock(tmp_path / "file" / "a.pid")


def test_a_server_that_was_killed_does_not_keep_the_next_from_starting(tmp_path):
    """In a container all of them are process 1."""
    home = ServerFolder(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ServerStatus(host="127.0.0.1", port=port, flower=1, insecure=True, pid=1, since=0.0).write(
            home.started
        )
        home.lock.write_text(str(os.getpid()))
        with pytest.raises(ConnectionFailed, match=f"cannot listen at 127.0.0.1:{port}"):
            server.start(home, host="127.0.0.1", port=port, insecure=True)


def test_a_second_server_changes_nothing(tmp_path):
    home = ServerFolder(tmp_path)
    with lock(home.lock), pytest.raises(ConnectionFailed, match=r"there is a server in .* already"):
        server.start(home, insecure=True)
    assert [path.name for path in tmp_path.iterdir()] == ["server.pid"]


def test_a_second_client_changes_nothing(tmp_path):
    home, key = ClientFolder(tmp_path / "home"), tmp_path / "a.key"
    make_key(key)
    with lock(home.lock), pytest.raises(ConnectionFailed, match=r"there is a client in .* already"):
        client.join(home, "localhost:9", key=key, authority=None)
    assert [path.name for path in home.path.iterdir()] == ["client.pid"]


def test_who_holds_no_lock_is_not_stopped(tmp_path, bystander):
    home, own = ServerFolder(tmp_path / "server"), ClientFolder(tmp_path / "client")
    own.path.mkdir()
    ServerStatus(host="x", port=1, flower=2, insecure=True, pid=bystander.pid, since=0.0).write(
        home.started
    )
    for path in (home.lock, own.lock, own.pid):
        path.write_text(str(bystander.pid))
    with pytest.raises(ConnectionFailed, match="no server runs in"):
        server.stop_server(home.path)
    with pytest.raises(ConnectionFailed, match="no client runs in"):
        client.leave(own.path)
    client.end_worker(own)


def test_who_holds_the_lock_is_stopped(tmp_path, started):
    home, own = ServerFolder(tmp_path / "server"), ClientFolder(tmp_path / "client")
    ends = {
        home.lock: lambda: server.stop_server(home.path),
        own.lock: lambda: client.leave(own.path),
        own.pid: lambda: client.end_worker(own),
    }
    for path, end in ends.items():
        process = started(HOLD, path)
        assert end() in (process.pid, None)
        assert process.wait(10) == -signal.SIGTERM


def test_a_server_of_another_user_is_told(tmp_path, monkeypatch):
    def kill(process, kind):
        raise PermissionError(1, "Operation not permitted")

    home = ServerFolder(tmp_path)
    monkeypatch.setattr(os, "kill", kill)
    with (
        lock(home.lock),
        pytest.raises(ConnectionFailed, match=r"cannot stop process .* permitted"),
    ):
        server.stop_server(home.path)


def test_who_is_ending_is_waited_for(tmp_path):
    path = tmp_path / "run.pid"
    held = lock(path)
    threading.Timer(0.3, held.close).start()
    with pytest.raises(ConnectionFailed, match="there is a run in"), only("run", path):
        pass
    with only("run", path, patience=5.0):
        assert lock(path) is None
    assert lock_owner(path) is None


def test_a_second_worker_ends_before_it_imports_what_takes_seconds(tmp_path):
    home = ClientFolder(tmp_path)
    words = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "fedloom.deployment.worker_process",
        tmp_path,
    ]
    with lock(home.pid):
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert lock_owner(home.pid) == os.getpid()
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "fedloom.storage.files" in imported
    assert not imported & {"fedloom.deployment.worker", "torch", "transformers", "pydantic"}


def test_while_a_worker_begins_no_other_is_started(tmp_path, monkeypatch):
    home, begun = ClientFolder(tmp_path), []
    monkeypatch.setattr(
        worker_socket, "start_worker", lambda path: begun.append(path) or Ended(None)
    )
    monkeypatch.setattr(worker_socket, "START", 0.3)
    with lock(home.pid), pytest.raises(ConnectionFailed, match="cannot be started"):
        worker_socket.reach_worker(tmp_path)
    assert begun == []
    with pytest.raises(ConnectionFailed, match="cannot be started"):
        worker_socket.reach_worker(tmp_path)
    assert begun == [tmp_path]


@pytest.mark.parametrize(("code", "count"), [(3, 1), (0, 2)])
def test_a_worker_that_ended_is_followed_by_another_unless_it_failed(
    tmp_path, monkeypatch, code, count
):
    begun = []
    monkeypatch.setattr(
        worker_socket,
        "start_worker",
        lambda path: begun.append(path) or Ended(code if len(begun) < 2 else None),
    )
    monkeypatch.setattr(worker_socket, "START", 0.5)
    with pytest.raises(ConnectionFailed, match="cannot be started"):
        worker_socket.reach_worker(tmp_path)
    assert len(begun) == count


class Ended:
    """A process with an exit code."""

    def __init__(self, code):
        self.code = code

    def poll(self):
        return self.code
