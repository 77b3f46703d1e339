"""Processes that work on simulated clients: how they are started, asked, replaced and ended.

A *host* process is started afresh and builds what the run has: rows, models, tokens. Then it forks the
workers, which share its memory as long as they only read it, and forks another where one ends. So the
weights of the frozen model are there once for all workers, beside those of the process that plays the
run. All of them end with that process, however it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Literal

import psutil
import torch

from fedloom.accounting.cores import available_cores
from fedloom.data.client_rows import TokenShare
from fedloom.data.loading import DataSource
from fedloom.engines.in_process import SimulationEngine
from fedloom.engines.workers import (
    ClientRequest,
    ClientResult,
    WorkersEngine,
    work_packed,
)
from fedloom.errors import FedloomError, RoundFailed, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.models.quantize import quantized_bytes
from fedloom.objectives.base import Objective
from fedloom.runs.assembly import RunComponents, assemble
from fedloom.runs.initial_adapter import Start
from fedloom.runs.observers import RunObserver
from fedloom.runs.parent_process import end_with_parent, of_this_process
from fedloom.runs.partitioning import partition_data
from fedloom.training.cohort import cohort_size
from fedloom.training.memory import most_memory
from fedloom.training.row_privacy import RowPrivacy

Workers = int | Literal["auto"]
"""How many processes work on clients; "auto": as many as there are cores and memory for."""

GONE = (
    "the process that starts workers has ended (often for want of memory): give fewer workers, or go on "
    "with one"
)

PROCESS = 250e6
"""Bytes that a forked worker has of its own before it trains, measured with tiny models (230 MB)."""

HOST = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "  # as here: nothing else is imported
    "from fedloom.runs.workers import host; host(int(sys.argv[1]))"
)


@dataclass(frozen=True)
class WorkerTask:
    """What workers build the run's parts of.

    Attributes:
        experiment: The run's.
        objective: A user's own.
        data: A user's own source.
        start: The adapter that training goes on from.
        model: Fingerprint of the model that the run has.
        rows: Training rows of each client, as the run has them.
        digest: SHA-256 of all rows, as the run has them.
        probed: By client, whether its model reads prompts once and from what length on it attends
            answer by answer, as the run found it.
        hidden: How each client's steps hide its rows, with row-level privacy.
    """

    experiment: Experiment
    objective: Objective | None
    data: DataSource | None
    start: Start | None
    model: str = ""
    rows: Mapping[int, int] = field(default_factory=dict)
    digest: str = ""
    probed: Mapping[int, tuple[bool | None, int]] = field(default_factory=dict)
    hidden: Mapping[int, RowPrivacy] | None = None


@contextlib.contextmanager
def host_process(asked: Workers) -> Iterator[HostProcess | None]:
    """Start the host process where there may be workers, so that it imports while data is read."""
    if asked == 1:
        yield None
        return
    host = HostProcess()
    try:
        yield host
    finally:
        host.close()


def with_workers(
    parts: RunComponents,
    asked: Workers,
    host: HostProcess | None,
    task: WorkerTask,
    observer: RunObserver,
) -> RunComponents:
    """Have processes of this machine work on a run's clients; with one worker, this process does.

    Args:
        parts: What the run has.
        asked: How many workers, or "auto".
        host: What forks them.
        task: What ``parts`` were made of.
        observer: Told what is done.

    Raises:
        SettingsError: They are too many for this machine's memory, or clients are elsewhere, or what the
            user made himself cannot be given to other processes.
        FedloomError: The workers do not start.
    """
    if host is None:
        return parts
    workers = _number(asked, parts, task.experiment, observer)
    if workers == 1:
        host.close()
        return parts
    observer.stage(f"starting {workers} workers")
    host.build(task_with_digests(task, parts))
    return replace(parts, engine=WorkersEngine(parts.local, ProcessPool(host, workers)))


def task_with_digests(task: WorkerTask, parts: RunComponents) -> WorkerTask:
    """Return a task with what workers compare theirs with."""
    models = {client: own.model for client, own in parts.local.resources.items()}
    return replace(
        task,
        model=parts.model_digest,
        rows=parts.local.sizes(),
        digest=parts.division.loaded.digest,
        hidden=parts.row_privacies,
        probed={c: (own.shared_prompts, own.tree_from) for c, own in models.items()},
    )


def _number(
    asked: Workers, parts: RunComponents, experiment: Experiment, observer: RunObserver
) -> int:
    """Return how many workers there will be.

    Raises:
        SettingsError: They are too many for this machine's memory, or clients are elsewhere.
    """
    if parts.engine is not parts.local:
        raise SettingsError(
            ["--workers is for clients in this machine; here they are elsewhere: leave it out"],
            "the command",
        )
    if parts.model.device.type != "cpu" and asked == "auto":
        return 1
    if parts.model.device.type != "cpu":
        raise SettingsError(
            [f"--workers {asked}: workers are for CPUs; on {parts.model.device} use one"],
            "the command",
        )
    cores, (weights, each) = available_cores(), worker_memory(parts, experiment, PROCESS)
    free = psutil.virtual_memory().available - (weights + PROCESS)
    fits = max(0, int(free // each))
    most = min(cores, experiment.federation.cohort_size, max(1, fits))
    if asked == "auto":
        return most
    if asked > fits:
        raise SettingsError(
            [
                f"--workers {asked}: this machine has {free / 1e9:.1f} GB for workers and each takes "
                f"about {each / 1e9:.1f} GB (derived): at most {fits} fit"
            ],
            "the command",
        )
    if asked > cores:
        observer.warning(
            f"{asked} workers share {cores} core{'s' if cores > 1 else ''}, which is slower than {most}"
        )
    return asked


def worker_memory(
    parts: RunComponents, experiment: Experiment, process: float
) -> tuple[float, float]:
    """Return bytes, derived: of the frozen weights, and of a worker that trains what takes most.

    Args:
        parts: What the run has.
        experiment: The run's.
        process: Bytes that a worker's process takes before it trains.
    """
    quantization, local = experiment.model.quantization, parts.local
    clients = [(local.resources[client].model, share) for client, share in local.shares.items()]
    models = {id(model): model for model, _ in clients}
    weights = [quantized_bytes(model.model, quantization) for model in models.values()]
    training = most_memory(clients, experiment.training, quantization, weights=False) or 0.0
    return float(max(weights, default=0)), training * _together(parts, experiment) + process


def _together(parts: RunComponents, experiment: Experiment) -> int:
    """Return how many clients a worker trains together at most."""
    local = parts.local
    shares: dict[int, list[TokenShare]] = {}
    for client, share in local.shares.items():
        shares.setdefault(id(local.resources[client].model), []).append(share)
    models = {id(own.model): own.model for own in local.resources.values()}
    rows = experiment.training.batch_size
    most = max(
        (cohort_size(local.cohort, models[own], shares[own], rows) for own in shares), default=1
    )
    return min(most, experiment.federation.cohort_size)


def packed_task(task: WorkerTask) -> bytes:
    """Pickle what workers build.

    Raises:
        SettingsError: What the user made himself cannot be given to other processes.
    """
    own = [one for one in (task.objective, task.data) if type(one).__module__ == "__main__"]
    try:
        if own:
            raise TypeError(f"{type(own[0]).__name__} is a class of the script itself")
        return pickle.dumps(task)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise SettingsError(
            [
                f"an objective or source of your own cannot be given to workers ({error}): define "
                "its class at the top of a module that can be imported, or run with one worker"
            ],
            "the call of run",
        ) from None


class HostProcess:
    """The process that builds what a run has and forks workers."""

    def __init__(self) -> None:
        """Start it; it imports what it needs at once."""
        self._control, theirs = socket.socketpair()
        environment = {**os.environ, **of_this_process(), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", HOST, str(theirs.fileno()), json.dumps(sys.path)],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the process that plays the run alone
        )
        theirs.close()
        self._connection = Connection(os.dup(self._control.fileno()))

    def build(self, task: WorkerTask) -> None:
        """Send what is to be built.

        Raises:
            SettingsError: What the user made himself cannot be given to other processes.
            RoundFailed: The host has ended.
        """
        content = packed_task(task)
        try:
            self._connection.send_bytes(content)
        except OSError:
            raise RoundFailed(GONE) from None

    def fork(self, worker: int) -> tuple[Connection, str]:
        """Fork a worker; return the connection with it, and how the one before it ended.

        Raises:
            FedloomError: The host could not build what the run has.
            RoundFailed: The host has ended.
        """
        try:
            self._connection.send_bytes(str(worker).encode())
            answer: dict[str, str] = json.loads(self._connection.recv_bytes())
            if "error" in answer:
                raise FedloomError(answer["error"])
            _, descriptors, _, _ = socket.recv_fds(self._control, 1, 1)
            return Connection(descriptors[0]), answer["ended"]
        except (EOFError, OSError, IndexError):
            raise RoundFailed(GONE) from None

    def close(self) -> None:
        """End it, and with it the workers; a second time does nothing."""
        self._connection.close()
        self._control.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class ProcessPool:
    """Workers in processes of this machine."""

    def __init__(self, host: HostProcess, size: int) -> None:
        """Have the host fork them; see :meth:`HostProcess.fork`."""
        self.ready, self._host = range(size), host
        self._connections = {worker: host.fork(worker)[0] for worker in range(size)}

    def send(self, worker: int, request: ClientRequest) -> None:
        """Give an idle worker something to do."""
        with contextlib.suppress(OSError):  # it has ended, which is noticed when it is waited for
            packed = pickle.dumps(request, pickle.HIGHEST_PROTOCOL)
            self._connections[worker].send_bytes(packed)

    def receive(self) -> tuple[int, ClientResult | str]:
        """Wait until a worker has done its work, or replace one that has ended without."""
        ready = wait([*self._connections.values()])
        worker = min(own for own, connection in self._connections.items() if connection in ready)
        try:
            result: ClientResult = pickle.loads(self._connections[worker].recv_bytes())
            return worker, result
        except (EOFError, OSError):
            self._connections[worker].close()
            self._connections[worker], ended = self._host.fork(worker)
            return worker, ended


def host(descriptor: int) -> None:
    """Build what a run has, then fork a worker whenever one is asked for; end with the run's process."""
    end_with_parent()
    torch.set_num_threads(1)
    control = socket.socket(fileno=descriptor)
    connection = Connection(os.dup(descriptor))
    problem, workers = "", dict[int, int]()
    try:
        content = connection.recv_bytes()
    except (EOFError, OSError):
        os._exit(0)  # the run needs no workers, or has ended
    try:
        engine = build_engine(pickle.loads(content))
    except Exception as error:
        problem = f"workers could not be started: {error}"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not outlive a fork
    while True:
        try:
            worker = int(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)
        if problem:
            connection.send_bytes(json.dumps({"error": problem}).encode())
            continue
        ended = _how_ended(workers[worker]) if worker in workers else ""
        ours, theirs = socket.socketpair()
        workers[worker] = os.fork()
        if workers[worker] == 0:
            for other in (control, connection, theirs):
                other.close()
            _work(engine, Connection(ours.detach()))
        ours.close()
        connection.send_bytes(json.dumps({"ended": ended}).encode())
        socket.send_fds(control, [b"w"], [theirs.fileno()])
        theirs.close()


def build_engine(task: WorkerTask) -> SimulationEngine:
    """Build the engine that workers have.

    Raises:
        FedloomError: Something has changed since the run was begun.
    """
    training = task.experiment.training.model_copy(update={"threads": 1})
    experiment = replace(task.experiment, training=training)
    division = partition_data(experiment, task.data, task.objective)
    parts = assemble(
        experiment,
        division,
        objective=task.objective,
        start=task.start,
        probe=False,
        hidden=task.hidden,
    )
    found = parts.model_digest, parts.local.sizes(), division.loaded.digest
    for client, (once, tree_from) in task.probed.items():
        model = parts.local.resources[client].model
        model.shared_prompts, model.tree_from = once, tree_from
    if found != (task.model, task.rows, task.digest):
        raise FedloomError("model or rows have changed since the run was begun; start it again")
    return parts.local


def _how_ended(process: int) -> str:
    _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGKILL:
        return "by signal 9, as the system does where memory does not suffice"
    return f"by signal {-code}" if code < 0 else f"with exit status {code}"


def _work(engine: SimulationEngine, connection: Connection) -> None:
    """Be a worker until nobody asks any more."""
    end_with_parent()
    while True:
        try:
            connection.send_bytes(work_packed(engine, pickle.loads(connection.recv_bytes())))
        except (EOFError, OSError):
            os._exit(0)
