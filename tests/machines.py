"""A plugin: a federation of real processes on this machine, with TLS and authentication.

Each test that needs one pays some ten seconds for the start of Flower's processes; a module shares it.
Where this machine allows it, each of them can have a network namespace of its own.
"""

import contextlib
import itertools
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

from fedloom.deployment.administration import ask
from fedloom.deployment.folders import ServerFolder
from fedloom.deployment.processes import free_port
from fedloom.security.certificates import make_authority
from fedloom.security.client_registry import read_public
from fedloom.security.keys import make_key
from fedloom.storage.files import lock_owner
from loopback import BUILTIN, builtin, client_file

FEDLOOM = [sys.executable, "-m", "fedloom"]
ENVIRONMENT = {
    "PATH": os.defpath,
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "COLUMNS": "200",
}


def heed_interrupts():
    """Have a process be interrupted by SIGINT, also where these tests run in the background and are not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Loopback:
    """All machines at one address."""

    address, listen_at = "localhost", "127.0.0.1"

    def on(self, name):
        """Return the words before a command of a machine."""
        return []


class Network:
    """A network namespace for each machine, and cables between them that can be pulled."""

    numbers = itertools.count(1)
    address, listen_at = "10.77.0.1", "0.0.0.0"

    def __init__(self, clients):
        self.prefix, self.spaces = f"fedloom{os.getpid()}-{next(self.numbers)}", {}
        try:
            self.space("switch")
            self.on_switch("add", "bridge", "type", "bridge")
            self.on_switch("set", "bridge", "up")
            for number, name in enumerate(
                ["server", *(f"c{client}" for client in range(clients))], 1
            ):
                space = self.space(name)
                self.on_switch("add", name, "type", "veth", "peer", "name", "eth0", "netns", space)
                self.on_switch("set", name, "master", "bridge", "up")
                self.ip("-n", space, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    self.ip("-n", space, "link", "set", device, "up")
        except BaseException:
            self.close()
            raise

    @staticmethod
    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def space(self, name):
        """Make a namespace."""
        space = f"{self.prefix}-{name}"
        self.ip("netns", "add", space)
        self.spaces[name] = space
        return space

    def on_switch(self, *words):
        self.ip("-n", self.spaces["switch"], "link", *words)

    def on(self, name):
        """Return the words before a command of a machine; what is none is called at the server."""
        return ["ip", "netns", "exec", self.spaces.get(name, self.spaces["server"])]

    def limit(self, name, rate):
        """Let a cable carry no more than a rate, such as ``10mbit``, in either direction."""
        shape = ("root", "tbf", "rate", rate, "burst", "32kb", "latency", "400ms")
        for space, device in ((self.spaces[name], "eth0"), (self.spaces["switch"], name)):
            words = ["tc", "-n", space, "qdisc", "add", "dev", device, *shape]
            subprocess.run(words, check=True, capture_output=True)

    def pull(self, name):
        """Pull the cable: packets are lost, and nobody is told."""
        self.on_switch("set", name, "down")

    def plug(self, name):
        self.on_switch("set", name, "up")

    def close(self):
        for space in self.spaces.values():
            self.ip("netns", "del", space)


def can_have_namespaces():
    """Return whether this machine lets us make network namespaces."""
    try:
        Network(0).close()
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


class Machines:
    """A server and clients, each a process with children of its own."""

    def __init__(self, folder, clients, network):
        self.folder, self.clients, self.network = folder, clients, network
        self.server = folder / "server"
        self.port, self.metrics = free_port(), free_port()
        self.processes = {}
        make_authority(self.server, [*dict.fromkeys((network.address, "localhost", "127.0.0.1"))])
        for client in range(clients):
            self.allow(client)
        self.offer()

    def offer(self, source=BUILTIN, models=()):
        """Write the clients' files: their shares of built-in rows, these models, and wide bounds."""
        policy = {"max_rank": 10_000, "max_rounds_a_day": 1_000_000, "max_runs_a_day": 10_000}
        for client in range(self.clients):
            client_file(self.folder / f"c{client}.toml", source, models, policy=policy)

    def call(self, *arguments, check=True, timeout=120):
        """Call fedloom and return what it says."""
        done = subprocess.run(
            [*self.network.on("server"), *FEDLOOM, *map(str, arguments)], cwd=self.folder,
            env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=timeout,
            check=False,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{arguments}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
        return done

    def allow(self, client):
        public = make_key(self.folder / f"{client}.key")
        ServerFolder(self.server).members().allow(f"client-{client}", read_public(public))

    def status(self):
        """Return what ``fedloom status --json`` prints: tests ask often, and a process takes a second."""
        return ask(ServerFolder(self.server), "status")

    def start(self, name, *arguments):
        """Start a process that stays, and wait until it says that it is there."""
        log = self.folder / f"{name}.log"
        with log.open("w") as out:
            self.processes[name] = subprocess.Popen(
                [*self.network.on(name), *FEDLOOM, *map(str, arguments)], cwd=self.folder,
                env={**os.environ, **ENVIRONMENT}, stdout=out, stderr=out, start_new_session=True,
                preexec_fn=heed_interrupts,
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
        where = ("--host", self.network.listen_at, "--port", self.port)
        where += ("--metrics", f"127.0.0.1:{self.metrics}")
        log = self.start("server", "server", "start", "--home", self.server, *where)
        self.wait(log, "clients can join")

    def joining(self, client, **options):
        own = {
            "server": f"{self.network.address}:{self.port}", "key": f"{client}.key",
            "ca": self.server / "ca.pem", "home": self.folder / f"c{client}",
            "data": self.folder / f"c{client % max(1, self.clients)}.toml",
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
        self.offer(builtin(experiment), [experiment.model.path])
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

    def player(self):
        """Return the process that plays a run, or ``None``."""
        return lock_owner(self.server / "run.pid")

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
        """Kill all that is left: how processes end that are told to is tried by tests of their own."""
        for name in list(self.processes):
            self.kill(name)


@contextlib.contextmanager
def machines(clients, apart=False):
    """Yield a federation that is not started yet; its folder has a short name, for sockets.

    Machines that are ``apart`` have network namespaces of their own, where that can be.
    """
    folder = Path(tempfile.mkdtemp(prefix="fedloom-"))
    network = Network(clients) if apart and can_have_namespaces() else Loopback()
    own = Machines(folder, clients, network)
    try:
        yield own
    finally:
        own.stop()
        if isinstance(network, Network):
            network.close()
        if not os.environ.get("FEDLOOM_KEEP"):
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def federation_of_two():
    """Two clients and a server that run as long as the module's tests."""
    with machines(2) as own:
        own.start_all()
        yield own
