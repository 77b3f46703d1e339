"""Workers on Ray: one actor for each CPU, or share of a GPU, of this machine or of a cluster.

Every actor builds what the run has once and then carries out one request at a time. A request travels
without its encoded state, which all clients of an exchange are sent: that is put into Ray's object store
once and given by reference. An actor that ends, alone or with its node, is replaced wherever the cluster
has room, and until then there is a worker fewer. Nothing is repeated by Ray itself, so an answer never
comes twice; what became of a client's work is for ``workers.py`` to say.

Ray unpickles what its nodes send each other: a cluster is of one owner.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import ipaddress
import logging
import os
import pickle
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedloom.engines.in_process import SimulationEngine
from fedloom.engines.ray_worker import RayWorker
from fedloom.engines.workers import TRIES, ClientRequest, ClientResult
from fedloom.errors import ConnectionFailed, FedloomError, RoundFailed, SettingsError, first_line

EXTRA = 'pip install "fedloom[ray]"'

ANSWERS = 10.0
"""Seconds within which an address must answer."""

ROOM = 120.0
"""Seconds to wait for room for a worker, where there is none; an empty actor starts in that time."""

JOINED = "its place was empty until now"
"""In place of a result: nothing was lost, and the worker can be given something to do."""

HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""How a client of HTTP/2, which Ray's servers speak, begins (RFC 9113, section 3.4)."""

SETTINGS_FRAME = 4
"""Type of the frame with which a server of HTTP/2 begins."""

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""Environment: nothing is reported to Ray's makers; Ray's coming defaults, without its warning."""

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Environment: Ray listens and connects on the loopback address alone, on any system."""

Build = Callable[[bytes], SimulationEngine]
"""A function of a module that makes the engine of a worker."""


@functools.cache
def _token() -> str:
    """Return what other users of this machine would have to know to command Ray's processes."""
    return secrets.token_hex(32)


@dataclass(frozen=True)
class Needs:
    """What a worker takes up of its node.

    Attributes:
        memory: Bytes, derived.
        gpus: GPUs, or the share of one.
    """

    memory: float
    gpus: float = 0.0

    def fit(self, resources: Mapping[str, float]) -> int:
        """Return how many workers fit into what Ray says that a node has."""
        room = [resources.get("CPU", 0.0), resources.get("memory", 0.0) / max(1.0, self.memory)]
        if self.gpus:
            room.append(resources.get("GPU", 0.0) / self.gpus + 1e-9)
        return int(min(room))


class RayCluster:
    """A connection with Ray, on this machine alone or by the address of a cluster.

    Attributes:
        address: ``HOST:PORT`` of the cluster; ``None``: Ray is started here for as long as this lives.
    """

    def __init__(self, address: str | None, cpus: int) -> None:
        """Connect.

        Args:
            address: As the attribute.
            cpus: Workers that Ray may have on this machine at most, where it is started here.

        Raises:
            SettingsError: Ray is not installed, in use by this process already, or the address is none.
            ConnectionFailed: Nothing that speaks Ray's protocol answers there, or Ray does not start.
        """
        self.address, self._folder, self._before = address, "", dict[str, str | None]()
        here = address is None
        if address is not None:
            host, port = read_address(address)
            _require_answer(host, port, address)
            here = _is_loopback(host)
        self._set({**QUIET, **(LOOPBACK if here else {})})
        if address is None:
            # where no mode is set, Ray asks for the token
            self._set({"RAY_AUTH_MODE": None, "RAY_AUTH_TOKEN": _token()})
            self._folder = tempfile.mkdtemp(prefix="fedloom-ray-")
            # once more at the end, as processes of a Ray that did not start end there
            atexit.register(shutil.rmtree, self._folder, ignore_errors=True)
        try:
            with _own_signals():
                self._connect(cpus)
        except BaseException:
            self.close()
            raise

    def _connect(self, cpus: int) -> None:
        try:
            import ray
        except ImportError as error:
            problem = [f"--engine ray: Ray is not installed ({first_line(error)}); {EXTRA}"]
            raise SettingsError(problem, "the command") from None
        logging.getLogger("ray").setLevel(logging.CRITICAL)  # what matters of it is raised as well
        if ray.is_initialized():
            raise SettingsError(
                ["this process uses Ray already: run ray.shutdown() first"], "the command"
            )
        try:
            if self.address is not None:
                ray.init(self.address, log_to_driver=False, configure_logging=False)
            else:
                ray.init(
                    "local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    configure_logging=False,
                    _temp_dir=self._folder,
                )
        except Exception as error:
            where = self.address or "this machine"
            raise ConnectionFailed(f"Ray on {where}: {_why_not(error)}") from None

    def _set(self, environment: Mapping[str, str | None]) -> None:
        for name, value in environment.items():
            self._before.setdefault(name, os.environ.get(name))
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    def nodes(self) -> dict[str, dict[str, Any]]:
        """Return what Ray says of each node that is there, by its id."""
        import ray

        return {own["NodeID"]: own for own in ray.nodes() if own["Alive"]}

    def room(self, needs: Needs) -> int:
        """Return how many workers the cluster has room for, whatever else it does now."""
        return sum(needs.fit(own["Resources"]) for own in self.nodes().values())

    def close(self) -> None:
        """Disconnect, which ends all workers, and Ray where it was started here."""
        if "ray" in sys.modules:
            with contextlib.suppress(Exception), _own_signals():
                sys.modules["ray"].shutdown()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._set(self._before)


def read_address(address: str) -> tuple[str, int]:
    """Read ``HOST:PORT``.

    Raises:
        SettingsError: It is none.
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if "/" in address or not host or not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise SettingsError(
            [f"--ray-address {address!r}: give HOST:PORT, as ray start --head prints it"],
            "the command",
        )
    return host, int(port)


def _require_answer(host: str, port: int, address: str) -> None:
    """Check that something at an address speaks HTTP/2, as Ray does: Ray itself would wait minutes.

    Raises:
        ConnectionFailed: Nothing does.
    """
    if os.environ.get("RAY_USE_TLS", "0") == "1":
        return  # it begins with a handshake of TLS
    try:
        with socket.create_connection((host, port), ANSWERS) as connection:
            connection.settimeout(ANSWERS)
            connection.sendall(HELLO)
            begun = connection.recv(9)
        problem = "" if begun[3:4] == bytes([SETTINGS_FRAME]) else "what answers is not Ray"
    except TimeoutError:
        problem = f"no answer within {ANSWERS:.0f} s"
    except OSError as error:
        problem = error.strerror or first_line(error)
    if problem:
        raise ConnectionFailed(
            f"--ray-address {address}: {problem}; it is the address that ray start --head prints"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handler of SIGTERM, which importing Ray and connecting replace."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class RayPool:
    """Workers that are actors.

    Attributes:
        ready: Those that have built what the run has, and have not ended.
    """

    def __init__(
        self, cluster: RayCluster, build: Build, content: bytes, size: int, needs: Needs
    ) -> None:
        """Start the actors, and wait for all that there is room for now.

        Args:
            cluster: Where.
            build: Makes a worker's engine.
            content: What of.
            size: How many.
            needs: What each takes up.

        Raises:
            FedloomError: An actor could not be started, or could not build what the run has.
        """
        import ray

        self._ray, self._cluster, self._build = ray, cluster, pickle.dumps(build)
        self._content = ray.put(content)
        self._class = ray.remote(
            num_cpus=1,
            num_gpus=needs.gpus,
            memory=int(needs.memory),
            max_restarts=0,
            max_task_retries=0,
            concurrency_groups={"life": 1},
        )(RayWorker)
        self.ready = set[int]()
        self._actors: dict[int, Any] = {}
        self._nodes: dict[int, str] = {}
        self._places: dict[Any, int] = {}
        self._building: dict[Any, int] = {}
        self._lives: dict[Any, int] = {}
        self._jobs: dict[Any, int] = {}
        self._failures: dict[int, int] = {}
        self._last = "none had room"
        self._state: tuple[bytes, Any] = b"", None
        for worker in range(size):
            self._start(worker)
        self._await_first()

    def _start(self, worker: int) -> None:
        """Ask for an actor; it comes once the cluster has room for it."""
        actor = self._actors[worker] = self._class.remote()
        self._places[actor.place.remote()] = worker
        self._building[actor.build.remote(self._build, self._content)] = worker

    def _await_first(self) -> None:
        """Wait until those that have room have built what the run has.

        Raises:
            FedloomError: One could not, or none has room.
        """
        places = [*self._places]
        found, _ = self._ray.wait(places, num_returns=len(places), timeout=ROOM)
        begun = {self._places[one] for one in found}
        if not begun:
            raise FedloomError(
                f"Ray found no room for a worker within {ROOM:.0f} s: its CPUs or memory are taken"
            )
        while any(worker in begun for worker in self._building.values()):
            done = self._one_of([one for one, worker in self._building.items() if worker in begun])
            worker = self._building.pop(done)
            if problem := self._joined(worker, done):
                where = self._address(worker)
                raise FedloomError(f"workers could not be started{where}: {problem}")

    def _address(self, worker: int) -> str:
        """Return where a worker is, for a message; nothing where that is not known."""
        for place, own in self._places.items():
            if own == worker:
                with contextlib.suppress(Exception):
                    return f" on {self._ray.get(place, timeout=1)[1]}"
        return ""

    def _joined(self, worker: int, done: Any) -> str:
        """Take in a worker that has built what the run has; return why it could not."""
        try:
            problem: str = self._ray.get(done)
            place = next(one for one, own in self._places.items() if own == worker)
            node, _ = self._ray.get(place)
        except Exception as error:
            return _how_ended(error)
        if not problem:
            del self._places[place]
            self._nodes[worker] = node
            life = self._actors[worker].live.options(concurrency_group="life").remote()
            self._lives[life] = worker
            self._failures[worker] = 0
            self.ready.add(worker)
        return problem

    def send(self, worker: int, request: ClientRequest) -> None:
        """Give an idle worker something to do; the state of an exchange is put into the store once."""
        requests = request.exchange.requests
        state = requests[request.clients[0]]
        if self._state[0] is not state:
            self._state = state, self._ray.put(state)
        rest = {client: b"" if data is state else data for client, data in requests.items()}
        bare = replace(request.exchange, requests=rest)
        packed = pickle.dumps(replace(request, exchange=bare), pickle.HIGHEST_PROTOCOL)
        self._jobs[self._actors[worker].work.remote(packed, self._state[1])] = worker

    def receive(self) -> tuple[int, ClientResult | str]:
        """Wait until a worker has done its work, has ended, or is there.

        Raises:
            RoundFailed: There is no worker any more, and no room for one.
        """
        while True:
            done = self._one_of([*self._jobs, *self._lives, *self._building])
            if done in self._jobs:
                worker = self._jobs.pop(done)
                try:
                    result: ClientResult = pickle.loads(self._ray.get(done))
                    return worker, result
                except self._ray.exceptions.RayError as error:
                    return worker, self._ended(worker, error)
            if done in self._lives:
                worker = self._lives[done]
                try:
                    self._ray.get(done)
                except self._ray.exceptions.RayError as error:
                    return worker, self._ended(worker, error)
            worker = self._building.pop(done)
            problem = self._joined(worker, done)
            if not problem:
                return worker, JOINED
            self._fail(worker, problem)

    def _one_of(self, waited: list[Any]) -> Any:
        """Wait until one of these is done.

        Raises:
            RoundFailed: There is no worker and no room for one.
        """
        until = time.monotonic() + ROOM
        while True:
            done, _ = self._ray.wait(waited, num_returns=1, timeout=1.0) if waited else ([], [])
            if done:
                return done[0]
            if self.ready or self._any_place():
                until = time.monotonic() + ROOM
            elif not waited or time.monotonic() > until:
                raise RoundFailed(
                    f"no worker of Ray is left, and there was no room for another within {ROOM:.0f} s; "
                    f"the last one ended {self._last}"
                )

    def _any_place(self) -> bool:
        """Return whether a worker that is not ready has at least begun."""
        places = [*self._places]
        return bool(places and self._ray.wait(places, num_returns=1, timeout=0)[0])

    def _ended(self, worker: int, error: Exception) -> str:
        """Forget a worker that has ended, and those of nodes that have gone; ask for another."""
        reason = _how_ended(error)
        self._forget(worker, reason)
        there = self._cluster.nodes()
        self.ready = {own for own in self.ready if self._nodes[own] in there}
        self._start(worker)
        return reason

    def _forget(self, worker: int, reason: str) -> None:
        self._last = reason
        self.ready.discard(worker)
        for known in (self._places, self._lives, self._jobs):
            for one in [one for one, own in known.items() if own == worker]:
                del known[one]
        with contextlib.suppress(Exception):  # where it is out of reach alone, it must not go on
            self._ray.kill(self._actors.pop(worker))

    def _fail(self, worker: int, reason: str) -> None:
        """Begin again with a worker that could not be built, or do without it."""
        self._forget(worker, reason)
        self._failures[worker] = self._failures.get(worker, 0) + 1
        if self._failures[worker] < TRIES:
            self._start(worker)


def _how_ended(error: BaseException) -> str:
    """Return in a few words how an actor ended, from what Ray says over several lines."""
    text = str(error)
    if missing := re.search(r"(ModuleNotFoundError|ImportError): .*", text):
        return f"as its node lacks a package ({missing[0]}); install the same fedloom[ray] there"
    if "OutOfMemory" in type(error).__name__ or "memory" in text.split("Some common causes")[0]:
        return "as Ray ended it for want of memory"
    if "node" in text and re.search(r"node .*(died|dead|has died|terminated)", text):
        return "with its node"
    if "unavailable" in text or "Unavailable" in type(error).__name__:
        return "out of reach"
    if "worker process has died" in text or "exits" in text:
        return "as its process ended, often for want of memory"
    return f"by {type(error).__name__}: {first_line(error)}"


def _why_not(error: BaseException) -> str:
    """Return in one line why there is no connection, from what Ray says over several lines."""
    text = str(error)
    if "Version mismatch" in text or "version mismatch" in text:
        return "the cluster has another version of Ray or Python; " + " ".join(text.split())[:300]
    if "Raylet addresses" in text or "Can't find" in text or "node_ip_address" in text:
        return (
            "this machine is no node of the cluster; run ray start --address=HOST:PORT here first"
        )
    return f"{first_line(error)[:300]}"
