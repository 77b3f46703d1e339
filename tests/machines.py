"""A plugin: a federation of real processes on this machine, with TLS and authentication.

Each test that needs one pays some ten seconds for the start of Flower's processes; a module shares it.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from fedloom.deployment.children import free_port

FEDLOOM = [sys.executable, "-m", "fedloom"]
ENVIRONMENT = {
    "PATH": os.defpath,
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "COLUMNS": "200",
}


class Machines:
    """A server and clients, each a process with children of its own."""

    def __init__(self, folder, clients):
        self.folder, self.clients = folder, clients
        self.server = folder / "server"
        self.port, self.door = free_port(), free_port()
        self.processes = {}
        self.call("certs", "--home", self.server)
        for client in range(clients):
            self.allow(client)

    def call(self, *arguments, check=True, timeout=120):
        """Call fedloom and return what it says."""
        done = subprocess.run(
            [*FEDLOOM, *map(str, arguments)], cwd=self.folder, env={**os.environ, **ENVIRONMENT},
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{arguments}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
        return done

    def allow(self, client):
        self.call("keys", "new", f"{client}.key")
        self.call("keys", "allow", f"client-{client}", f"{client}.pub", "--home", self.server)

    def start(self, name, *arguments):
        """Start a process that stays, and wait until it says that it is there."""
        log = self.folder / f"{name}.log"
        with log.open("w") as out:
            self.processes[name] = subprocess.Popen(
                [*FEDLOOM, *map(str, arguments)], cwd=self.folder, stdout=out, stderr=out,
                env={**os.environ, **ENVIRONMENT}, start_new_session=True,
            )  # fmt: skip
        return log

    def wait(self, log, text, seconds=60):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if text in log.read_text():
                return
            time.sleep(0.05)
        raise AssertionError(f"{text!r} is not in {log}: {log.read_text()[-2000:]}")

    def start_server(self):
        ports = ("--port", self.port, "--door", self.door)
        log = self.start(
            "server", "server", "start", "--home", self.server, "--host", "127.0.0.1", *ports
        )
        self.wait(log, "clients can join")

    def joining(self, client, **options):
        own = {
            "server": f"localhost:{self.door}", "key": f"{client}.key",
            "ca": self.server / "ca.pem", "home": self.folder / f"c{client}",
        }  # fmt: skip
        chosen = {**own, **options}
        return ["client", "join", *(x for k, v in chosen.items() for x in (f"--{k}", v))]

    def start_client(self, client, wait=True):
        log = self.start(f"c{client}", *self.joining(client))
        if wait:
            self.wait(log, "joined")

    def start_all(self):
        self.start_server()
        for client in range(self.clients):
            self.start_client(client, wait=False)
        for client in range(self.clients):
            self.wait(self.folder / f"c{client}.log", "joined")

    def run(self, experiment, name, *arguments, timeout=300, **options):
        """Run an experiment over the machines; return its folder."""
        path = self.folder / f"{name}.toml"
        path.write_text(experiment.to_toml())
        folder = self.folder / "runs" / name
        self.call(
            "run", path, "--engine", "flower", "--home", self.server,
            "--set", f"output.folder={folder}", *arguments, timeout=timeout, **options,
        )  # fmt: skip
        return folder

    def pids(self, name):
        """Return the processes of a machine: what it started, and what these did."""
        home = str(self.server if name == "server" else self.folder / name)
        found = {self.processes[name].pid}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().decode(errors="replace").rstrip("\0")
                environment = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                if f"FLWR_HOME={home}/flower" in environment or command.endswith(f"\0{home}"):
                    found.add(int(entry.name))
        return found - {os.getpid()}

    def kill(self, name, kind=signal.SIGKILL):
        """End a whole machine at once."""
        for pid in self.pids(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, kind)
        self.processes.pop(name).wait(20)

    def audit(self):
        lines = (self.server / "audit.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def stop(self):
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
        for name in list(self.processes):
            for pid in self.pids(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def machines(clients):
    """Yield a federation that is not started yet; its folder has a short name, for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="fedloom-"))
    own = Machines(folder, clients)
    try:
        yield own
    finally:
        own.stop()
        if not os.environ.get("FEDLOOM_KEEP"):
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def federation_of_two():
    """Two clients and a server that run as long as the module's tests."""
    with machines(2) as own:
        own.start_all()
        yield own
